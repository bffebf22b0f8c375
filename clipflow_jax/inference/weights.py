"""Weights in eight bits: a quarter of float32's memory, half of bfloat16's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipflow_jax.training.state import Params, flatten, nest

STACK, KERNEL = "/layers/", "/kernel"  # of the paths of matrices that are as many as there are layers


def int8(params: Params) -> Params:
  """Parameters with each matrix f[L,inputs,outputs] of every stack of layers in whole numbers.

  PATH/kernel is i8[L,inputs,outputs], and PATH/kernel_scale, f32[L,outputs], what each output is to be multiplied by,
  which `layers.Linear` does: a weight is off by half a scale at most, the largest of its output is 127 of them.
  Embeddings, norms, and what stands before and after a stack stay as they are: they are few, and words and pixels
  depend on them directly. Source: Dettmers et al. 2022, of whose method this is the plain part.
  """
  found = flatten(params)
  for path in [path for path in found if STACK in path and path.endswith(KERNEL)]:
    found[path], found[f"{path}_scale"] = _rounded(found[path])
  return nest(found)


@jax.jit
def _rounded(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
  whole = matrices.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(whole).max(axis=1), 1e-12) / 127
  return jnp.round(whole / scale[:, None]).astype(jnp.int8), scale
