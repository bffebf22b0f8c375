from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.models.layers import wide_product


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_a_wide_product_and_its_gradients_are_those_of_the_plain_one(rows):
  rng = np.random.default_rng(0)
  x, matrix = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((*rows, 4), (4, 5)))
  weights = jnp.asarray(rng.normal(size=(*rows, 5)), jnp.float32)

  def both(product):
    return jax.value_and_grad(lambda x, m: (product(x, m) * weights).sum(), (0, 1))(x, matrix)

  found, expected = both(wide_product), both(jnp.matmul)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_a_wide_product_is_summed_in_float32_and_multiplied_in_its_own_type():
  x, matrix = jnp.ones((2, 4), jnp.bfloat16), jnp.full((4, 3), 1 / 3, jnp.float32)
  out = wide_product(x, matrix)
  assert out.dtype == jnp.float32 and float(out[0, 0]) == 4 * float(jnp.bfloat16(1 / 3))
  program = str(jax.make_jaxpr(jax.grad(lambda x, m: wide_product(x, m).sum(), (0, 1)))(x, matrix))
  products = [line for line in program.splitlines() if "dot_general" in line]
  assert len(products) == 3 and not any("f32[" in line.split("=")[-1] for line in products)
  of_x, of_matrix = jax.grad(lambda x, m: wide_product(x, m).sum(), (0, 1))(x, matrix)
  assert of_x.dtype == jnp.bfloat16 and of_matrix.dtype == jnp.float32
