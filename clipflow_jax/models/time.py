"""Noise levels as tokens: no adaptive norms, so flow and language layers are the same block (RAEv2, iMF)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.models.layers import Linear, fourier
from clipflow_jax.parallel.sharding import shard


class TimeTokens(nn.Module):
  """Times f32[...] in 0..1 -> f[..., tokens, width]."""

  width: int
  tokens: int = 4
  dtype: Any = jnp.float32
  rows: str = "batch"  # where t's first axis lies

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    x = shard(fourier(t, self.width), self.rows)  # at every step, or the partitioner gathers the rows of all chips
    x = shard(nn.silu(Linear(self.width, True, dtype=self.dtype, name="time_hidden")(x)), self.rows)
    x = shard(Linear(self.tokens * self.width, True, dtype=self.dtype, name="time_out")(x), self.rows)
    return x.reshape(*t.shape, self.tokens, self.width)
