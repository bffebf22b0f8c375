"""The most that this machine does: of matrix products, and of moving bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipflow_jax.bench.frame import Work

SEVERAL = 10


def work(told: dict[str, Any]) -> Work:
  """told: name, "matmul" (one large product of dtype) or "copy" (of an array that no cache holds); dtype."""
  large = jax.default_backend() != "cpu"
  if told["name"] == "matmul":
    size = 8192 if large else 1536
    a = jax.random.normal(jax.random.key(0), (size, size), told["dtype"])  # a chip is faster on equal numbers
    multiply = jax.jit(jnp.matmul)
    return Work(
      _several(lambda: multiply(a, a)),
      {"flop": SEVERAL * 2.0 * size**3},
      f"products of {size} x {size} matrices, {told['dtype']}",
      device=jax.devices()[0].device_kind,
    )
  size = 2**30 if large else 2**26
  b = jnp.ones(size // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  return Work(_several(lambda: add(b)), {"byte": SEVERAL * 2.0 * size}, f"{size // 2**20} MiB read and written")


def _several(run: Callable[[], jax.Array]) -> Callable[[], None]:
  """A call that does it SEVERAL times and waits once: to tell the host costs a fast chip a fifth of one."""

  def call() -> None:
    jax.block_until_ready([run() for _ in range(SEVERAL)][-1])

  return call
