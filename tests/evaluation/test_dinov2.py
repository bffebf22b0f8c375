from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import dinov2, inception
from clipflow_jax.interop import huggingface
from clipflow_jax.models.vision import VisionTower

DINO = dict(embedding=0, has_class=True, layer_scale=True, pooling="class", activation="gelu")


def tower(**fields) -> VisionTower:
  return VisionTower(**dict(image_size=84, patch_size=14, width=8, layers=2, heads=2, mlp=32) | DINO | fields)


@pytest.fixture(scope="module")
def made():
  module = tower()
  return module, module.init(jax.random.key(0), np.zeros((1, 84, 84, 3), np.uint8))["params"]


def test_positions_are_resampled_as_pytorch_does():
  torch = pytest.importorskip("torch")
  places = np.random.default_rng(0).normal(size=(1 + 37 * 37, 3)).astype(np.float32)
  grid = torch.tensor(places[1:].reshape(1, 37, 37, 3)).permute(0, 3, 1, 2)
  wanted = torch.nn.functional.interpolate(grid, scale_factor=[16.1 / 37] * 2, mode="bicubic", align_corners=False)
  found = dinov2.resampled(places, 37, 16)
  np.testing.assert_array_equal(found[0], places[0])
  np.testing.assert_allclose(found[1:], wanted.permute(0, 2, 3, 1).reshape(256, 3).numpy(), atol=1e-5)
  assert dinov2.resampled(places, 37, 37) is places


def test_features_are_the_class_token_of_pictures_of_224_pixels(made, monkeypatch):
  params = made[1]
  monkeypatch.setattr(huggingface, "load", lambda weights: made)
  monkeypatch.setattr(dinov2, "SIZE", 42)  # few tokens
  extractor = dinov2.Extractor("weights", batch_size=2)
  pictures = np.random.default_rng(0).integers(0, 256, (3, 42, 42, 3), dtype=np.uint8)
  found = extractor(pictures)
  assert found.shape == (3, 8) and found.dtype == np.float32
  small = {**params, "place_positions": dinov2.resampled(np.asarray(params["place_positions"]), 6, 3)}
  whole = tower(image_size=42).apply({"params": small}, pictures, False)
  unit = found / np.linalg.norm(found, axis=1, keepdims=True)
  np.testing.assert_allclose(unit, whole.embedding, atol=1e-5)  # which is the same at unit norm
  large = np.stack([np.asarray(Image.fromarray(one).resize((90, 90))) for one in pictures])
  assert np.abs(extractor(large) - found).max() < np.abs(found).max()  # another size is resized, not refused


def test_the_key_changes_with_every_digit_dtype_and_field(made):
  module, params = made
  nudged = jax.tree.map(lambda leaf: np.nextafter(np.asarray(leaf), np.float32(2)), params)
  halved = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
  others = [
    (module.clone(mean=(0.5, 0.5, 0.4)), params),
    (module.clone(norm_eps=1e-3), params),
    (module, nudged),
    (module, halved),
    (module, jax.tree.map(lambda leaf: leaf.astype(np.float32), halved)),
  ]
  keys = {inception.key_of(*each) for each in (made, *others)}
  assert len(keys) == 6 and inception.key_of(module, dict(params)) in keys


def test_another_tower_is_refused(made, monkeypatch):
  monkeypatch.setattr(huggingface, "load", lambda weights: (tower(pooling="mean"), made[1]))
  with pytest.raises(UserError, match="clip is no DINOv2: give a folder or hub id such as facebook/dinov2-large"):
    dinov2.Extractor("clip")
