from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from clipflow_jax.errors import UserError
from clipflow_jax.models.dit import DiT
from clipflow_jax.models.encoder import Encoder
from clipflow_jax.models.remat import KEPT, POLICIES, remat
from clipflow_jax.models.transformer import Stack

X = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)


def stack(policy: str, unroll: bool = False) -> nn.Module:
  return Stack(2, dict(mlp=24, heads=2, kv_heads=1, head_dim=8), remat=policy, unroll=unroll, keep_kv=False)


def encoder(policy: str) -> nn.Module:
  return Encoder(2, heads=2, mlp=24, remat=policy)


class Drawer(nn.Module):
  """A separate drawer of x f[B,4,D] for a condition of the rest."""

  policy: str

  @nn.compact
  def __call__(self, x):
    dit = DiT(grid=2, channels=16, width=16, layers=2, heads=2, mlp=24, remat=self.policy)
    return dit(x[:, :4], jnp.ones(len(x)), dit.remember(x[:, 4:])), None


@pytest.mark.parametrize("make", [stack, encoder, Drawer])
def test_every_policy_has_the_same_loss_and_gradients(make: Any):
  positions = jnp.broadcast_to(jnp.arange(6)[:, None], (2, 6, 3))
  rest = (positions, None) if make is stack else ()
  params = make("none").init(jax.random.key(0), X, *rest)

  def loss(params, policy: str):
    return jnp.square(make(policy).apply(params, X, *rest)[0]).sum()

  @jax.jit
  def everything(params):
    return {policy: jax.value_and_grad(loss)(params, policy) for policy in POLICIES}

  found = everything(params)
  for policy in POLICIES:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found["none"], found[policy])

  def program(policy: str) -> str:
    return str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, policy))

  assert "remat" not in program("none") and all("remat" in program(p) for p in POLICIES if p != "none")
  assert "pinned_host" in program("offload") or "Host" in program("offload")
  assert all(f"name={name}" in program("none") for name in KEPT)
  # Of more that is kept less is computed again.
  products = {policy: program(policy).count("dot_general") for policy in POLICIES}
  assert products["full"] > products["minimal"] > products["dots"] > products["none"]


@pytest.mark.parametrize("unroll", [True, False])
def test_what_is_done_twice_is_kept_apart_where_no_loop_does_it(unroll: bool):
  module, positions = stack("full", unroll), jnp.zeros((2, 6, 3), jnp.int32)
  params = module.init(jax.random.key(0), X, positions, None)
  loss = lambda params: module.apply(params, X, positions, None)[0].sum()  # noqa: E731
  assert f"prevent_cse={unroll}" in str(jax.make_jaxpr(jax.grad(loss))(params))


@pytest.mark.parametrize(("policy", "runs"), [("minimal", 1), ("full", 2)])
def test_what_is_kept_of_flash_spares_its_second_run(policy: str, runs: int):
  block = dict(mlp=24, heads=2, kv_heads=1, head_dim=8, kernel="flash", dtype=jnp.bfloat16)
  module, positions = Stack(2, block, remat=policy), jnp.zeros((2, 6, 3), jnp.int32)
  params = jax.eval_shape(lambda: module.init(jax.random.key(0), X, positions, None))
  loss = lambda params: module.apply(params, X, positions, None)[0].astype(jnp.float32).sum()  # noqa: E731

  def used(jaxpr: Any) -> int:
    """How often the kernel runs for something that is read: what is not, the compiler leaves out."""
    read = {id(value) for equation in jaxpr.eqns for value in equation.invars} | set(map(id, jaxpr.outvars))
    kernels = [equation for equation in jaxpr.eqns if equation.params.get("name") == "flash_out"]
    inner = [getattr(part, "jaxpr", part) for equation in jaxpr.eqns for part in equation.params.values()]
    own = sum(any(id(value) in read for value in equation.outvars) for equation in kernels)
    return own + sum(used(part) for part in inner if hasattr(part, "eqns"))

  assert used(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) == runs


def test_an_unknown_policy_is_an_error():
  with pytest.raises(UserError, match="remat 'some' is unknown; choose one of none, dots, minimal, offload, full"):
    remat(lambda: None, "some", False)
