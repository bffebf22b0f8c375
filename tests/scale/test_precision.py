"""What is computed in bfloat16, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from clipflow_jax.errors import UserError
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import optimizer, state
from configs import presets
from tests import tiny

OBJECTIVE = Objective({"language": 1.0, "flow": 1.0, "pixels": 1.0}, z_loss=1e-4, vocabulary_chunk=8)
SENSITIVE = {"exp", "log", "rsqrt", "cumsum", "argmax", "reduce_max"}  # of softmax, norms and losses


def sums(params: Any, dtype: str) -> dict[str, jax.Array]:
  keys = jax.random.split(jax.random.key(0), 2)
  return tiny.model(dtype=dtype).apply({"params": params}, tiny.batch(), keys, method=OBJECTIVE.sums)


def equations(jaxpr: Any) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from equations(inner)


def test_products_are_in_bfloat16_and_softmax_norms_and_losses_in_float32():
  jaxpr = jax.make_jaxpr(lambda params: sums(params, "bfloat16"))(tiny.params()).jaxpr
  products, wide = 0, []
  for equation in equations(jaxpr):
    types = {var.aval.dtype for var in equation.invars if jnp.issubdtype(var.aval.dtype, jnp.floating)}
    if equation.primitive.name == "dot_general":
      products += 1
      wide += [equation] if jnp.dtype("bfloat16") not in types else []
    elif equation.primitive.name in SENSITIVE:
      assert types <= {jnp.dtype("float32")}, equation
  # The decoder's pixels and the tower's embedding, which are losses' own inputs.
  assert products > 30 and len(wide) <= 2, wide


def test_losses_are_float32_and_near_those_of_float32():
  run = jax.jit(sums, static_argnums=1)
  exact, rounded = jax.device_get((run(tiny.params(), "float32"), run(tiny.params(), "bfloat16")))
  assert exact.keys() == rounded.keys()
  assert {value.dtype for name, value in rounded.items() if not name.endswith("accuracy")} == {jnp.dtype("float32")}
  for name in ("language", "flow", "pixels"):
    assert rounded[name] == pytest.approx(exact[name], rel=0.05), name
  assert any(float(rounded[name]) != float(exact[name]) for name in ("language", "flow", "pixels"))


def test_frozen_matrices_are_kept_in_bfloat16_where_asked_and_nothing_else_is():
  scales = state.multipliers(tiny.params(), presets.trains(flow=1.0))
  tx = optimizer.Optimizer(steps=5, name="adamw").make(scales)
  now = jax.eval_shape(lambda p: state.create(p, scales, tx, ema=True, frozen_dtype="bfloat16"), tiny.params())
  for path, leaf in state.flatten(now.frozen).items():
    assert (leaf.dtype == jnp.bfloat16) == path.endswith(("kernel", "embedding")), path
  assert state.flatten(now.frozen)["statistics/mean"].dtype == np.float32
  for leaf in jax.tree.leaves((now.trained, now.ema, now.opt_state)):
    assert leaf.dtype != jnp.bfloat16


def test_other_types_are_refused():
  with pytest.raises(UserError, match="model.dtype 'bf16' is unknown; choose float32 or bfloat16"):
    jax.eval_shape(lambda: sums(tiny.params(), "bf16"))
  with pytest.raises(UserError, match="frozen_dtype 'int8' is unknown"):
    state.create({}, {}, optimizer.Optimizer(steps=1).make({}), ema=False, frozen_dtype="int8")
