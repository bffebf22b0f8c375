from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.models.layers import Embed


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
