"""The separate drawer: a diffusion transformer that reads the language model by cross-attention.

Lumina-Next (Zhuo et al. 2024) as BLIP3-o has it (Chen et al. 2025). Where the flow expert shares the language model's
attention, this one has only what learned queries bring back from it: their last hidden states, the condition.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from clipflow_jax.models.kernels import attend
from clipflow_jax.models.layers import Linear, RMSNorm, SwiGLU, fourier, layer_norm
from clipflow_jax.models.remat import scan
from clipflow_jax.models.rotary import Rotation, grid_angles, turn
from clipflow_jax.parallel.sharding import shard

TIME_FEATURES = 256
EMBEDDING = 1024  # what time and condition together tell every norm is at most so wide


class Remembered(flax.struct.PyTreeNode):
  """What a DiT makes of a condition before it sees time and noise: once for all steps of a solver."""

  keys: jax.Array  # f[L,B,Q,h,k] of every layer
  values: jax.Array  # f[L,B,Q,h,k]
  mean: jax.Array  # f[B,E]


class Look(nn.Module):
  """Queries of x f[B,T,D] look at keys and values f[B,S,h,k] -> f[B,T,D]. Queries and keys are normed across all heads.

  Without keys and values x looks at itself, and its keys turn by the rotation as its queries do.
  """

  width: int
  heads: int
  kernel: str = "xla"
  dtype: Any = jnp.float32

  def setup(self):
    self.query, self.key, self.value = (Linear(self.width, dtype=self.dtype) for _ in range(3))
    self.query_norm, self.key_norm = (nn.LayerNorm(1e-5, dtype=self.dtype) for _ in range(2))

  def remember(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y f[B,S,D] -> its keys and values, f[B,S,h,k] each."""
    return self._split(self.key_norm(self.key(y))), self._split(self.value(y))

  def __call__(self, x, rotation, seen=None):
    q = checkpoint_name(turn(self._split(self.query_norm(self.query(x))), rotation), "query")
    k, v = seen or self.remember(x)
    if not seen:  # what is remembered of all layers is kept as it is
      k, v = checkpoint_name(turn(k, rotation), "key"), checkpoint_name(v, "value")
    return checkpoint_name(attend(q, k, v, None, self.kernel), "attention")

  def _split(self, a: jax.Array) -> jax.Array:
    return shard(a.reshape(*a.shape[:2], self.heads, -1), "rows", None, "heads")


class JointAttention(nn.Module):
  """Tokens attend to each other and to what is remembered of the condition, and one matrix takes both out.

  x f[B,T,D], seen: keys and values f[B,Q,h,k], rotation of T places -> f[B,T,D]. What the condition says comes in by a
  gate per head, shut at first.
  """

  width: int
  heads: int
  kernel: str = "xla"
  dtype: Any = jnp.float32

  def setup(self):
    self.own, self.cross = (Look(self.width, self.heads, self.kernel, self.dtype) for _ in range(2))
    self.head_gates = self.param("head_gates", nn.initializers.zeros, (self.heads,), jnp.float32)
    self.out = Linear(self.width, dtype=self.dtype)

  def __call__(self, x, seen, rotation):
    gates = jnp.tanh(self.head_gates).astype(self.dtype)
    read = self.cross(x, rotation, seen).reshape(*x.shape[:2], self.heads, -1)
    return self.out(self.own(x, rotation) + (read * gates[:, None]).reshape(x.shape))


