from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from clipflow_jax.models.layers import layer_norm
from clipflow_jax.models.vision import Seen, VisionTower, Want
from tests import tiny

FIELDS = tiny.FIELDS["clip"]["vision"]
IMAGES = tiny.batch().images[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def see(params, layers: tuple[int, ...], want: Want = "features") -> Seen:
  return VisionTower(**FIELDS, feature_layers=layers).apply({"params": params}, IMAGES, want)


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.params()["clip_model"]["vision_tower"]


def test_shapes_and_types(params):
  seen = jax.eval_shape(lambda p: see(p, ()), params)
  assert (seen.tokens.shape, seen.features.shape) == ((3, 4, 32), (3, 4, 32))
  assert seen.embedding.shape == (3, 16)
  assert seen.features.dtype == seen.embedding.dtype == np.float32


def test_features_are_the_mean_of_the_chosen_layers_each_standardised(params):
  first, last, both = (see(params, layers) for layers in ((1,), (2,), ()))
  np.testing.assert_allclose(both.features, (first.features + last.features) / 2, atol=1e-5)
  np.testing.assert_allclose(last.features, layer_norm(last.tokens), atol=1e-5)
  assert not np.isclose(first.features, last.features, atol=1e-2).all()
  for one in (first, last):
    np.testing.assert_allclose(one.features.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(one.features.std(axis=-1), 1, atol=1e-4)


def test_what_is_not_asked_for_is_left_out_and_the_rest_is_the_same(params):
  whole, tokens, embedding = see(params, ()), see(params, (), "tokens"), see(params, (), "embedding")
  assert tokens.features is None and embedding.features is None and embedding.tokens is None
  np.testing.assert_allclose(tokens.tokens, whole.tokens, atol=1e-6)
  for short in (tokens, embedding):
    np.testing.assert_allclose(short.embedding, whole.embedding, atol=1e-6)


@pytest.mark.parametrize(
  ("layers", "remat", "unroll"), [(1, "none", False), (3, "none", True), (3, "full", False), (3, "full", True)]
)
def test_of_the_last_layer_a_class_token_is_made_alone(layers, remat, unroll):
  """The same embedding and the same gradients as where all tokens are made, for less work."""
  fields = dict(FIELDS, layers=layers, has_class=True, pooling="class", rope_span=2, remat=remat, unroll=unroll)
  tower = VisionTower(**fields)
  params = tiny.random_params(jax.eval_shape(lambda: tower.init(jax.random.key(0), IMAGES)["params"]))

  def judged(want):
    def loss(params):
      embedding = tower.apply({"params": params}, IMAGES, want).embedding
      return (embedding * np.linspace(-1, 1, embedding.size).reshape(embedding.shape)).sum()

    return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

  alone, among_all = judged("embedding"), judged("tokens")
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), alone(params), among_all(params))
  if unroll:  # of a loop each layer's work is counted once
    assert alone.cost_analysis()["flops"] < 0.9 * among_all.cost_analysis()["flops"]


def test_squares_of_neighbours_are_averaged_into_one_feature():
  fields, images = (
    dict(FIELDS, image_size=32),
    np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
  )
  plain, pooled = VisionTower(**fields), VisionTower(**fields, feature_pool=2)
  params = tiny.random_params(jax.eval_shape(plain.init, jax.random.key(0), images)["params"])
  every, found = (jax.jit(tower.apply)({"params": params}, images).features for tower in (plain, pooled))
  grid = every.reshape(2, 4, 4, -1)
  for row, column in np.ndindex(2, 2):
    square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    np.testing.assert_allclose(found[:, 2 * row + column], square.mean(axis=(1, 2)), atol=1e-5)


def test_embeddings_have_unit_norm_and_tell_pictures_apart(params):
  embedding = np.asarray(see(params, ()).embedding)
  np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, atol=1e-5)
  assert np.abs(embedding[0] - embedding[1]).max() > 1e-2


def test_a_margin_that_no_patch_covers_is_left_out():
  """As of siglip-so400m-patch14-384: its convolution leaves six pixels out."""
  tower = VisionTower(**dict(tiny.FIELDS["clip"]["vision"], image_size=18))
  images = np.random.default_rng(0).integers(0, 256, (2, 18, 18, 3), dtype=np.uint8)
  params = tiny.random_params(jax.eval_shape(tower.init, jax.random.key(0), images)["params"])
  other = images.copy()
  other[:, 16:], other[:, :, 16:] = 0, 0
  one, two = (jax.jit(tower.apply)({"params": params}, seen).tokens for seen in (images, other))
  assert one.shape == (2, 4, 32)
  np.testing.assert_array_equal(one, two)
