"""The transformer: one block, two experts, one attention.

Expert `text` reads the text stream (words and clean pictures); expert `flow` denoises picture blocks that
stand beside it. By the mask rule nothing in the stream ever sees a noisy block, so the stream is computed
once, its keys and values (the `Context`) are kept, and any number of noisy blocks, solver steps or new words
attend to them. Training, drawing and decoding all walk this one way, and a frozen text expert is exactly the
language model it was.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.errors import UserError
from clipflow_jax.models.attention import Attention, sight, visible
from clipflow_jax.models.layers import Embed, RMSNorm, SwiGLU
from clipflow_jax.models.remat import scan
from clipflow_jax.models.rotary import at_positions
from clipflow_jax.parallel.sharding import shard

# As the loss has them: rounded to bfloat16 the likeliest words come to be equal.
_exact = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class Block(nn.Module):
  """Pre-norm attention and SwiGLU, residual (Touvron et al. 2023). Arguments and results as `Attention`.

  out_scale: of the initial weights of what is added to the stream (`layers.scaled_init`). At 0 a block begins as the
  identity, and a small stack learns faster.
  """

  mlp: int
  heads: int
  kv_heads: int
  head_dim: int
  qk_norm: bool = True
  qkv_bias: bool = False
  norm_eps: float = 1e-6
  dtype: Any = jnp.float32
  out_bias: bool = False
  mlp_bias: bool = False
  axes: tuple[str, str | None] = ("batch", "sequence")
  kernel: str = "xla"
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, x, rotation, mask, past=None, write_at=None, causal=False):
    attention = Attention(
      self.heads,
      self.kv_heads,
      self.head_dim,
      self.qk_norm,
      self.qkv_bias,
      self.norm_eps,
      self.dtype,
      self.out_bias,
      self.axes,
      self.kernel,
      self.out_scale,
      name="attention",
    )
    normed = RMSNorm(self.norm_eps, self.dtype, name="attention_norm")(x)
    y, kv = attention(normed, rotation, mask, past, write_at, causal)
    x = shard(x + y, *self.axes)
    x = x + SwiGLU(self.mlp, self.dtype, self.mlp_bias, out_scale=self.out_scale, name="mlp")(
      RMSNorm(self.norm_eps, self.dtype, name="mlp_norm")(x)
    )
    return shard(x, *self.axes), kv


class Stack(nn.Module):
  """`layers` Blocks, scanned. x f[B,S,D] at positions i32[B,S,3], mask as `Attention`.

  past: keys and values stacked over layers, f[L,B,P,g,k] twice; write_at: the slot of them that x's first overwrites.
  rope_theta, rope_sections, rope_scaling: as `rotary.at_positions`. remat: a name of `remat.POLICIES`. unroll: compile
  the layers one after the other. A loop stacks what its layers leave for the backward pass, which in a tiny stack on
  CPU costs half as much as the layers; a deep stack without the loop compiles for minutes.

  Returns (f[B,S,D], (keys, values) f[L,B,K,g,k]); with `keep_kv` False the second is None.
  """

  layers: int
  block: dict[str, Any]
  remat: str = "none"
  unroll: bool = False
  keep_kv: bool = True
  rope_theta: float = 10_000.0
  rope_sections: tuple[int, ...] = ()
  rope_scaling: dict[str, Any] | None = None

  @nn.compact
  def __call__(self, x, positions, mask, past=None, write_at=None, causal=False):
    rope = self.rope_theta, self.rope_sections, self.rope_scaling
    rotation = at_positions(positions, self.block["head_dim"], *rope)

    def body(block, x, past):
      x, kv = block(x, rotation, mask, past, causal=causal)
      return x, kv if self.keep_kv else None

    def write(block, carry, layer):  # the buffers are carried, and written in place: stacked anew they would be copied
      x, buffers = carry
      return block(x, rotation, mask, buffers, (layer, write_at)), None

    layers = Block(**self.block, name="layers")
    if write_at is None:
      return scan(body, self.layers, self.remat, self.unroll)(layers, x, past)
    return scan(write, self.layers, self.remat, self.unroll)(layers, (x, past), jnp.arange(self.layers))[0]


class Context(flax.struct.PyTreeNode):
  """What the text stream leaves behind for everything that attends to it."""

  keys: jax.Array  # f[L,B,S,g,k]
  values: jax.Array  # f[L,B,S,g,k]
  segments: jax.Array  # i32[B,S]
  order: jax.Array  # i32[B,S]


class Transformer(nn.Module):
  """A decoder stack whose layers hold one set of weights per expert.

  Source: Shi et al. 2024 (LMFusion); Deng et al. 2025 (BAGEL).
  Both experts share depth, heads and head dim, because they share the attention; width and mlp are their own.
  flow_width 0 leaves the flow expert out. early_layer: after how many layers the flow's early prediction is
  taken (0: none).
  """

  vocabulary: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  flow_width: int = 0
  flow_mlp: int = 0
  early_layer: int = 0
  rope_theta: float = 10_000.0
  rope_sections: tuple[int, ...] = ()
  qk_norm: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  rope_scaling: dict[str, Any] | None = None
  tie_embeddings: bool = True
  norm_eps: float = 1e-6
  remat: str = "none"
  unroll: bool = False
  axes: tuple[str, str | None] = ("batch", "sequence")  # where the stream's rows and slots lie
  kernel: str = "xla"  # of `kernels.attend`
  out_scale: float = 1.0  # of a `Block`
  dtype: Any = jnp.float32

  def setup(self):
    if not 0 <= self.early_layer < self.layers:
      raise UserError(f"early_layer {self.early_layer} must lie before the last of {self.layers} layers (0: none)")
    shared = dict(
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      qk_norm=self.qk_norm,
      qkv_bias=self.qkv_bias,
      out_bias=self.out_bias,
      mlp_bias=self.mlp_bias,
      norm_eps=self.norm_eps,
      kernel=self.kernel,
      out_scale=self.out_scale,
      dtype=self.dtype,
    )
    rope = dict(rope_theta=self.rope_theta, rope_sections=self.rope_sections, rope_scaling=self.rope_scaling)
    self.embed = Embed(
      self.vocabulary,
      self.width,
      embedding_init=nn.initializers.normal(self.width**-0.5),
      dtype=self.dtype,
      slots=self.axes[1],
    )
    self.text = Stack(self.layers, dict(shared, mlp=self.mlp, axes=self.axes), self.remat, self.unroll, **rope)
    self.text_norm = RMSNorm(self.norm_eps, self.dtype)
    if not self.tie_embeddings:
      self.head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, dot_general=_exact)
    if self.flow_width:
      flow = dict(shared, mlp=self.flow_mlp, axes=("rows", None))
      if self.early_layer:
        self.flow_early = Stack(self.early_layer, flow, self.remat, self.unroll, keep_kv=False, **rope)
        self.early_norm = RMSNorm(self.norm_eps, self.dtype)
      self.flow = Stack(self.layers - self.early_layer, flow, self.remat, self.unroll, keep_kv=False, **rope)
      self.flow_norm = RMSNorm(self.norm_eps, self.dtype)

  def read(self, x: jax.Array, segments: jax.Array, order: jax.Array, positions: jax.Array):
    """The text stream: x f[B,S,D], segments, order i32[B,S], positions i32[B,S,3] -> (f[B,S,D], Context)."""
    mask = sight(self.kernel, segments, order)
    x, (keys, values) = self.text(shard(x, *self.axes), positions, mask)
    return self.text_norm(x), Context(keys, values, segments, order)

  def extend(self, x: jax.Array, positions: jax.Array, context: Context, write_at: jax.Array):
    """Slots x f[B,Q,D] put into the context's buffer at `write_at` (its segments and order already say so).

    Returns (hidden f[B,Q,D], Context). The rule is `read`'s, so decoding equals the full forward pass.
    """
    slots = write_at + jnp.arange(x.shape[1])
    segments, order = jnp.take(context.segments, slots, axis=1), jnp.take(context.order, slots, axis=1)
    mask = visible(segments, order, context.segments, context.order)
    x, (keys, values) = self.text(x, positions, mask, (context.keys, context.values), write_at)
    return self.text_norm(x), context.replace(keys=keys, values=values)

  def ask(self, x: jax.Array, positions: jax.Array, segments: jax.Array, order: jax.Array, context: Context):
    """Queries x f[B,M,Q,D] at positions i32[B,M,Q], written behind M places of the stream -> hidden f[B,M,Q,D].

    segments, order i32[B,M]: what of the stream each place's queries see. Beside it they see those before them, and
    none of another place: as words written there would, and the stream never sees them.
    """
    b, m, count, width = x.shape
    mask = visible(segments, order, context.segments, context.order)
    places = jnp.broadcast_to(positions.reshape(b * m, count, 1), (b * m, count, 3))
    past = (context.keys, context.values)
    x, _ = self.text(x.reshape(b * m, count, width), places, mask, past, causal=True)
    return self.text_norm(x).reshape(b, m, count, width)

  def draw(self, z: jax.Array, positions: jax.Array, segments: jax.Array, order: jax.Array, context: Context):
    """Noisy blocks z f[B,M,n,F], positions i32[B,M,n,3]; segments, order i32[B,M]: which slots each sees.

    Returns (hidden f[B,M,n,F], early hidden or None).
    """
    b, m, n, width = z.shape
    mask = visible(segments, order, context.segments, context.order)
    past = (context.keys, context.values)
    x, positions = shard(z.reshape(b * m, n, width), "rows"), positions.reshape(b * m, n, 3)
    early, split = None, self.early_layer
    if split:
      x, _ = self.flow_early(x, positions, mask, jax.tree.map(lambda a: a[:split], past))
      early = self.early_norm(x).reshape(b, m, n, width)
    x, _ = self.flow(x, positions, mask, jax.tree.map(lambda a: a[split:], past))
    return self.flow_norm(x).reshape(b, m, n, width), early

  def unembedding(self) -> jax.Array:
    """The matrix of the logits, f[D,V]."""
    if self.tie_embeddings:
      return self.embed.embedding.T
    return self.head.variables["params"]["kernel"]

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden f[..., D] -> f32[..., V]. (A loss over many slots takes the `unembedding` instead, a part at a time.)"""
    rows = hidden.reshape(-1, hidden.shape[-1])
    if self.tie_embeddings:  # on the left as it lies in memory: turned for each word it costs more than the product
      matrix = self.embed.embedding.astype(rows.dtype)
      out = _exact(matrix, rows, (((1,), (1,)), ((), ()))).T
    else:
      out = self.head(rows)
    return out.reshape(*hidden.shape[:-1], self.vocabulary)
