from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.inference import rerank
from clipflow_jax.inference.batching import Programs
from clipflow_jax.inference.pipeline import ClipFlow
from tests import tiny


class Drawer:
  """Draws the number of the candidate; likes the words that it is told."""

  def __init__(self):
    self.asked = []

  def draw_features(self, prompts, seed=0):
    return np.arange(len(prompts), dtype=np.float32)[:, None, None] + seed

  def likelihood(self, questions, answers, features):
    self.asked.append((questions, answers))
    likes = np.sin(features[:, 0, 0]) * (-1 if answers[0] == "no" else 1)
    return types.SimpleNamespace(log_p=likes)


def test_the_candidate_that_the_judge_likes_best_is_taken_of_each_prompt():
  model = Drawer()
  found = rerank.draw(model, ["a", "b"], 3)
  assert found.features.shape == (2, 3, 1, 1) and found.scores.shape == (2, 3)
  assert found.best.ravel().tolist() == [2, 3]  # sin of 0, 1, 2 and of 3, 4, 5
  assert model.asked == [([rerank.DESCRIBE] * 6, ["a"] * 3 + ["b"] * 3)]
  assert rerank.draw(model, ["a"], 3, seed=4).best.ravel().tolist() == [6]


def test_yes_is_weighed_against_no():
  model = Drawer()
  found = rerank.draw(model, ["a cat"], 3, judge="yes")
  np.testing.assert_allclose(found.scores[0], 2 * np.sin([0, 1, 2]), rtol=1e-6)
  assert model.asked[0][0][0] == "does the picture show a cat? answer yes or no."


def test_what_cannot_be_judged_is_told_before_anything_is_drawn():
  with pytest.raises(UserError, match="judge 'me' is unknown; choose one of caption, yes, clip"):
    rerank.draw(None, ["a"], 2, judge="me")
  with pytest.raises(UserError, match="the best of 0 candidates is none"):
    rerank.draw(None, ["a"], 0)


def vision(**fields):
  clip = tiny.FIELDS["clip"]
  return tiny.model(clip=clip | dict(vision=clip["vision"] | fields))


@pytest.mark.parametrize(
  ("fields", "whiten"),
  [
    (dict(), 0.0),
    (dict(), 1.0),
    (dict(pooling="attention", activation="quick_gelu"), 0.0),
    (dict(embedding=0), 0.0),
    (dict(projection_bias=True), 0.0),
  ],
  ids=str,
)
def test_clip_embeds_features_of_its_last_layer_as_it_embeds_the_picture(fields, whiten):
  model = vision(feature_layers=(2,), **fields).clone(whiten=whiten)
  images = np.random.default_rng(0).integers(0, 256, (3, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)

  def see(bound):
    seen = bound.see(images)
    return bound.standardise(seen.features), seen.embedding

  abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), method=see)["params"])
  params = tiny.random_params(abstract)
  if whiten:
    random = params["statistics"]["whitening"]
    params["statistics"] |= {"whitening": jnp.eye(len(random)) + 0.1 * (random + random.T), "common": jnp.float32(0.3)}
  features, wanted = jax.jit(lambda: model.apply({"params": params}, method=see))()
  np.testing.assert_allclose(rerank.embed_features(model, params, features), wanted, atol=1e-5)


def test_clip_judges_features_by_a_program_that_is_compiled_once(monkeypatch):
  traced, programs = [], Programs()
  monkeypatch.setattr(rerank, "embed_features", lambda model, params, x: (traced.append(x), x[:, 0] * params["by"])[1])
  model = types.SimpleNamespace(
    model=vision(feature_layers=(2,)),
    batched=lambda name, run, items: programs.over(name, run, {"by": np.float32(2)}, items, size=4),
    embed_text=lambda texts: np.ones((len(texts), 2)),
  )
  for _ in range(2):
    assert rerank.by_clip(model, np.float32([[[3, 4]], [[1, 0]]]), ["a", "b"]).tolist() == [14, 2]
  assert len(traced) == 1


def test_clip_looks_at_pictures_where_the_features_are_not_what_it_reads():
  assert rerank.clip_reads(vision(feature_layers=(2,)))
  assert rerank.clip_reads(vision(layers=1))  # all layers are the last
  for other in (dict(pooling="class"), dict(feature_pool=2), dict(has_class=True)):  # a mean has the class token
    assert not rerank.clip_reads(vision(feature_layers=(2,), **other))
  directions = {"up": [0.0, 1.0], "right": [1.0, 0.0]}
  model = types.SimpleNamespace(
    model=vision(),  # whose features are of both layers
    decode=lambda features: 10 * features,
    embed_image=lambda pictures: pictures[:, 0] / np.linalg.norm(pictures[:, 0], axis=1, keepdims=True),
    embed_text=lambda texts: np.array([directions[text] for text in texts]),
  )
  features = np.array([[[3.0, 4.0]], [[3.0, 4.0]]])
  np.testing.assert_allclose(rerank.by_clip(model, features, ["up", "right"]), [0.8, 0.6])


def test_the_pipeline_decodes_the_best_of_its_candidates(trained):
  model = ClipFlow.from_checkpoint(trained)
  how = dict(steps=1, guidance=1.0, seed=3)
  found = rerank.draw(model, ["a red circle", "a star"], 2, **how)
  drawn = model.draw(["a red circle", "a star"], best_of=2, **how)
  np.testing.assert_array_equal(drawn, model.decode(found.best, seed=3))
  assert np.ptp(found.scores, axis=1).min() > 0


def test_of_one_seed_for_each_prompt_the_candidates_are_those_of_it_alone(trained):
  model = ClipFlow.from_checkpoint(trained)
  how = dict(steps=1, guidance=1.0)
  both = rerank.draw(model, ["a red circle", "a star"], 2, seed=[4, 3], **how)
  alone = rerank.draw(model, ["a star"], 2, seed=3, **how)
  np.testing.assert_allclose(both.features[1], alone.features[0], atol=1e-5)
  assert np.abs(both.features[1, 0] - both.features[1, 1]).max() > 0.1
  with pytest.raises(UserError, match="1 seeds for 2 items"):
    model.draw(["a red circle", "a star"], seed=[3], best_of=2)
