from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.batch import INPUT, TARGET
from clipflow_jax.errors import UserError
from clipflow_jax.flow import path
from clipflow_jax.objectives import flow
from tests import tiny

BATCH = tiny.batch()
KEYS = jax.random.split(jax.random.key(0), 2)


def targets_first(batch) -> np.ndarray:
  """i32[B,N]: the order in which pictures are noised, those that are drawn first."""
  return np.stack([sorted(range(len(row)), key=lambda i, row=row: not row[i] & TARGET) for row in batch.image_roles])


FEATURES = np.random.default_rng(0).normal(size=(2, tiny.PICTURES, tiny.TOKENS, tiny.CHANNELS))
ORDER = targets_first(BATCH)
TARGETS = np.take_along_axis((BATCH.image_roles & TARGET) > 0, ORDER, axis=1)  # as they are noised
CLEAN = np.take_along_axis(FEATURES, ORDER[..., None, None], axis=1)


@dataclasses.dataclass
class Oracle:
  """Stands for the model: knows the clean features, errs by `error` f[B,M,1,1], and remembers what it was asked."""

  levels: int
  error: np.ndarray | float = 0.0
  early_error: float | None = None
  prediction: str = "v"
  alpha: float = 3.0

  def conditioning(self, context, place, levels):
    assert levels == self.levels
    return context, jax.tree.map(lambda a: np.repeat(a, levels, axis=1), place)

  def predict(self, x_t, t, given):
    self.x_t, self.t, (self.context, self.place) = np.asarray(x_t), np.asarray(t), given
    x = jnp.repeat(CLEAN, self.levels, axis=1)[:, : t.shape[1]]
    truth = (x_t - x) / t[..., None, None]
    if self.prediction == "x":
      truth = path.velocity(x, x_t, t)
    return truth + self.error, None if self.early_error is None else truth + self.early_error


def losses(oracle: Oracle, keys=KEYS, early: float = 0.0, targets: int = 0) -> dict[str, float]:
  settings = dict(levels=oracle.levels, early=early, targets=targets)
  sums = flow.losses(oracle, BATCH, FEATURES, "context", keys, **settings)
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
    np.testing.assert_array_equal(place[..., 0], np.take_along_axis(getattr(BATCH, f"image_{name}"), ORDER, axis=1))
    np.testing.assert_array_equal(place[..., 0], place[..., 1])
  assert len(np.unique(oracle.t)) == oracle.t.size and len(np.unique(oracle.x_t)) > 0.99 * oracle.x_t.size


def test_the_noise_of_a_row_depends_on_its_key_alone():
  here, there = Oracle(levels=2), Oracle(levels=2)
  losses(here)
  losses(there, keys=KEYS[::-1])
  np.testing.assert_array_equal(here.t, there.t[::-1])
  clean = np.repeat(CLEAN, 2, axis=1)

  def noise(oracle: Oracle) -> np.ndarray:
    t = oracle.t[..., None, None]
    return (oracle.x_t - (1 - t) * clean) / t

  np.testing.assert_allclose(noise(here), noise(there)[::-1], atol=1e-3)


@pytest.mark.parametrize(("targets", "count"), [(1, 2), (2, 3)])
def test_only_the_first_targets_of_a_row_are_noised_where_that_is_asked_for(targets: int, count: int):
  errors = np.random.default_rng(1).normal(size=(2, 2 * tiny.PICTURES, 1, 1))
  oracle = Oracle(levels=2, error=errors[:, : 2 * targets])
  sums = losses(oracle, targets=targets)
  assert oracle.x_t.shape == (2, 2 * targets, tiny.TOKENS, tiny.CHANNELS)
  assert (ORDER[0, :2] == [1, 2]).all() and BATCH.image_roles[0, 0] == INPUT  # what is only read costs nothing
  np.testing.assert_array_equal(
    oracle.place.order[:, ::2], np.take_along_axis(BATCH.image_order, ORDER, 1)[:, :targets]
  )
  squared = errors[..., 0, 0].reshape(2, tiny.PICTURES, 2)[:, :targets] ** 2
  assert sums["flow"] == pytest.approx(squared.mean(axis=2)[TARGETS[:, :targets]].sum(), rel=1e-4)
  assert flow.count(BATCH, targets) == TARGETS[:, :targets].sum() == count


def test_times_follow_the_models_shift():
  plain, shifted = Oracle(levels=2, alpha=1.0), Oracle(levels=2, alpha=5.0)
  losses(plain)
  losses(shifted)
  np.testing.assert_allclose(shifted.t, path.shift(plain.t, 5.0), rtol=1e-5)


class Asked(Oracle):
  """An oracle that is a separate drawer: it is given a condition of ones."""

  def conditioning(self, context, place, levels):
    return jnp.ones((*place.order.shape[:1], place.order.shape[1] * levels, 2, 1))

  def predict(self, x_t, t, given):
    self.given, self.x_t, self.t = np.asarray(given), np.asarray(x_t), np.asarray(t)
    return x_t, None


def test_a_separate_drawer_is_told_nothing_of_some_pictures():
  asked = Asked(levels=8)
  settings = dict(levels=8, early=0.0)
  flow.losses(asked, BATCH, FEATURES, "context", KEYS, **settings, drop=0.5)
  assert asked.given.shape == (2, 8 * tiny.PICTURES, 2, 1)
  np.testing.assert_array_equal(asked.given[:, :, 0], asked.given[:, :, 1])  # all of a condition, or nothing
  assert 0.2 < asked.given.mean() < 0.8
  dropped = asked.given[:, :, 0, 0].ravel()  # by a key that is neither the noise's nor the times'
  t = asked.t[..., None, None]
  noise = (asked.x_t - (1 - t) * np.repeat(CLEAN, 8, axis=1)) / t
  for other in (asked.t, noise.reshape(2, -1)[:, : asked.t.shape[1]]):
    assert abs(np.corrcoef(dropped, other.ravel())[0, 1]) < 0.4
  flow.losses(asked, BATCH, FEATURES, "context", KEYS, **settings)
  assert asked.given.all()
  with pytest.raises(UserError, match=r"drop_condition is of a separate drawer; .* use data.drop_text"):
    flow.losses(Oracle(levels=1), BATCH, FEATURES, "context", KEYS, levels=1, early=0.0, drop=0.1)