class DiTBlock(nn.Module):
  """Attention and SwiGLU, each between two norms; what goes in is scaled and what comes out is gated by the embedding.

  x f[B,T,D], seen and rotation as of JointAttention, embedding f[B,E] -> f[B,T,D]. Gates begin at zero: then the block
  does nothing (Peebles & Xie 2023, adaLN-Zero).
  """

  width: int
  heads: int
  mlp_width: int
  norm_eps: float = 1e-5
  kernel: str = "xla"
  dtype: Any = jnp.float32

  def setup(self):
    def norm():
      return RMSNorm(self.norm_eps, self.dtype)

    self.modulation = Linear(4 * self.width, True, nn.initializers.zeros, self.dtype)
    self.condition_norm = norm()
    self.attention_norm, self.attention_out_norm, self.mlp_norm, self.mlp_out_norm = (norm() for _ in range(4))
    self.attention = JointAttention(self.width, self.heads, self.kernel, self.dtype)
    self.mlp = SwiGLU(self.mlp_width, self.dtype)

  def remember(self, condition: jax.Array) -> tuple[jax.Array, jax.Array]:
    """condition f[B,Q,D] -> its keys and values, f[B,Q,h,k] each."""
    return self.attention.cross.remember(self.condition_norm(condition))

  def __call__(self, x, seen, embedding, rotation):
    told = self.modulation(nn.silu(embedding))[:, None]
    scale, gate, mlp_scale, mlp_gate = jnp.split(told, 4, axis=-1)
    y = self.attention(self.attention_norm(x) * (1 + scale), seen, rotation)
    x = shard(x + jnp.tanh(gate) * self.attention_out_norm(y), "rows")
    y = self.mlp(self.mlp_norm(x) * (1 + mlp_scale))
    return shard(x + jnp.tanh(mlp_gate) * self.mlp_out_norm(y), "rows")


class DiT(nn.Module):
  """x_t f32[B,T,C] of grid x grid tokens, t f32[B] in 0..1, what is remembered -> f32[B,T,C]: the velocity.

  time_steps: times are told as whole steps of so many, rounded down, as BLIP3-o tells them (0: as they are).
  """

  grid: int
  channels: int
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

  def setup(self):
    def linear(features):
      return Linear(features, True, dtype=self.dtype)

    size = min(self.width, EMBEDDING)
    self.entry, self.out_modulation = linear(self.width), linear(self.width)
    self.condition_hidden, self.condition_out = linear(self.width), linear(self.width)
    self.time_hidden, self.time_out, self.projection = linear(size), linear(size), linear(size)
    self.mean_norm = nn.LayerNorm(1e-5, dtype=self.dtype)
    self.head = Linear(self.channels, True)
    self.blocks = DiTBlock(self.width, self.heads, self.mlp, self.norm_eps, self.kernel, self.dtype, name="layers")

  def remember(self, condition: jax.Array) -> Remembered:
    """condition f[B,Q,E] -> what of it needs neither time nor noise."""
    condition = self.condition_out(nn.gelu(self.condition_hidden(condition)))
    condition = shard(condition, "rows")

    def body(block, nothing):
      return nothing, block.remember(condition)

    _, (keys, values) = scan(body, self.layers, self.remat, self.unroll)(self.blocks, None)
    return Remembered(keys, values, self.projection(self.mean_norm(condition.mean(axis=1))))

  def __call__(self, x_t: jax.Array, t: jax.Array, remembered: Remembered) -> jax.Array:
    x = shard(self.entry(x_t), "rows")
    embedding = self._time(t) + remembered.mean
    rotation = Rotation.by(grid_angles(self.grid, self.grid, self.width // self.heads, in_turn=True))

    def body(block, x, seen):
      return block(x, seen, embedding, rotation), None

    x, _ = scan(body, self.layers, self.remat, self.unroll)(self.blocks, x, (remembered.keys, remembered.values))
    scale = self.out_modulation(nn.silu(embedding))[:, None]
    return self.head(layer_norm(x) * (1 + scale.astype(jnp.float32)))

  def _time(self, t: jax.Array) -> jax.Array:
    """f[B,E], which with the condition's mean every norm is told."""
    if self.time_steps:  # a whole step that a float misses by its last bit stays whole
      t = jnp.floor(t * self.time_steps + 1e-3) / self.time_steps
    return self.time_out(nn.silu(self.time_hidden(fourier(t, TIME_FEATURES))))
