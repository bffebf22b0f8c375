from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.objectives import joint
from clipflow_jax.objectives.joint import Objective
from tests import tiny

BATCH = tiny.batch()
KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.params()


@pytest.mark.parametrize("weights", [{}, {"flow": 0.0}, {"flow": 1.0, "flwo": 1.0}])
def test_weights_must_name_an_objective_and_no_other(weights: dict[str, float]):
  with pytest.raises(UserError, match="must name at least one of contrastive, .*, and no other"):
    Objective(weights)


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    (dict(levels=0), "objective.levels is 0: give 1 or more"),
    (dict(targets=-1), "objective.targets is -1: give 0 or more"),
    (dict(early=float("nan")), "objective.early is nan: give 0 or more"),
    (dict(drop_condition=2.0), "objective.drop_condition is 2.0: give a share"),
    (dict(weights={"flow": 1.0, "pixels": -1.0}), "objective.weights .*: give numbers from 0"),
  ],
)
def test_settings_that_make_no_sense_are_refused(fields, told):
  with pytest.raises(UserError, match=told):
    Objective(**dict(weights={"flow": 1.0}) | fields)


@pytest.mark.parametrize(
  ("name", "fields", "told"),
  [
    ("contrastive", dict(clip=dict(tiny.FIELDS["clip"], text=None)), "contrastive needs model.clip.text"),
    ("readout", dict(clip=dict(tiny.FIELDS["clip"], captioner=None)), "readout needs model.clip.captioner"),
    ("language", dict(transformer=None), "language needs model.transformer"),
    ("flow", dict(transformer=dict(tiny.FIELDS["transformer"], flow_width=0)), "flow needs .*flow_width or"),
    ("pixels", dict(pixel_decoder=None), "pixels needs model.pixel_decoder"),
    ("language", dict(clip={}), "model.clip is empty"),
  ],
)
def test_what_an_objective_is_made_of_is_asked_for(name: str, fields: dict[str, Any], told: str):
  with pytest.raises(UserError, match=told):
    Objective({name: 1.0}).check(tiny.model(**fields), tiny.pack([[], []], pictures=1))


def test_an_early_loss_needs_an_early_head():
  model = tiny.model(transformer=dict(tiny.FIELDS["transformer"], early_layer=0))
  Objective({"flow": 1.0}).check(model, BATCH)
  with pytest.raises(UserError, match="objective.early needs model.transformer.early_layer"):
    Objective({"flow": 1.0}, early=0.5).check(model, BATCH)


def test_cached_features_are_enough_but_for_what_looks_at_pictures():
  cached = BATCH.replace(images=None, features=np.zeros((2, tiny.PICTURES, tiny.TOKENS, tiny.CHANNELS)))
  own = dict(own={"mine": "operator:add"})
  Objective({"language": 1.0, "flow": 1.0, "mine": 1.0}, **own).check(tiny.model(), cached)
  with pytest.raises(UserError, match="objective.weights: pixels need pictures"):
    Objective({"language": 1.0, "pixels": 1.0}).check(tiny.model(), cached)


def test_the_decoder_is_not_asked_for_the_margin_that_the_tower_leaves_out():
  vision = dict(tiny.FIELDS["clip"]["vision"], image_size=tiny.SIZE + 2)
  model = tiny.model(clip=dict(tiny.FIELDS["clip"], vision=vision, captioner=None))
  batch = BATCH.replace(images=np.zeros((2, tiny.PICTURES, tiny.SIZE + 2, tiny.SIZE + 2, 3), np.uint8))
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method="everything")["params"])
  sums = jax.eval_shape(
    lambda p: model.apply({"params": p}, batch, KEYS, method=Objective({"pixels": 1.0}).sums), params
  )
  assert sums.keys() == {"pixels", "pixels_psnr"}


@pytest.mark.parametrize("name", ["contrastive", "caption", "readout"])
def test_pairs_are_of_one_picture_a_row(name: str):
  with pytest.raises(UserError, match=f"for {name} a row is one picture and its caption; set data.images_per_row to 1"):
    Objective({name: 1.0}).check(tiny.model(), BATCH)


def test_captions_are_no_longer_than_the_text_tower_reads():
  batch = tiny.pack([[], []], length=tiny.LENGTH + 1, pictures=1)
  Objective({"caption": 1.0}).check(tiny.model(), batch)
  with pytest.raises(UserError, match=r"data.length 25 is more than the 24 words that model.clip.text reads"):
    Objective({"contrastive": 1.0}).check(tiny.model(), batch)


def test_counts_are_of_what_the_sums_add_up():
  counts = Objective({"flow": 1.0}).counts(BATCH)
  assert counts.keys() == set(joint.NAMES)
  assert counts["contrastive"] == counts["readout"] == 2
  assert counts["flow"] == 3 and counts["pixels"] == 5
  assert Objective({"flow": 1.0}, targets=1).counts(BATCH)["flow"] == 2
  assert all(count.dtype == jnp.float32 for count in counts.values())
  empty = tiny.pack([[], []])
  assert {float(count) for count in Objective({"flow": 1.0}).counts(empty).values()} == {1.0, 2.0}


