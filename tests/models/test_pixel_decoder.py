from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.models.layers import from_patches, to_patches, to_pixels, to_unit
from clipflow_jax.models.pixel_decoder import PixelDecoder
from tests import tiny

FIELDS = tiny.FIELDS["pixel_decoder"]
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(2, tiny.TOKENS, tiny.CHANNELS)).astype(np.float32)
NOISY = RNG.normal(size=(2, tiny.SIZE, tiny.SIZE, 3)).astype(np.float32)


@jax.jit
def decode(params, features, noisy=None, t=None):
  """By the flow where there is something noisy, else by the deterministic decoder."""
  decoder = PixelDecoder(**(FIELDS | dict(flow=noisy is not None)))
  return decoder.apply({"params": params}, features, noisy, t)


@pytest.fixture(scope="module")
def deterministic() -> Any:
  return tiny.params()["decoder"]


@pytest.fixture(scope="module")
def flow() -> Any:
  return tiny.params(flow_decoder=True)["decoder"]


def test_both_kinds_give_pictures(deterministic, flow):
  for pictures in (decode(deterministic, FEATURES), decode(flow, FEATURES, NOISY, jnp.ones(2))):
    assert pictures.shape == (2, tiny.SIZE, tiny.SIZE, 3) and pictures.dtype == jnp.float32


def test_the_flow_hears_features_noise_and_time_of_its_own_row(flow):
  t = np.array([0.3, 0.6], np.float32)
  before = decode(flow, FEATURES, NOISY, t)
  for changed in (
    (FEATURES + np.array([0, 1])[:, None, None], NOISY, t),
    (FEATURES, NOISY + np.array([0, 1])[:, None, None, None], t),
    (FEATURES, NOISY, t + np.array([0, 0.1], np.float32)),
  ):
    after = decode(flow, *(np.asarray(a, np.float32) for a in changed))
    np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    assert np.abs(after[1] - before[1]).max() > 1e-3


def test_only_the_flow_has_an_entry_for_noise_and_time(deterministic, flow):
  assert flow.keys() - deterministic.keys() == {"patches", "time"}


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_patches_and_pictures_are_inverse(b: int, rows: int, columns: int, patch: int):
  images = np.random.default_rng(0).integers(0, 256, (b, rows * patch, columns * patch, 3))
  patches = to_patches(images, patch)
  assert patches.shape == (b, rows * columns, patch * patch * 3)
  np.testing.assert_array_equal(from_patches(patches, patch, rows, columns), images)


def test_patches_go_by_rows():
  image = np.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
  patches = to_patches(image, 2)
  np.testing.assert_array_equal(patches[0, 1], image[0, 0:2, 2:4].ravel())
  np.testing.assert_array_equal(patches[0, 3], image[0, 2:4, 0:2].ravel())


def test_every_pixel_value_survives_the_unit_range():
  values = np.arange(256, dtype=np.uint8)
  unit = to_unit(values)
  assert unit.min() == -1 and unit.max() == 1
  np.testing.assert_array_equal(to_pixels(unit), values)
  np.testing.assert_array_equal(to_pixels(jnp.array([-7.0, 7.0])), [0, 255])
