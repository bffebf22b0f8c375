from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.batch import Batch
from clipflow_jax.errors import UserError
from clipflow_jax.flow import path
from clipflow_jax.models.clipflow import ClipFlow, Place
from clipflow_jax.models.transformer import Transformer
from tests import tiny

BATCH = tiny.batch()
SHAPE = (2, tiny.PICTURES, tiny.TOKENS, tiny.CHANNELS)
X_T = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
T = np.array([[0.01, 0.3, 0.9], [0.5, 1.0, 0.7]], np.float32)


def predict(params, model: ClipFlow, batch: Batch = BATCH):
  """(features, velocity, full, early) at X_T and T."""

  def run(bound: ClipFlow):
    features = bound.features(batch)
    _, context = bound.read(batch, features)
    place = Place(batch.image_segments, batch.image_order, batch.image_positions)
    given = bound.conditioning(context, place)
    return features, bound.velocity(X_T, T, given), *bound.predict(X_T, T, given)

  return model.apply({"params": params}, method=run)


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.params()


@pytest.fixture(scope="module")
def predicted(params) -> dict[str, tuple]:
  both = jax.jit(lambda p: {name: predict(p, tiny.model(prediction=name)) for name in ("x", "v")})
  return both(params)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_velocity_has_the_shape_of_the_features_and_an_early_twin(predicted, prediction: str):
  features, velocity, full, early = predicted[prediction]
  assert features.shape == velocity.shape == full.shape == early.shape == SHAPE
  assert {a.dtype for a in predicted[prediction]} == {jnp.dtype(jnp.float32)}
  np.testing.assert_array_equal(velocity, full)
  assert not np.isclose(full, early, atol=1e-2).all()


@pytest.mark.parametrize("head", [2, 3])
def test_a_prediction_of_x_becomes_the_velocity_that_leads_there(predicted, head: int):
  # The same network's output, once taken as the velocity and once as the clean features.
  output = predicted["v"][head]
  np.testing.assert_allclose(predicted["x"][head], path.velocity(output, X_T, T), atol=1e-4)


def test_a_noisy_block_is_its_time_and_then_its_grid_where_its_picture_stands(params, monkeypatch):
  found = []
  monkeypatch.setattr(Transformer, "draw", lambda self, z, positions, *rest: found.append(positions) or (z, None))
  at = np.array([[5, 6, 7], [8, 9, 10]])
  given = None, Place(np.ones_like(at), at, at)
  out = tiny.model(prediction="v").apply({"params": params}, X_T, T, given, method="velocity")
  cells = [(0, row, column) for row in range(tiny.GRID) for column in range(tiny.GRID)]
  np.testing.assert_array_equal(found[0], at[..., None, None] + np.array([(0, 0, 0)] * 4 + cells))
  head = jax.tree.map(np.asarray, params["flow_head"])
  rows, columns = (head["grid"][f"{name}_positions"] for name in ("row", "column"))
  tokens = X_T @ head["entry"]["kernel"] + head["entry"]["bias"] + (rows[:, None] + columns).reshape(tiny.TOKENS, -1)
  np.testing.assert_allclose(out, tokens @ head["head"]["kernel"] + head["head"]["bias"], atol=1e-4)


def test_other_models_have_no_early_head(params):
  model = tiny.model(transformer=tiny.FIELDS["transformer"] | dict(early_layer=0))
  fresh = tiny.random_params(
    jax.eval_shape(lambda: model.init(jax.random.key(0), BATCH, method="everything"))["params"]
  )
  assert "early_head" in params["flow_head"] and "early_head" not in fresh["flow_head"]
  *_, full, early = jax.eval_shape(lambda: predict(fresh, model))
  assert full.shape == SHAPE and early is None


def test_an_unknown_prediction_is_an_error(params):
  with pytest.raises(UserError, match="model.prediction 'eps' is unknown; choose x or v"):
    jax.eval_shape(lambda: predict(params, tiny.model(prediction="eps")))


def changed(part: str, **fields: Any) -> dict[str, Any]:
  """The fields of the tiny model with some of a part's in place of its own."""
  if part.startswith("clip."):
    name = part.removeprefix("clip.")
    return dict(clip=tiny.FIELDS["clip"] | {name: tiny.FIELDS["clip"][name] | fields})
  return {part: tiny.FIELDS[part] | fields}


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    (changed("clip.vision", patch_size=7), "clip.vision.image_size 16 is no multiple of patch_size 7"),
    (changed("clip.vision", heads=3), "clip.vision.width 32 is no multiple of heads 3"),
    (changed("clip.text", heads=3), "clip.text.width 16 is no multiple of heads 3"),
    (changed("clip.vision", feature_pool=3), "feature_pool 3 does not divide the 2 tokens of a side"),
    (changed("clip.vision", feature_layers=(1, 3)), r"feature_layers \(1, 3\): each must be another of layers 1 to 2"),
    (changed("clip.vision", feature_layers=(1, 1)), r"feature_layers \(1, 1\): each must be another"),
    (changed("clip.vision", feature_layers=(0,)), r"feature_layers \(0,\): each must be another"),
    (changed("transformer", heads=4, kv_heads=3), "transformer.heads 4 is no multiple of kv_heads 3"),
    (changed("transformer", head_dim=15, rope_sections=()), r"rope_sections \(7,\) must .* half the head dim, 7.5"),
    (changed("pixel_decoder", patch_size=4), "pixel_decoder has 4 patches a side, the tower's features 2"),
    (changed("pixel_decoder", width=20), "pixel_decoder.width 20 is no multiple of 4 x heads 2"),
    (changed("clip.vision", image_size=32), "pixel_decoder has 2 patches a side, the tower's features 4"),
    (dict(pixel_decoder=None) | changed("clip.vision", image_size=32), "pictures are 16 x 16, .*image_size 32"),
  ],
)
def test_sizes_that_do_not_go_into_each_other_are_told_in_one_line(fields: dict[str, Any], told: str):
  init = functools.partial(tiny.model(**fields).init, method="everything")
  with pytest.raises(UserError, match=told) as error:
    jax.eval_shape(init, jax.random.key(0), BATCH)
  assert "\n" not in str(error.value)


