from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.models.layers import to_patches, to_unit
from clipflow_jax.objectives import contrastive
from tests import tiny

WEIGHTS = dict(contrastive=1.0, caption=1.0, readout=1.0)


def test_the_loss_is_the_mean_cross_entropy_of_finding_each_other():
  rng = np.random.default_rng(0)
  images, texts = rng.normal(size=(2, 5, 8)).astype(np.float32)
  scores = 3.0 * images.astype(np.float64) @ texts.T
  loss, found = contrastive.match(images, texts, np.float32(3.0))
  for i in range(5):
    text_of_image = np.log(np.exp(scores[i]).sum()) - scores[i, i]
    image_of_text = np.log(np.exp(scores[:, i]).sum()) - scores[i, i]
    assert loss[i] == pytest.approx((text_of_image + image_of_text) / 2, rel=1e-4)
    assert found[i] == (scores[i].argmax() == i)


def test_with_a_bias_each_pair_is_judged_alone():
  rng = np.random.default_rng(0)
  images, texts = rng.normal(size=(2, 5, 8)).astype(np.float32)
  scores = 3.0 * images.astype(np.float64) @ texts.T - 4.0
  loss, found = contrastive.match(images, texts, np.float32(3.0), bias=np.float32(-4.0))
  signs = 2 * np.eye(5) - 1
  np.testing.assert_allclose(loss, np.log1p(np.exp(-signs * scores)).sum(axis=1), rtol=1e-4)
  assert found.tolist() == (scores.argmax(axis=1) == np.arange(5)).tolist()


@pytest.mark.parametrize("bias", [None, np.float32(-2.0)], ids=["softmax", "sigmoid"])
def test_in_chunks_loss_and_gradients_are_the_same_and_no_square_of_the_batch_exists(bias):
  images, texts = np.random.default_rng(0).normal(size=(2, 12, 8)).astype(np.float32)
  texts[3] = images[7]  # one image finds another's text
  texts[[1, 9]] = images[1]  # and one its own twice, in two chunks: the first counts
  arguments = images, texts, np.float32(5.0)

  def with_gradients(chunk: int):
    def loss(*arguments):
      loss, found = contrastive.match(*arguments, chunk, bias)
      return (loss * np.arange(12)).sum(), found

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

  whole, chunks = jax.jit(with_gradients(0))(*arguments), jax.jit(with_gradients(4))(*arguments)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, chunks)
  assert "[12,12]" in str(jax.make_jaxpr(with_gradients(0))(*arguments))
  program = str(jax.make_jaxpr(with_gradients(4))(*arguments))
  assert "[12,4]" in program and "[12,12]" not in program and "[3,12,4]" not in program  # nor kept in parts


def test_a_chunk_that_does_not_divide_the_batch_is_refused():
  with pytest.raises(UserError, match="contrastive_chunk 3 does not divide the batch of 4"):
    contrastive.match(np.eye(4), np.eye(4), np.float32(1.0), 3)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_a_batch_of_at_most_one_chunk_is_compared_at_once(chunk: int):
  pairs = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
  jax.tree.map(np.testing.assert_array_equal, *(contrastive.match(*pairs, np.float32(3.0), c) for c in (0, chunk)))


def test_pairs_that_agree_and_no_others_have_no_loss():
  loss, found = contrastive.match(np.eye(4), np.eye(4), np.float32(50.0))
  np.testing.assert_allclose(loss, 0, atol=1e-6)
  assert found.all()


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.params()


def captions() -> Any:
  """Three rows of one caption and one picture each."""
  rng = np.random.default_rng(0)
  rows = [[tiny.example(rng, words)] for words in (4, 9, 7)]
  pictures = rng.integers(0, 256, (3, 1, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
  return tiny.pack(rows, pictures=1).replace(images=pictures)


def test_the_sums_are_those_of_their_definitions(params):
  batch, model = captions(), tiny.model()

  @jax.jit
  def evaluate(params, batch):
    def run(bound):
      clip = bound.clip_model
      seen = clip.see(batch.images[:, 0])
      texts = clip.embed_text(batch.tokens, batch.loss_weights > 0)
      scores = clip.temperature() * seen.embedding @ texts.T
      sums = contrastive.losses(bound, batch, WEIGHTS)
      return sums, scores, clip.read_pixels(seen.tokens)

    return model.apply({"params": params}, method=run)

  sums, scores, pixels = jax.device_get(evaluate(params, batch))
  assert sums.keys() == {"contrastive", "contrastive_accuracy", "caption", "caption_accuracy", "readout"}
  scores = np.asarray(scores, np.float64)
  both_ways = np.log(np.exp(scores).sum(axis=1)) + np.log(np.exp(scores).sum(axis=0)) - 2 * np.diag(scores)
  assert sums["contrastive"] == pytest.approx(both_ways.sum() / 2, rel=1e-4)
  assert sums["contrastive_accuracy"] == (scores.argmax(axis=1) == np.arange(3)).sum()
  truth = np.asarray(to_patches(to_unit(batch.images[:, 0]), tiny.PATCH))
  assert sums["readout"] == pytest.approx(((pixels - truth) ** 2).mean(axis=(1, 2)).sum(), rel=1e-4)
  # What frames the caption in the stream has no weight, and says nothing to the towers.
  framing = (batch.loss_weights == 0) & (batch.segments > 0)
  assert framing.any()
  reframed, _, _ = evaluate(params, batch.replace(tokens=np.where(framing, 1, batch.tokens)))
  assert reframed["contrastive"] == sums["contrastive"]
  assert reframed["caption"] != sums["caption"]


def test_towers_of_pairs_learn_by_their_bias(params):
  batch, model = captions(), tiny.model(clip=dict(tiny.FIELDS["clip"], pairwise=True))
  params = dict(params, clip_model=dict(params["clip_model"], logit_bias=np.float32(-3.0)))

  def loss(params):
    return model.apply({"params": params}, method=lambda bound: contrastive.losses(bound, batch, dict(contrastive=1.0)))

  grad = jax.grad(lambda params: loss(params)["contrastive"])(params)["clip_model"]
  assert grad["logit_bias"] != 0 and grad["logit_scale"] != 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_only_what_has_a_weight_is_computed(params, name: str):
  batch, model = captions(), tiny.model()
  weights = dict.fromkeys(WEIGHTS, 0.0) | {name: 1.0}

  def run(bound):
    return contrastive.losses(bound, batch, weights)

  sums = jax.eval_shape(lambda: model.apply({"params": params}, method=run))
  assert {key.split("_")[0] for key in sums} == {name}
