from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.training import state
from clipflow_jax.training.adapters import Adapters
from clipflow_jax.training.optimizer import Optimizer, muon_dimensions
from tests import tiny

PATHS = ("tower/up/kernel", "tower/stack/kernel", "flow_head/head/kernel", "words/embedding", "tower/up/bias")
SHAPES = ((6, 4), (2, 4, 6), (6, 4), (6, 4), (4,))


def tree(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES]
  return state.nest(dict(zip(PATHS, arrays, strict=True)))


PARAMS, GRADIENTS = tree(0), tree(1)
ONES = dict.fromkeys(PATHS, 1.0)


def updates(optimizer: Optimizer, gradients: list, scales: dict[str, float] = ONES) -> list[dict]:
  """The flat updates of successive gradients, the parameters left where they are."""
  tx = optimizer.make(scales)
  now, found = tx.init(PARAMS), []
  for gradient in gradients:
    update, now = tx.update(gradient, now, PARAMS)
    found.append(state.flatten(update))
  return found


def constant(name: str, **fields) -> Optimizer:
  """At its peak from the first step on, for long."""
  return Optimizer(10**9, name, learning_rate=0.1, adam_learning_rate=0.01, warmup=0, **fields)


# What goes to whom.


def test_muon_makes_a_matrix_update_orthogonal_and_leaves_the_rest_to_adam():
  (update,) = updates(constant("muon"), [GRADIENTS])
  for path in ("tower/up/kernel", "tower/stack/kernel"):
    singular = np.linalg.svd(np.asarray(update[path]), compute_uv=False)
    assert singular.max() / singular.min() < 2  # Newton-Schulz is rough: all of them lie in 0.7..1.2 of one size
  first = (
    1 + 0.9 / 1.9
  )  # Adam's first step is the gradient's sign; optax's Muon looks ahead as Nesterov does (b1 = 0.9)
  for path in ("flow_head/head/kernel", "words/embedding", "tower/up/bias"):
    gradient = state.flatten(GRADIENTS)[path]
    np.testing.assert_allclose(update[path], -0.01 * first * np.sign(gradient), rtol=1e-3)


def test_the_layers_of_a_stack_are_matrices_of_their_own():
  (both,) = updates(constant("muon"), [GRADIENTS])
  stack = state.flatten(GRADIENTS)["tower/stack/kernel"]
  only_first = state.nest(state.flatten(GRADIENTS) | {"tower/stack/kernel": stack.at[1].set(0.0)})
  (first,) = updates(constant("muon", clip=1e9), [only_first])
  np.testing.assert_allclose(first["tower/stack/kernel"][0], both["tower/stack/kernel"][0], rtol=1e-4, atol=1e-5)
  assert np.abs(first["tower/stack/kernel"][1]).max() < 1e-6


def test_muon_takes_every_matrix_of_the_model_but_heads_and_embeddings():
  flat = state.flatten(muon_dimensions(tiny.params()))
  muons = {path for path, dimensions in flat.items() if dimensions is not None}
  matrices = {path for path in flat if path.endswith("/kernel")}
  assert muons < matrices
  assert {path.split("/", 1)[1] for path in matrices - muons} == {
    "head/kernel",
    "early_head/kernel",
    "pixel_readout/head/kernel",
  }
  for path in muons:
    leaf = state.flatten(tiny.params())[path]
    assert (flat[path].reduction_axis, flat[path].output_axis) == (leaf.ndim - 2, leaf.ndim - 1)


