from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import state, step
from clipflow_jax.training.state import TrainState
from configs import presets
from tests import tiny

OBJECTIVE = Objective({"language": 1.0, "flow": 0.5, "pixels": 1.0}, levels=2, early=0.5)
SCALES = state.multipliers(tiny.params(), presets.trains(text=1.0, flow=1.0, decoder=1.0))
# Plain descent with momentum: Adam would blow the last bit of a tiny gradient up to a whole step.
TX = optax.apply_if_finite(optax.sgd(0.05, momentum=0.9), 100)
EMA = 0.5


@functools.cache
def batch():
  """Four rows that differ in how many words, targets and pictures they have."""
  rng = np.random.default_rng(0)
  parts = [
    [(3, tiny.READ, 2), (4, tiny.DRAW), (1, tiny.READ_AND_DRAW)],
    [(2, tiny.READ, 10, tiny.DRAW, 4)],
    [(2, tiny.DRAW)],
    [(9, tiny.READ, 3), (5,)],
  ]
  return tiny.pack([[tiny.example(rng, *example) for example in row] for row in parts])


@functools.cache
def run(accumulate: int = 1):
  return jax.jit(step.make(tiny.model(), OBJECTIVE, TX, seed=3, ema=EMA, accumulate=accumulate))


@functools.cache
def begin() -> TrainState:
  return state.create(tiny.params(), SCALES, TX, ema=True)


@functools.cache
def walk(steps: int) -> tuple[TrainState, dict[str, jax.Array]]:
  return run()(begin() if steps == 1 else walk(steps - 1)[0], batch())


def leaves(tree: Any) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def identical(a: Any, b: Any) -> bool:
  a, b = leaves(a), leaves(b)
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key], equal_nan=True) for key in a)


def test_frozen_parameters_never_change_and_the_others_do():
  now, _ = walk(3)
  assert int(now.step) == 3
  assert identical(now.frozen, begin().frozen)
  before, after = leaves(begin().trained), leaves(now.trained)
  assert [key for key in before if np.array_equal(before[key], after[key])] == []
  assert identical(state.merge(now.trained, now.frozen), now.params)


def test_frozen_parameters_are_in_neither_the_optimizer_nor_the_average():
  frozen = {path for path, scale in SCALES.items() if not scale}
  trained = set(SCALES) - frozen
  assert {path.split("/")[0] for path in frozen} == {"clip_model", "statistics"}
  assert set(state.flatten(begin().ema)) == set(state.flatten(begin().trained)) == trained
  assert set(state.flatten(begin().frozen)) == frozen
  momentum = begin().opt_state.inner_state[0].trace
  assert set(state.flatten(momentum)) == trained


def test_the_average_follows_the_parameters_warmed_up():
  average = begin().ema
  for i in range(3):
    decay = min(EMA, (1 + i) / (10 + i))
    trained = walk(i + 1)[0].trained
    average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, trained)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), walk(3)[0].ema, average)
  assert identical(walk(3)[0].averaged, state.merge(walk(3)[0].ema, begin().frozen))


def test_what_is_drawn_at_random_depends_on_the_step_alone():
  again, metrics = run()(begin(), batch())
  assert identical((again, metrics), walk(1))
  _, later = run()(begin().replace(step=jnp.int32(7)), batch())
  assert later["flow"] != metrics["flow"] and later["pixels"] != metrics["pixels"]
  assert later["language"] == metrics["language"]  # nothing in it is random


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulating_parts_equals_the_whole_batch(parts):
  (whole, metrics), (summed, sums) = walk(1), run(parts)(begin(), batch())
  a, b = leaves(whole.trained), leaves(summed.trained)
  assert max(np.abs(a[key] - begun).max() for key, begun in leaves(begin().trained).items()) > 1e-3
  for key in a:
    np.testing.assert_allclose(b[key], a[key], rtol=0, atol=1e-5, err_msg=key)
  assert metrics.keys() == sums.keys()
  for key in metrics:
    np.testing.assert_allclose(sums[key], metrics[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_batch_that_cannot_be_cut_evenly_is_refused():
  with pytest.raises(UserError, match="batch_size 4 cannot be cut into 3 equal parts"):
    jax.eval_shape(step.make(tiny.model(), OBJECTIVE, TX, seed=0, accumulate=3), begin(), batch())


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
  flat = state.flatten(begin().trained)
  path = "decoder/connector/bias"  # not the head's: the gradient of an absolute error is 1 or -1 even where that is NaN
  broken = begin().replace(trained=state.nest(flat | {path: flat[path].at[0].set(np.inf)}))
  after, metrics = run()(broken, batch())
  assert not np.isfinite(metrics["gradient_norm"])
  assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 1)
  assert identical(after.trained, broken.trained) and int(after.step) == 1
  assert identical(after.opt_state.inner_state, broken.opt_state.inner_state)
  healed, metrics = run()(after.replace(trained=begin().trained, ema=begin().ema), batch())
  assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (1, 0)
  assert not identical(healed.trained, begin().trained)


def test_pictures_and_tokens_are_counted_and_not_the_room_for_them():
  metrics = walk(1)[1]
  assert int(metrics["images"]) == np.count_nonzero(batch().image_roles) < batch().image_roles.size
  assert int(metrics["tokens"]) == np.count_nonzero(batch().segments) < batch().segments.size


def test_metrics_are_scalars():
  _, metrics = walk(1)
  assert {value.shape for value in metrics.values()} == {()}
  assert {"loss", "language", "flow", "flow_early", "pixels", "pixels_psnr", "gradient_norm"} <= metrics.keys()
  total = OBJECTIVE.weights
  expected = sum(weight * metrics[name] for name, weight in total.items())
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_without_learning_are_those_of_the_step(accumulate):
  _, metrics = run(accumulate)(begin(), batch())
  losses = jax.jit(step.losses(tiny.model(), OBJECTIVE, seed=3, accumulate=accumulate))
  found = losses(begin().params, batch(), 0)
  assert found.keys() == metrics.keys() - {*step.SEEN, "gradient_norm", "skipped", "skipped_in_a_row"}
  for name, value in found.items():
    np.testing.assert_allclose(value, metrics[name], rtol=1e-5, err_msg=name)
  assert losses(begin().params, batch(), 1)["flow"] != found["flow"]  # other noise