def traced(objective: Objective, params, batch) -> dict[str, jax.ShapeDtypeStruct]:
  return jax.eval_shape(lambda: tiny.model().apply({"params": params}, batch, KEYS, method=objective.sums))


def test_settings_reach_the_objectives_that_they_are_of(params, monkeypatch):
  told: dict[str, float] = {}
  for part in (joint.flow, joint.pixels):
    monkeypatch.setattr(part, "losses", lambda *arrays, **settings: told.update(settings) or {})
  own = dict(levels=3, early=0.25, targets=2, drop_condition=0.1, decoder_noise=0.3, decoder_edges=4.0)
  traced(Objective({"flow": 1.0, "pixels": 1.0}, **own), params, BATCH)
  assert told == dict(levels=3, early=0.25, targets=2, drop=0.1, noise=0.3, edges=4.0)


def test_an_objective_of_ones_own_is_summed_over_rows(params, monkeypatch):
  monkeypatch.setattr(Objective, "_of_own", lambda self, name: lambda model, batch, keys: jnp.array([2.0, 5.0]))
  objective = Objective({"mine": 1.0}, own={"mine": "somewhere:there"})
  sums = tiny.model().apply({"params": params}, BATCH, KEYS, method=objective.sums)
  assert sums == {"mine": 7.0} and objective.loss(sums, objective.counts(BATCH))[0] == 3.5


@pytest.mark.parametrize(
  ("name", "chunk"),
  [("contrastive", "contrastive_chunk"), ("caption", "vocabulary_chunk"), ("language", "vocabulary_chunk")],
)
def test_a_chunk_reaches_the_objective_that_it_is_of(params, name: str, chunk: str):
  batch = tiny.pack([[], [], []], pictures=1)  # of three rows of 24 slots; neither is a multiple
  size = 2 if name == "contrastive" else 5
  with pytest.raises(UserError, match=f"objective.{chunk} {size} does not divide"):
    traced(Objective({name: 1.0}, **{chunk: size}), params, batch)


@pytest.mark.parametrize("name", joint.NAMES)
def test_an_objective_alone_gives_its_own_sums(params, name: str):
  batch = BATCH if name in ("language", "flow", "pixels") else tiny.pack([[], []], pictures=1)
  objective = Objective({name: 1.0}, levels=2)

  def run():
    sums = tiny.model().apply({"params": params}, batch, KEYS, method=objective.sums)
    return sums, objective.loss(sums, objective.counts(batch))[1]

  sums, means = jax.eval_shape(run)
  assert {key.split("_")[0] for key in sums} == {name} and means.keys() == sums.keys() | {"loss"}
  assert {value.shape for value in sums.values()} == {()}
  assert {(value.shape, value.dtype) for value in means.values()} == {((), jnp.dtype(jnp.float32))}


def test_the_loss_is_the_weighted_sum_of_means():
  objective = Objective({"language": 2.0, "flow": 0.5, "pixels": 0.0})
  sums = {"language": 6.0, "language_accuracy": 3.0, "flow": 8.0, "flow_low": 4.0}
  loss, metrics = objective.loss(sums, {"language": 3.0, "flow": 2.0})
  assert loss == 2.0 * 2.0 + 0.5 * 4.0
  assert metrics == {"language": 2.0, "language_accuracy": 1.0, "flow": 4.0, "flow_low": 2.0, "loss": loss}


@pytest.mark.parametrize("stop", [True, False])
def test_a_frozen_text_expert_gets_no_gradient_from_drawing(params, stop: bool):
  objective = Objective({"flow": 1.0}, stop_text=stop)

  def loss(params):
    return tiny.model().apply({"params": params}, BATCH, KEYS, method=objective.sums)["flow"]

  gradient = jax.jit(jax.grad(loss))(params)["language_model"]

  def largest(name: str) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient[name]))

  assert (largest("text") == 0) == (largest("embed") == 0) == stop
  assert largest("flow") > 0


def test_a_picture_that_is_absent_has_no_pixel_loss(params):
  """One picture in a row with room for three has the loss of one picture in a row with room for one."""
  one = tiny.example(np.random.default_rng(0), 1, tiny.READ)
  objective = Objective({"pixels": 1.0}, decoder_noise=0.0, decoder_edges=0.0)

  def mean(room: int) -> float:
    batch = tiny.pack([[one]], pictures=room)
    run = jax.jit(lambda p: tiny.model().apply({"params": p}, batch, KEYS[:1], method=objective.sums))
    return float(objective.loss(run(params), objective.counts(batch))[1]["pixels"])

  assert mean(room=3) == pytest.approx(mean(room=1), rel=1e-4)


def test_every_picture_of_a_row_has_noise_of_its_own(params, monkeypatch):
  given = []

  def losses(model, images, features, there, keys, **settings):
    given.append((len(images), keys))
    return {"pixels": jnp.float32(0)}

  monkeypatch.setattr(joint.pixels, "losses", losses)
  tiny.model().apply({"params": params}, BATCH, KEYS, method=Objective({"pixels": 1.0}).sums)
  ((count, keys),) = given
  assert count == BATCH.image_roles.size == len(np.unique(jax.random.key_data(keys), axis=0))