def test_the_dimension_law_and_its_scale_give_the_time_shift():
  assert tiny.model(shift_scale=1.0).alpha == 1.0
  assert tiny.model(shift_scale=20.0).alpha == pytest.approx(20 * (4 * 32 / 4096) ** 0.5)
  assert tiny.model().feature_shape == (tiny.TOKENS, tiny.CHANNELS)


def test_features_are_standardised_by_the_stored_statistics(params, predicted):
  raw = tiny.model().apply({"params": params}, BATCH.images.reshape(-1, 16, 16, 3), method="see").features
  mean, std = params["statistics"]["mean"], params["statistics"]["std"]
  assert mean.shape == std.shape == (tiny.TOKENS, tiny.CHANNELS)
  expected = (raw.reshape(SHAPE) - mean) / std
  np.testing.assert_allclose(predicted["x"][0], expected, atol=1e-4)


def test_cached_features_take_the_place_of_the_pictures(predicted, params):
  cached = BATCH.replace(images=None, features=predicted["v"][0])
  *_, full, _ = jax.jit(lambda p: predict(p, tiny.model(prediction="v"), cached))(params)
  np.testing.assert_allclose(full, predicted["v"][2], atol=1e-5)


def test_features_are_no_path_for_gradients(params):
  def loss(params):
    return tiny.model().apply({"params": params}, BATCH, method="features").sum()

  gradient = jax.jit(jax.grad(loss))(params)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_picture_is_read_where_the_stream_says(params):
  rng = np.random.default_rng(1)
  features = rng.normal(size=SHAPE).astype(np.float32)

  def embed(features, index):
    return tiny.model().apply({"params": params}, BATCH.tokens, index, features, method="embed_stream")

  embedded, words = embed(features, BATCH.image_index), embed(None, BATCH.image_index)
  is_word = BATCH.image_index < 0
  np.testing.assert_array_equal(embedded[is_word], words[is_word])
  connector, grid = params["image_connector"], params["image_grid"]
  for row, slot in np.argwhere(~is_word):
    picture, token = divmod(BATCH.image_index[row, slot], tiny.TOKENS)
    expected = features[row, picture, token] @ np.asarray(connector["kernel"]) + connector["bias"]
    expected += grid["row_positions"][token // tiny.GRID] + grid["column_positions"][token % tiny.GRID]
    np.testing.assert_allclose(embedded[row, slot], expected, atol=1e-4)


def test_words_are_written_as_they_would_be_read(params):
  model = tiny.model()

  def both(bound: ClipFlow):
    hidden, context = bound.read(BATCH, bound.features(BATCH))
    at = jnp.int32(tiny.LENGTH - 1)  # row 1 ends in a word there
    written, _ = bound.extend(BATCH.tokens[:, -1:], BATCH.positions[:, -1:, 0], context, at)
    return bound.logits(hidden), written

  logits, written = jax.jit(lambda p: model.apply({"params": p}, method=both))(params)
  np.testing.assert_allclose(written[1, 0], logits[1, -1], atol=1e-5)


def test_the_decoders_output_becomes_pixels(params):
  features = np.random.default_rng(2).normal(size=(2, tiny.TOKENS, tiny.CHANNELS)).astype(np.float32)
  model = tiny.model()
  pixels = jax.eval_shape(lambda p: model.apply({"params": p}, features, method="pixels"), params)
  assert pixels.shape == (2, tiny.SIZE, tiny.SIZE, 3) and pixels.dtype == jnp.uint8


def test_who_asks_for_intermediates_gets_the_attention_of_every_layer_and_the_same_results(params, predicted):
  model, row = tiny.model(), jax.tree.map(lambda leaf: leaf[:1], BATCH)

  def run(bound: ClipFlow):
    _, context = bound.read(row, bound.features(row))
    given = bound.conditioning(context, Place(row.image_segments, row.image_order, row.image_positions))
    return bound.velocity(X_T[:1], T[:1], given)

  velocity, sown = jax.jit(lambda p: model.apply({"params": p}, method=run, mutable=["intermediates"]))(params)
  np.testing.assert_allclose(velocity, predicted["x"][1][:1], atol=1e-4)
  parts = sown["intermediates"]["language_model"]
  looked = {name: parts[name]["layers"]["attention"]["looks"][0] for name in ("text", "flow_early", "flow")}
  slots, block = tiny.LENGTH, 4 + tiny.TOKENS
  assert looked["text"].shape == (2, 1, slots, 2, slots)
  for name in ("flow_early", "flow"):
    assert looked[name].shape == (1, tiny.PICTURES, block, 2, slots + block)
    np.testing.assert_allclose(looked[name].sum(axis=-1), 1, atol=1e-5)
