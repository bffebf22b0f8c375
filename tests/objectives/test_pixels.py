from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.flow import path
from clipflow_jax.objectives import pixels

KEYS = jax.random.split(jax.random.key(0), 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
IMAGES[2] = 90  # flat: no edge anywhere
TRUTH = IMAGES / 127.5 - 1
FEATURES = np.zeros((3, 4, 8), np.float32)


@dataclasses.dataclass
class Decoder:
  """Stands for the model: errs by `error`, and remembers what it was asked."""

  error: Any = 0.0
  flow: bool = False

  @property
  def pixel_decoder(self) -> dict[str, Any]:
    return {"flow": self.flow}

  def decode(self, features, noisy=None, t=None):
    self.features, self.noisy, self.t = features, noisy, t
    return jnp.asarray(TRUTH + self.error, jnp.float32)


ALL = np.ones(3, bool)


def losses(decoder: Decoder, *, there=ALL, keys=KEYS, noise: float = 0.0, edges: float = 0.0) -> dict[str, float]:
  sums = pixels.losses(decoder, IMAGES, FEATURES, there, keys, noise=noise, edges=edges)
  return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("flow", [False, True])
def test_the_truth_has_no_loss(flow: bool):
  sums = losses(Decoder(flow=flow), noise=0.5, edges=10.0)
  assert sums["pixels"] == pytest.approx(0, abs=1e-6)
  assert sums["pixels_psnr"] > 3 * 60


def test_without_edges_the_deterministic_loss_is_the_absolute_error():
  error = np.random.default_rng(1).normal(0, 0.1, IMAGES.shape)
  sums = losses(Decoder(error=error))
  assert sums["pixels"] == pytest.approx(np.abs(error).mean(axis=(1, 2, 3)).sum(), rel=1e-4)


def test_pictures_that_are_not_there_add_nothing():
  alone, both = (
    losses(Decoder(error=0.1), there=np.array(there)) for there in ([False, True, False], [True, True, False])
  )
  assert both == pytest.approx({name: 2 * value for name, value in alone.items()}, rel=1e-2)
  assert alone["pixels"] == pytest.approx(0.1, rel=1e-4)


def test_the_flows_loss_is_the_squared_error_of_the_velocity():
  decoder = Decoder(error=0.1, flow=True)
  sums = losses(decoder)
  expected = (0.1 / np.maximum(decoder.t, path.MIN_T)) ** 2
  assert sums["pixels"] == pytest.approx(expected.sum(), rel=1e-4)
  noise = (decoder.noisy - (1 - decoder.t)[:, None, None, None] * TRUTH) / decoder.t[:, None, None, None]
  assert abs(np.std(noise) - 1) < 0.05


def test_psnr_is_that_of_the_picture_that_would_be_shown():
  sums = losses(Decoder(error=0.02))
  shown = np.clip(TRUTH + 0.02, -1, 1)
  expected = 10 * np.log10(1 / (((shown - TRUTH) / 2) ** 2).mean(axis=(1, 2, 3)))
  assert sums["pixels_psnr"] == pytest.approx(expected.sum(), rel=1e-3)


def test_features_are_noised_by_up_to_the_given_deviation_each_row_by_its_own_key():
  here, there = Decoder(), Decoder()
  losses(here, noise=0.5)
  losses(there, noise=0.5, keys=KEYS[::-1])
  np.testing.assert_array_equal(here.features, there.features[::-1])
  deviations = np.asarray(here.features).std(axis=(1, 2))
  assert (deviations > 0).all() and (deviations < 0.7).all() and len(np.unique(deviations)) == 3
  losses(here, noise=0.0)
  np.testing.assert_array_equal(here.features, FEATURES)


def test_edges_weigh_more_and_flat_ground_one():
  image = np.full((1, 16, 16, 3), 0.5, np.float32)
  image[:, 6:9, 6:9, 0] = 0.65  # faint, and in one channel
  weights = np.asarray(pixels.edge_weights(image, 10.0))
  assert weights.shape == (1, 16, 16, 1)
  assert weights[0, 7, 7] == 11 and weights[0, 4, 4] == 11 and weights[0, 3, 3] == 1
  assert weights[0, 0, 0] == 1 and weights[0, 15, 7] == 1


def test_edges_shift_the_weight_and_keep_its_mean():
  for there in ([True, True, True], [False, False, True]):  # of each picture, also of one without
    sums = losses(Decoder(error=0.1), edges=10.0, there=np.array(there))
    assert sums["pixels"] == pytest.approx(0.1 * sum(there), rel=1e-4)
