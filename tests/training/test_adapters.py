"""Low-rank adapters through qwix, on whole and on quantised matrices."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.parallel import sharding
from clipflow_jax.training import adapters, state, step
from clipflow_jax.training.adapters import Adapters
from clipflow_jax.training.optimizer import Optimizer
from tests import tiny

pytest.importorskip("qwix")

WHERE = r"language_model/(text|flow|flow_early)/layers/(attention/(query|key|value|out)|mlp/(gate|up|down))"
OURS = Adapters(rank=4, alpha=8.0, where=WHERE)
OBJECTIVE = Objective(weights=dict(language=1.0, flow=1.0))
STEPS = 6
# A whole step is compiled for each: flattened products in scanned and rematerialised layers, in two experts.
MODEL = tiny.model(transformer=dict(tiny.FIELDS["transformer"], remat="full"))


def with_base(base: str) -> Adapters:
  return Adapters(OURS.rank, OURS.alpha, WHERE, base, tile=8)


def begin(ours: Adapters, tx) -> state.TrainState:
  params = ours.fit(tiny.params(), seed=0)
  return state.create(params, scales(params), tx, ema=False)


def scales(params) -> dict[str, float]:
  return {path: float(path.endswith((adapters.A, adapters.B))) for path in state.flatten(params)}


@functools.cache
def trained(base: str) -> tuple[state.TrainState, state.TrainState, list[float]]:
  """(the state before, after STEPS steps of one batch, the loss before each and after the last)."""
  ours = with_base(base)
  tx = Optimizer(10**6, "adamw", learning_rate=0.02, warmup=0).make(scales(ours.fit(tiny.params(), 0)))
  compiled = jax.jit(step.make(ours.around(MODEL), OBJECTIVE, tx, seed=3))
  first, losses = begin(ours, tx), []
  now = first
  for _ in range(STEPS + 1):
    before = now
    now, metrics = compiled(now, tiny.batch())
    losses.append(float(metrics["loss"]))
  return first, before, losses


@functools.cache
def plain_loss():
  """(parameters, step) -> the loss that a step of a plain model would tell."""

  def loss(params, number):
    batch = jax.tree.map(jnp.asarray, tiny.batch())
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), number), 2)
    sums = MODEL.apply({"params": params}, batch, keys, method=OBJECTIVE.sums)
    return OBJECTIVE.loss(sums, OBJECTIVE.counts(batch))[0]

  return jax.jit(loss)


@pytest.mark.parametrize("base", ["", "nf4"])
def test_every_matrix_that_is_named_has_adapters_that_learn_and_the_rest_stays_bit_for_bit(base: str):
  first, last, losses = trained(base)
  kernels = {path for path in state.flatten(tiny.params()) if re.fullmatch(f"{WHERE}/kernel", path)}
  assert len(kernels) == 3 * 7
  learned = state.flatten(last.trained)
  assert learned.keys() == {path + end for path in kernels for end in (adapters.A, adapters.B)}
  for path, before in state.flatten(first.trained).items():
    assert np.abs(np.asarray(learned[path] - before)).max() > 1e-3, path  # what no product reads has no gradient
  before, after = state.flatten(first.frozen), state.flatten(last.frozen)
  assert before.keys() == after.keys()
  for path, leaf in before.items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(after[path]), err_msg=path)
  merged = with_base(base).merged(last.params)
  assert float(plain_loss()(merged, 0)) < 0.9 * losses[0]  # the same noise: a step's own differs from step to step


@pytest.mark.parametrize("base", ["", "nf4"])
def test_merged_weights_give_what_the_adapters_gave(base: str):
  first, last, losses = trained(base)
  ours = with_base(base)
  merged = ours.merged(last.params)
  assert state.flatten(merged).keys() == state.flatten(tiny.params()).keys()
  assert float(plain_loss()(merged, STEPS)) == pytest.approx(losses[-1], rel=1e-5)
  assert float(plain_loss()(ours.merged(first.params), 0)) == pytest.approx(losses[0], rel=1e-5)


def test_what_is_learned_begins_at_random_within_its_bound_each_matrix_by_the_seed_as_its_own():
  ours = Adapters(4, 8.0, "language_model/text/layers/mlp/(gate|up)")
  one, other = (state.flatten(ours.fit(tiny.params(), seed)) for seed in (0, 1))
  gate, up = (f"language_model/text/layers/mlp/{name}/kernel{adapters.A}" for name in ("gate", "up"))
  drawn = [one[gate], one[up], other[gate]]
  bound = one[gate].shape[-2] ** -0.5
  assert all(0.9 * bound < np.abs(a).max() <= bound for a in drawn)
  assert not any(np.allclose(a, b) for a, b in itertools.combinations(drawn, 2))


def test_what_was_learned_is_added_before_a_matrix_is_rounded():
  rng, path = np.random.default_rng(0), "up/kernel"
  matrix = jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16)
  a, b = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((8, 2), (2, 8)))
  found = Adapters(2, 1.0).merged(state.nest({path: matrix, path + adapters.A: a, path + adapters.B: b}))
  wanted = np.asarray(matrix, np.float32) + 0.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
  assert found["up"]["kernel"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(found["up"]["kernel"], wanted.astype(np.float32).astype(jnp.bfloat16))


def test_adapters_begin_as_nothing():
  merged = OURS.merged(OURS.fit(tiny.params(), seed=1))
  jax.tree.map(np.testing.assert_array_equal, merged, tiny.params())
  assert Adapters().fit(tiny.params(), 0) is tiny.params() and Adapters().around(MODEL) is MODEL


@pytest.mark.parametrize(("base", "bits", "error"), [("int8", 8, 0.006), ("int4", 4, 0.1), ("nf4", 4, 0.12)])
def test_a_quantised_matrix_is_held_in_so_many_bits_and_a_scale_for_each_tile(base: str, bits: int, error: float):
  path = "language_model/text/layers/attention/query/kernel"
  ours = Adapters(4, 8.0, "language_model/text/layers/attention/query", base, tile=8)
  flat = state.flatten(ours.fit(tiny.params(), seed=0))
  whole = np.asarray(state.flatten(tiny.params())[path])
  codes, scale = flat[path + "/codes"], flat[path + "/scale"]
  assert path not in flat and codes.nbytes == whole.size * bits // 8 == whole.nbytes * bits // 32
  assert scale.shape == (2, 32 // 8, 32) and scale.dtype == jnp.float32
  back = np.asarray(state.flatten(ours.merged(state.nest(flat)))[path])
  assert 0 < np.abs(back - whole).max() <= error * np.abs(whole).max()


def test_what_is_made_of_a_matrix_lies_where_the_matrix_does():
  path = "language_model/text/layers/mlp/down/kernel"
  assert sharding.parameter_axes(path + "_lora_a", 3) == ("layers", "mlp", None)
  assert sharding.parameter_axes(path + "_lora_b", 3) == ("layers", None, "embed")
  assert sharding.parameter_axes(path + "/codes", 3) == ("layers", "mlp", "embed")
  assert sharding.parameter_axes(path + "/scale", 3) == ("layers", None, "embed")


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (dict(rank=4, where="nowhere"), "names no matrix"),
    (dict(rank=4, where="clip_model/.*/(query|key|value)"), "names clip_model/.*: only the transformer and what draws"),
    (dict(rank=16, where=WHERE), "lower it"),  # as many as a key has outputs
    (dict(rank=4, alpha=0.0), "must be positive"),
    (dict(rank=4, where=WHERE, base="nf4", tile=7), "must divide"),
    (dict(rank=4, base="int3"), "choose one of int8, int4, nf4"),
  ],
)
def test_what_cannot_be_adapted_is_refused(fields: dict, said: str):
  with pytest.raises(UserError, match=said):
    Adapters(**fields).fit(tiny.params(), 0)
