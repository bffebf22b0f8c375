from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.batch import TARGET
from clipflow_jax.flow import path
from clipflow_jax.objectives import flow
from tests import tiny

BATCH = tiny.batch()
FEATURES = np.random.default_rng(0).normal(size=(2, tiny.PICTURES, tiny.TOKENS, tiny.CHANNELS))
KEYS = jax.random.split(jax.random.key(0), 2)
TARGETS = (BATCH.image_roles & TARGET) > 0


@dataclasses.dataclass
class Oracle:
  """Stands for the model: knows the clean features, errs by `error` f[B,M,1,1], and remembers what it was asked."""

  levels: int
  error: np.ndarray | float = 0.0
  early_error: float | None = None
  prediction: str = "v"
  alpha: float = 3.0
  features: np.ndarray = dataclasses.field(default_factory=lambda: FEATURES)

  def predict(self, x_t, t, context, place):
    self.x_t, self.t, self.context, self.place = (np.asarray(x_t), np.asarray(t), context, place)
    x = jnp.repeat(self.features, self.levels, axis=1)
    truth = (x_t - x) / t[..., None, None]
    if self.prediction == "x":
      truth = path.velocity(x, x_t, t)
    return truth + self.error, None if self.early_error is None else truth + self.early_error


def losses(oracle: Oracle, keys=KEYS, early: float = 0.0, batch=BATCH) -> dict[str, float]:
  sums = flow.losses(oracle, batch, oracle.features, "context", keys, levels=oracle.levels, early=early)
  return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_truth_has_no_loss(prediction: str):
  sums = losses(Oracle(levels=2, prediction=prediction))
  assert sums.keys() == {"flow", "flow_low", "flow_high"}
  assert all(value == pytest.approx(0, abs=1e-5) for value in sums.values())


def test_only_targets_count_and_their_levels_are_averaged():
  errors = np.random.default_rng(1).normal(size=(2, 2 * tiny.PICTURES, 1, 1))
  oracle = Oracle(levels=2, error=errors)
  sums = losses(oracle)
  squared = errors[..., 0, 0].reshape(2, tiny.PICTURES, 2) ** 2
  assert 0 < TARGETS.sum() < TARGETS.size
  assert sums["flow"] == pytest.approx(squared.mean(axis=2)[TARGETS].sum(), rel=1e-4)


def test_the_two_halves_of_the_time_law_add_up():
  errors = np.random.default_rng(1).normal(size=(2, 4 * tiny.PICTURES, 1, 1))
  oracle = Oracle(levels=4, error=errors)
  sums = losses(oracle)
  assert sums["flow_low"] + sums["flow_high"] == pytest.approx(2 * sums["flow"], rel=1e-5)
  low = (oracle.t < path.shift(0.5, oracle.alpha)) & np.repeat(TARGETS, 4, axis=1)
  assert sums["flow_low"] == pytest.approx(2 * (errors[..., 0, 0] ** 2)[low].sum() / 4, rel=1e-4)


def test_the_early_head_adds_its_loss_by_weight():
  sums = losses(Oracle(levels=1, error=1.0, early_error=2.0), early=0.25)
  targets = TARGETS.sum()
  assert sums["flow_early"] == pytest.approx(4.0 * targets, rel=1e-4)
  assert sums["flow"] == pytest.approx((1.0 + 0.25 * 4.0) * targets, rel=1e-4)


def test_every_level_of_a_picture_stands_where_the_picture_is_drawn():
  oracle = Oracle(levels=2)
  losses(oracle)
  assert oracle.context == "context"
  for name in ("segments", "order", "positions"):
    place = np.asarray(getattr(oracle.place, name)).reshape(2, tiny.PICTURES, 2)
    np.testing.assert_array_equal(place[..., 0], getattr(BATCH, f"image_{name}"))
    np.testing.assert_array_equal(place[..., 0], place[..., 1])
  assert len(np.unique(oracle.t)) == oracle.t.size and len(np.unique(oracle.x_t)) > 0.99 * oracle.x_t.size


def test_the_noise_of_a_row_depends_on_its_key_alone():
  here, there = Oracle(levels=2), Oracle(levels=2)
  losses(here)
  losses(there, keys=KEYS[::-1])
  np.testing.assert_array_equal(here.t, there.t[::-1])
  clean = np.repeat(FEATURES, 2, axis=1)

  def noise(oracle: Oracle) -> np.ndarray:
    t = oracle.t[..., None, None]
    return (oracle.x_t - (1 - t) * clean) / t

  np.testing.assert_allclose(noise(here), noise(there)[::-1], atol=1e-3)


def test_times_follow_the_models_shift():
  plain, shifted = Oracle(levels=2, alpha=1.0), Oracle(levels=2, alpha=5.0)
  losses(plain)
  losses(shifted)
  np.testing.assert_allclose(shifted.t, path.shift(plain.t, 5.0), rtol=1e-5)
