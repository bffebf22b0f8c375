from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.models.layers import Embed, Linear


def test_of_a_word_that_stands_often_no_gradient_is_lost_in_bfloat16():
  ids = jnp.zeros((4, 1024), jnp.int32).at[:, -1].set(2)
  embed = Embed(3, 8, dtype=jnp.bfloat16)
  table = embed.init(jax.random.key(0), ids)
  weights = jax.random.uniform(jax.random.key(1), (*ids.shape, 8), jnp.bfloat16)

  def total(table):
    out = embed.apply(table, ids)
    assert out.dtype == jnp.bfloat16
    return jnp.vdot(out, weights, preferred_element_type=jnp.float32)

  found = jax.jit(jax.grad(total))(table)["params"]["embedding"]
  expected = np.zeros((3, 8))
  np.add.at(expected, ids, np.asarray(weights, np.float64))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gradient_of_a_bias_is_added_up_in_float32():
  linear, x = Linear(8, True, dtype=jnp.bfloat16), jnp.zeros((4, 16, 8), jnp.bfloat16)
  params = linear.init(jax.random.key(0), x)
  gradient = jax.make_jaxpr(jax.grad(lambda params: linear.apply(params, x).astype(jnp.float32).sum()))(params)
  sums = [equation for equation in gradient.eqns if equation.primitive.name == "reduce_sum"]
  assert sums and all(equation.invars[0].aval.dtype == jnp.float32 for equation in sums)