def test_adamw_decays_matrices_alone():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  (update,) = updates(constant("adamw", weight_decay=0.5), [zeros])
  params = state.flatten(PARAMS)
  for path in PATHS:
    decay = 0.0 if params[path].ndim == 1 else 0.1 * 0.5
    np.testing.assert_allclose(update[path], -decay * params[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gains_biases_and_positions_of_stacked_layers_are_not_decayed(name):
  params = Adapters(2, 8.0, "language_model/text/layers/mlp/up").fit(tiny.params(), 0)
  flat = state.flatten(params)
  tx = constant(name, weight_decay=0.5).make(dict.fromkeys(flat, 1.0))
  update, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  decayed = {path for path, leaf in state.flatten(update).items() if np.abs(leaf).max() > 0}
  assert {path.rsplit("/", 1)[1] for path in flat if flat[path].ndim > 1} >= {"scale", "bias", "row_positions"}
  matrices = {path for path in flat if path.endswith(("kernel", "_lora_a", "embedding"))}  # _lora_b begins as zeros
  muons = {path for path, of in state.flatten(muon_dimensions(params)).items() if of is not None}
  assert decayed == (matrices if name == "adamw" else muons)


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (dict(name="sgd"), "'sgd' is unknown; choose muon or adamw"),
    (dict(learning_rate=-1.0), "optimizer.learning_rate is -1.0: give a number from 0"),
    (dict(weight_decay=float("nan")), "optimizer.weight_decay is nan: give a number from 0"),
    (dict(b2=1.0), "optimizer.b2 is 1.0: give a number from 0 to less than 1"),
    (dict(clip=0.0), "optimizer.clip is 0.0: give the largest norm of a gradient"),
    (dict(decay=0.0), "optimizer.decay is 0.0: give a share of the steps above 0"),
    (dict(decay=1.1), "optimizer.decay is 1.1: give a share of the steps above 0, up to 1"),
    (dict(patience=0), "optimizer.patience is 0: give 1 step or more"),
  ],
)
def test_a_value_that_makes_no_sense_is_refused(fields, said):
  with pytest.raises(UserError, match=said):
    Optimizer(10, **fields)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_moments_decay_by_their_own_rates(name):
  """Adam's second step (Kingma & Ba 2015), which optax's Muon takes as Nesterov does."""
  b1, b2, path = 0.7, 0.8, "tower/up/bias"
  _, update = updates(constant(name, b1=b1, b2=b2, clip=math.inf), [GRADIENTS, PARAMS])
  one, two = (np.asarray(state.flatten(tree)[path], np.float64) for tree in (GRADIENTS, PARAMS))
  mean, square = (1 - b1) * (b1 * one + two), (1 - b2) * (b2 * one**2 + two**2)
  unbiased = mean / (1 - b1**2)
  if name == "muon":
    unbiased = b1 * mean / (1 - b1**3) + (1 - b1) * two / (1 - b1**2)
  rate = 0.01 if name == "muon" else 0.1
  np.testing.assert_allclose(update[path], -rate * unbiased / np.sqrt(square / (1 - b2**2)), rtol=1e-4)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_rate_is_warmed_up(name):
  first, second = updates(Optimizer(100, name, warmup=10), [GRADIENTS] * 2)
  assert not any(leaf.any() for leaf in first.values()) and all(leaf.all() for leaf in second.values())


# How far.


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_multipliers_scale_each_parameters_update(name):
  scales = {path: 0.25 * (i + 1) for i, path in enumerate(PATHS)}
  (plain,), (scaled,) = (updates(constant(name, weight_decay=0.1), [GRADIENTS], s) for s in (ONES, scales))
  for path in PATHS:
    np.testing.assert_allclose(scaled[path], scales[path] * plain[path], rtol=1e-5, err_msg=path)


def test_what_is_frozen_is_no_part_of_the_optimizer():
  scales = {**ONES, "tower/up/kernel": 0.0}
  trained, frozen = state.split(PARAMS, scales)
  assert set(state.flatten(frozen)) == {"tower/up/kernel"}
  tx = Optimizer(10).make(scales)
  update, _ = tx.update(trained, tx.init(trained), trained)
  assert set(state.flatten(update)) == set(PATHS) - {"tower/up/kernel"}


