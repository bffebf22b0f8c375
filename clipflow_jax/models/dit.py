"""The separate drawer: a diffusion transformer that reads the language model by cross-attention.

Lumina-Next (Zhuo et al. 2024) as BLIP3-o has it (Chen et al. 2025). Where the flow expert shares the language model's
attention, this one has only what learned queries bring back from it: their last hidden states, the condition.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.models.kernels import attend
from clipflow_jax.models.layers import Linear, RMSNorm, SwiGLU, fourier, standardise
from clipflow_jax.models.remat import scan
from clipflow_jax.models.rotary import grid_angles, turn
from clipflow_jax.parallel.sharding import shard

TIME_FEATURES = 256
EMBEDDING = 1024  # what time and condition together tell every norm is at most so wide


class Look(nn.Module):
  """Queries of x f[B,T,D] look at y f[B,S,D] -> f[B,T,D]. Queries and keys are normed across all heads.

  x turns by angles f32[T,k/2]; so does y where it is x.
  """

  heads: int
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, y, angles):
    def project(name, of):
      return Linear(x.shape[-1], dtype=self.dtype, name=name)(of)

    def split(a):
      return shard(a.reshape(*a.shape[:2], self.heads, -1), "rows", None, "heads")

    q = split(nn.LayerNorm(1e-5, dtype=self.dtype, name="query_norm")(project("query", x)))
    k = split(nn.LayerNorm(1e-5, dtype=self.dtype, name="key_norm")(project("key", y)))
    q, k = turn(q, angles), turn(k, angles) if y is x else k
    return attend(q, k, split(project("value", y)), None, self.kernel)


class JointAttention(nn.Module):
  """Tokens attend to each other and to the condition, and one matrix takes both out.

  x f[B,T,D], condition f[B,Q,D], angles f32[T,k/2] -> f[B,T,D]. What the condition says comes in by a gate per head,
  shut at first.
  """

  heads: int
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, condition, angles):
    own = Look(self.heads, self.kernel, self.dtype, name="own")(x, x, angles)
    read = Look(self.heads, self.kernel, self.dtype, name="cross")(x, condition, angles)
    gates = jnp.tanh(self.param("head_gates", nn.initializers.zeros, (self.heads,), jnp.float32)).astype(self.dtype)
    read = (read.reshape(*x.shape[:2], self.heads, -1) * gates[:, None]).reshape(x.shape)
    return Linear(x.shape[-1], dtype=self.dtype, name="out")(own + read)


class DiTBlock(nn.Module):
  """Attention and SwiGLU, each between two norms; what goes in is scaled and what comes out is gated by the embedding.

  x f[B,T,D], condition f[B,Q,D], embedding f[B,E], angles f32[T,k/2] -> f[B,T,D]. Gates begin at zero: then the block
  does nothing (Peebles & Xie 2023, adaLN-Zero).
  """

  heads: int
  mlp: int
  norm_eps: float = 1e-5
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, condition, embedding, angles):
    def norm(name, y):
      return RMSNorm(self.norm_eps, self.dtype, name=name)(y)

    modulation = Linear(4 * x.shape[-1], True, nn.initializers.zeros, self.dtype, name="modulation")
    told = modulation(nn.silu(embedding))[:, None]
    scale, gate, mlp_scale, mlp_gate = jnp.split(told, 4, axis=-1)
    attention = JointAttention(self.heads, self.kernel, self.dtype, name="attention")
    y = attention(norm("attention_norm", x) * (1 + scale), norm("condition_norm", condition), angles)
    x = shard(x + jnp.tanh(gate) * norm("attention_out_norm", y), "rows")
    y = SwiGLU(self.mlp, self.dtype, name="mlp")(norm("mlp_norm", x) * (1 + mlp_scale))
    return shard(x + jnp.tanh(mlp_gate) * norm("mlp_out_norm", y), "rows")


class DiT(nn.Module):
  """x_t f32[B,T,C] of grid x grid tokens, t f32[B] in 0..1, condition f[B,Q,E] -> f32[B,T,C]: the velocity.

  time_steps: times are told as whole steps of so many, rounded down, as BLIP3-o tells them (0: as they are).
  """

  grid: int
  width: int
  layers: int
  heads: int
  mlp: int
  norm_eps: float = 1e-5
  time_steps: int = 0
  remat: str = "none"
  unroll: bool = False
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_t: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
    def linear(features, name):
      return Linear(features, True, dtype=self.dtype, name=name)

    x = shard(linear(self.width, "entry")(x_t), "rows")
    condition = nn.gelu(linear(self.width, "condition_hidden")(condition))
    condition = shard(linear(self.width, "condition_out")(condition), "rows")
    embedding = self._embedding(t, condition, linear)
    angles = grid_angles(self.grid, self.grid, self.width // self.heads, in_turn=True)

    def body(block, x):
      return block(x, condition, embedding, angles), None

    layers = scan(body, self.layers, self.remat, self.unroll)
    x, _ = layers(DiTBlock(self.heads, self.mlp, self.norm_eps, self.kernel, self.dtype, name="layers"), x)
    scale = linear(self.width, "out_modulation")(nn.silu(embedding))[:, None]
    x = standardise(x) * (1 + scale.astype(jnp.float32))
    return Linear(x_t.shape[-1], True, name="head")(x)

  def _embedding(self, t: jax.Array, condition: jax.Array, linear: Any) -> jax.Array:
    """Time and the condition's mean, f[B,E], which every norm is told."""
    size = min(self.width, EMBEDDING)
    if self.time_steps:  # a whole step that a float misses by its last bit stays whole
      t = jnp.floor(t * self.time_steps + 1e-3) / self.time_steps
    time = linear(size, "time_out")(nn.silu(linear(size, "time_hidden")(fourier(t, TIME_FEATURES))))
    mean = nn.LayerNorm(1e-5, dtype=self.dtype, name="mean_norm")(condition.mean(axis=1))
    return time + linear(size, "projection")(mean)
