"""Contrastive CLIP with the two side readers that make a small tower learn in minutes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.models.layers import Linear
from clipflow_jax.models.text import TextTower
from clipflow_jax.models.transformer import Transformer
from clipflow_jax.models.vision import Seen, VisionTower, Want


class Clip(nn.Module):
  """Vision and text towers with one embedding space (Radford et al. 2021).

  text: None leaves that tower out.
  captioner: fields of a small prefix language model on the tower's tokens (CoCa, Yu et al. 2022). With it
  comes a linear read-out of pixels, which keeps in the last layer what a decoder will need. None: neither.
  pairwise: similarities have a bias, and the contrastive loss looks at each pair alone (SigLIP, Zhai et al. 2023).
  """

  vision: dict[str, Any]
  text: dict[str, Any] | None = None
  captioner: dict[str, Any] | None = None
  kernel: str = "xla"
  dtype: Any = jnp.float32
  pairwise: bool = False

  def setup(self):
    shared = dict(kernel=self.kernel, dtype=self.dtype)
    self.vision_tower = VisionTower(**self.vision, **shared)
    if self.text:
      self.text_tower = TextTower(**self.text, **shared)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(10.0)), (), jnp.float32)
    if self.pairwise:
      self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), (), jnp.float32)
    if self.captioner:
      self.caption_model = Transformer(**self.captioner, axes=("rows", None), **shared)
      self.caption_connector = CaptionConnector(self.captioner["width"], self.dtype)
      self.pixel_readout = PixelReadout(self.vision["patch_size"], self.dtype)

  def see(self, images: jax.Array, want: Want = "features") -> Seen:
    """images u8[B,H,W,3] -> Seen, as far as `VisionTower` is asked for it."""
    return self.vision_tower(images, want)

  def embed_text(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """tokens i32[B,S], mask bool[B,S] -> f32[B,E], unit norm."""
    return self.text_tower(tokens, mask)

  def temperature(self) -> jax.Array:
    """The learned factor of the similarities, capped at 100 as CLIP does (SigLIP does not).

    Its gradient is not capped: what has gone beyond can come back.
    """
    scale = self.logit_scale
    if not self.pairwise:
      capped = jnp.minimum(scale, math.log(100.0))
      scale = jax.lax.stop_gradient(capped) + (scale - jax.lax.stop_gradient(scale))
    return jnp.exp(scale)

  def caption(self, tokens: jax.Array, seen_tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """The caption model's hidden f[B,S,D] at words i32[B,S] after the picture's tokens f[B,T,C] as a prefix."""
    b, prefix = seen_tokens.shape[:2]
    words = self.caption_model.embed(tokens)
    x = jnp.concatenate([self.caption_connector(seen_tokens).astype(words.dtype), words], axis=1)
    segments = jnp.concatenate([jnp.ones((b, prefix), jnp.int32), segments], axis=1)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    order = jnp.broadcast_to(jnp.concatenate([jnp.zeros(prefix, jnp.int32), places + 1]), (b, x.shape[1]))
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None, :, None], (*x.shape[:2], 3))
    hidden, _ = self.caption_model.read(x, segments, order, positions)
    return hidden[:, prefix:]

  def read_pixels(self, seen_tokens: jax.Array) -> jax.Array:
    """A linear guess of the patches f32[B,T,p*p*3] in -1..1 from tokens f[B,T,C]."""
    return self.pixel_readout(seen_tokens)


class CaptionConnector(nn.Module):
  """Tokens f[B,T,C] -> f[B,T,width]."""

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm(dtype=self.dtype, name="in_norm")(x)
    return Linear(self.width, True, dtype=self.dtype, name="connector")(x)


class PixelReadout(nn.Module):
  """Tokens f[B,T,C] -> f32[B,T,patch*patch*3]."""

  patch: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm(dtype=self.dtype, name="in_norm")(x)
    return Linear(self.patch**2 * 3, True, dtype=self.dtype, name="head")(x).astype(jnp.float32)
