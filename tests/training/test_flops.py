from __future__ import annotations

import jax
import jax.numpy as jnp

from clipflow_jax.training import flops


def zeros(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


A, B = zeros(3, 5), zeros(5, 7)
PRODUCT = 2 * 3 * 5 * 7


def test_a_matrix_product_is_two_per_multiply_add():
  assert flops.count(jnp.dot, A, B) == PRODUCT
  assert flops.count(lambda a: a + a, A) == 0


def test_batch_axes_multiply():
  assert flops.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), zeros(4, 3, 5), zeros(4, 5, 7)) == 4 * PRODUCT
  assert flops.count(lambda a, b: jnp.einsum("ijk,jkl->il", a, b), zeros(3, 5, 2), zeros(5, 2, 7)) == 2 * PRODUCT


def test_a_gradient_is_two_more_products():
  def loss(a, b):
    return jnp.square(a @ b).sum()

  assert flops.count(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * PRODUCT


def test_a_scan_counts_as_often_as_it_runs():
  def scanned(x, kernels):
    return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

  assert flops.count(scanned, A, zeros(11, 5, 5)) == 11 * 2 * 3 * 5 * 5
  assert flops.count(
    lambda x, k: jax.lax.scan(lambda x, _: (scanned(x, k), None), x, length=2)[0], A, zeros(11, 5, 5)
  ) == (2 * 11 * 2 * 3 * 5 * 5)


def test_what_is_inside_other_functions_counts():
  inside = [jax.jit(jnp.dot), jax.checkpoint(jnp.dot), lambda a, b: jax.vmap(jnp.dot, (0, None))(a, b)]
  assert [flops.count(fn, A, B) for fn in inside] == [PRODUCT] * 3
  assert flops.count(lambda a, b: jax.lax.cond(True, jnp.dot, lambda a, b: jnp.zeros((3, 7)), a, b), A, B) == PRODUCT


def test_remat_counts_what_is_computed_again():
  def loss(a, b):
    return jax.checkpoint(lambda a, b: jnp.square(jnp.sin(a @ b)).sum())(a, b)

  assert flops.count(jax.grad(loss, argnums=(0, 1)), A, B) == 4 * PRODUCT


def test_counting_computes_nothing():
  huge = zeros(10**6, 10**6)
  assert flops.count(jnp.dot, huge, huge) == 2 * 10**18


def test_a_convolution_is_a_product_of_each_place_with_its_kernel():
  def convolve(x, kernel, groups=1):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=names, feature_group_count=groups)

  assert flops.count(convolve, zeros(4, 9, 7, 6), zeros(3, 3, 6, 8)) == 2 * (4 * 4 * 3 * 8) * (3 * 3 * 6)
  assert flops.count(lambda x, k: convolve(x, k, 2), zeros(4, 9, 7, 6), zeros(3, 3, 3, 8)) == 2 * (4 * 4 * 3 * 8) * 27