def test_the_gradient_is_clipped_to_its_global_norm():
  huge = jax.tree.map(lambda leaf: 1e4 * leaf, GRADIENTS)
  unit = jax.tree.map(lambda leaf: leaf / optax.tree.norm(GRADIENTS), GRADIENTS)
  calm, clipped = (updates(constant("adamw", clip=1.0), [unit, second])[1] for second in (unit, huge))
  for path in PATHS:
    np.testing.assert_allclose(clipped[path], calm[path], rtol=1e-4, err_msg=path)


def test_the_learning_rate_rises_from_zero_to_its_peak_and_falls_as_a_cosine():
  optimizer = Optimizer(100, warmup=10, final=0.1)
  rates = [float(optimizer.schedule(2.0)(step)) for step in range(101)]
  assert rates[0] == 0.0 and rates[10] == max(rates) == pytest.approx(2.0)
  assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 / 2), rel=1e-3)
  assert rates[100] == pytest.approx(0.2)
  assert rates[5] == pytest.approx(1.0)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_warmup_longer_than_the_run_takes_half_of_it(steps):
  schedule = Optimizer(steps, warmup=20).schedule(1.0)
  rates = [float(schedule(step)) for step in range(steps + 1)]
  assert all(0 <= rate <= 1 for rate in rates)
  assert rates[steps // 2] == pytest.approx(1.0)


def test_a_rate_that_stays_falls_by_the_same_cosine_in_the_last_share_of_the_steps():
  rates = Optimizer(100, learning_rate=2.0, warmup=10, final=0.1, decay=0.2).rates()
  assert rates.shape == (100,) and rates[0] == 0.0 and rates[5] == pytest.approx(1.0)
  assert (rates[10:81] == np.float32(2.0)).all() and rates[81] < 2.0
  fall = Optimizer(20, learning_rate=2.0, warmup=0, final=0.1).rates()
  np.testing.assert_allclose(rates[80:], fall, rtol=1e-5)


def test_a_rate_that_falls_from_the_warmup_on_is_that_of_optax():
  rates = Optimizer(100, learning_rate=0.3, warmup=10, final=0.1).rates()
  theirs = jax.jit(optax.warmup_cosine_decay_schedule(0.0, 0.3, 10, 100, end_value=0.3 * 0.1))
  np.testing.assert_array_equal(rates, theirs(np.arange(100)))
  almost = Optimizer(100, learning_rate=0.3, warmup=10, final=0.1, decay=0.9)  # nothing between warm-up and fall
  np.testing.assert_array_equal(almost.rates(), rates)


def test_a_run_that_is_extended_has_had_the_same_rates_until_it_would_have_fallen():
  short, long = (Optimizer(steps, warmup=10, decay=0.2).rates() for steps in (100, 1000))
  np.testing.assert_array_equal(long[:81], short[:81])
  assert long[799] == long[10] and long[999] == pytest.approx(short[99], abs=1e-3)


@pytest.mark.parametrize("decay", [1e-6, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_however_short_the_run_is_the_rate_ends_its_fall(steps, decay):
  schedule = Optimizer(steps, warmup=20, decay=decay).schedule(1.0)
  assert float(schedule(steps)) == pytest.approx(0.0, abs=1e-6)
  assert max(float(schedule(step)) for step in range(steps)) <= 1.0


# What is not finite.


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])  # the last has no finite norm
def test_a_gradient_that_is_not_finite_is_never_taken_however_often_it_comes(poison):
  tx = constant("adamw", patience=2).make(ONES)
  bad = state.nest(state.flatten(GRADIENTS) | {"tower/up/bias": jnp.full(4, poison)})
  update = jax.jit(tx.update)
  now = tx.init(PARAMS)
  _, fresh = update(GRADIENTS, now, PARAMS)
  for i in range(5):
    change, now = update(bad, now, PARAMS)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(change))
    assert (int(now.notfinite_count), int(now.total_notfinite)) == (i + 1, i + 1)
  _, after = update(GRADIENTS, now, PARAMS)
  assert (int(after.notfinite_count), int(after.total_notfinite)) == (0, 5)
  jax.tree.map(np.testing.assert_array_equal, after.inner_state, fresh.inner_state)  # as if they had not been
