"""Attention by `models.flash`, in Pallas's interpreter, on one device and on eight; prints the largest differences."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.models import kernels
from clipflow_jax.parallel import mesh

LENGTH = 128


def main() -> None:
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(4, LENGTH, heads, 16)), jnp.float32) for heads in (4, 2, 2))
  segments = jnp.asarray(np.sort(rng.integers(1, 4, (4, LENGTH)), axis=1))
  order = jnp.broadcast_to(jnp.arange(LENGTH) // 5, segments.shape)

  # Two blocks a row, which see its first words: as noisy blocks and the separate drawer's queries do.
  blocks = [x.reshape(8, LENGTH // 2, *x.shape[2:]) for x in (q, k, v)]
  sees = jnp.arange(LENGTH) < jnp.asarray(rng.integers(0, LENGTH, (4, 2, 1)))

  def loss(q, k, v):
    out = kernels.flash(q, k, v, kernels.Reach.of(segments, order), ("batch", "sequence"), interpret=True)
    beside = kernels.flash_beside(*blocks, (k, v), sees, causal=True, interpret=True)
    return ((out + beside.reshape(out.shape)) * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

  both = jax.value_and_grad(loss, (0, 1, 2))
  alone = jax.jit(both)(q, k, v)
  with jax.set_mesh(mesh.make(dict(data=2, context=2, tensor=2))):
    cut = jax.jit(both)(q, k, v)
  print(json.dumps([float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(cut))]))


if __name__ == "__main__":
  main()
