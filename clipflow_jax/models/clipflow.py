"""CLIP-Flow: one model that understands and draws, joined of towers, transformer and pixel decoder.

A picture becomes standardised features; the transformer reads them in its text stream, and draws them as
noisy blocks beside the stream; the pixel decoder turns features into pixels. Understanding and generation
meet in one feature space.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from clipflow_jax.batch import Batch
from clipflow_jax.errors import UserError
from clipflow_jax.flow import path
from clipflow_jax.models.clip import Clip
from clipflow_jax.models.dit import DiT, Remembered
from clipflow_jax.models.layers import GridPositions, Linear, grid_positions, to_pixels
from clipflow_jax.models.pixel_decoder import PixelDecoder
from clipflow_jax.models.time import TimeTokens
from clipflow_jax.models.transformer import Context, Transformer
from clipflow_jax.models.vision import Seen, Standardise, Want
from clipflow_jax.parallel.sharding import shard


@flax.struct.dataclass
class Place:
  """Where M noisy blocks stand beside the stream."""

  segments: jax.Array  # i32[B,M]
  order: jax.Array  # i32[B,M]
  positions: jax.Array  # i32[B,M] rotary time

  @classmethod
  def of(cls, batch: Batch, pictures: jax.Array) -> Place:
    """Where those pictures of each row, i32[B,M], are drawn."""
    where = (batch.image_segments, batch.image_order, batch.image_positions)
    return cls(*(jnp.take_along_axis(a, pictures, axis=1) for a in where))


# What a drawer is given of the stream: the flow expert its keys and values, the separate drawer f[B,M,Q,D].
Conditioning = tuple[Context, Place] | jax.Array
Given = Conditioning | Remembered


class FlowHead(nn.Module):
  """Linear in and out of the noisy blocks, with time tokens and the strong positions that tiny flows need."""

  width: int
  channels: int
  rows: int
  columns: int
  time_tokens: int = 4
  position_std: float = 0.7  # of row and of column each: together as strong as the tokens themselves
  early: bool = False
  dtype: Any = jnp.float32

  def setup(self):
    self.entry = Linear(self.width, True, dtype=self.dtype)
    self.grid = GridPositions(self.rows, self.columns, self.width, self.position_std)
    self.time = TimeTokens(self.width, self.time_tokens, self.dtype)
    self.head = Linear(self.channels, True, dtype=self.dtype)
    if self.early:
      self.early_head = Linear(self.channels, True, dtype=self.dtype)

  def enter(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """x_t f[B,M,T,C], t f32[B,M] -> f[B,M,time_tokens+T,F]."""
    # Said of what comes in too: else the partitioner gathers the rows of all chips, not this small matrix.
    x_t, t = shard(x_t, "batch"), shard(t, "batch")
    tokens = shard(self.entry(x_t), "batch") + self.grid().astype(self.dtype)
    return jnp.concatenate([self.time(t), tokens], axis=2)

  def leave(self, hidden: jax.Array, early: bool = False) -> jax.Array:
    """hidden f[B,M,time_tokens+T,F] -> f32[B,M,T,C]."""
    head = self.early_head if early else self.head
    return head(hidden[:, :, self.time_tokens :]).astype(jnp.float32)


# (part, a size of it, what that must be a multiple of, and of how many of those: heads that turn by row and column are
# cut into pairs for each).
MULTIPLES = (
  ("clip.text", "width", "heads", 1),
  ("clip.captioner", "heads", "kv_heads", 1),
  ("transformer", "heads", "kv_heads", 1),
  ("pixel_decoder", "image_size", "patch_size", 1),
  ("pixel_decoder", "width", "heads", 4),
  ("drawer", "width", "heads", 4),
)


class ClipFlow(nn.Module):
  """The whole model. Parts that a run does not need are None.

  clip, transformer, pixel_decoder: fields of those modules; clip {}: no tower, of a language model
  that only talks; such a one is not trained.
  prediction: what the flow head gives, "x" or "v".
  drawer: fields of a `DiT` that draws in place of the flow expert, and `queries`, how many it has in the stream.
  shift_scale: factor on the dimension law of the time shift (`flow.path.shift_for`).
  whiten: how far features are whitened (`data.feature_statistics.statistics`); 0: not at all.
  kernel: of every attention (`kernels.attend`). dtype: what is computed in, "float32" or "bfloat16"; softmax, norms'
  statistics, losses and parameters are float32 all the same.
  """

  clip: dict[str, Any]
  transformer: dict[str, Any] | None = None
  pixel_decoder: dict[str, Any] | None = None
  drawer: dict[str, Any] | None = None
  prediction: str = "x"
  shift_scale: float = 1.0
  whiten: float = 0.0
  kernel: str = "xla"
  dtype: Any = jnp.float32

  @property
  def grid(self) -> int:
    """Rows, and columns, of a picture's tokens; 0 where it has no tower."""
    if not self.clip:
      return 0
    vision = self.clip["vision"]
    return vision["image_size"] // vision["patch_size"] // vision.get("feature_pool", 1)

  @property
  def feature_shape(self) -> tuple[int, int]:
    """(T, C)."""
    return self.grid**2, self.clip["vision"]["width"]

  @property
  def draws(self) -> bool:
    """Whether it has something to draw with."""
    return bool(self.drawer or (self.transformer or {}).get("flow_width"))

  @property
  def alpha(self) -> float:
    """The time shift of training and sampling."""
    return path.shift_for(*self.feature_shape, self.shift_scale)

  def setup(self):
    if self.drawer and (self.transformer or {}).get("flow_width"):
      raise UserError("model.drawer and model.transformer.flow_width are two ways to draw; leave one out")
    if self.prediction not in ("x", "v"):
      raise UserError(f"model.prediction {self.prediction!r} is unknown; choose x or v")
    if self.dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
      raise UserError(f"model.dtype {self.dtype!r} is unknown; choose float32 or bfloat16")
    self._check_sizes()
    shared = dict(kernel=self.kernel, dtype=jnp.dtype(self.dtype))
    if self.clip:
      self.clip_model = Clip(**self.clip, **shared)
      self.statistics = Standardise(bool(self.whiten))
    if self.transformer:
      fields = self.transformer
      self.language_model = Transformer(**fields, **shared)
    if self.transformer and self.clip:
      channels = self.feature_shape[1]
      self.image_connector = Linear(fields["width"], True, dtype=self.dtype)
      # Standardising per token takes from the features where they are: the reader is told again.
      self.image_grid = GridPositions(self.grid, self.grid, fields["width"], 0.7)
      if fields.get("flow_width"):
        early = bool(fields.get("early_layer"))
        self.flow_head = FlowHead(fields["flow_width"], channels, self.grid, self.grid, early=early, dtype=self.dtype)
      elif self.drawer:
        count, width = self.drawer["queries"], fields["width"]
        self.queries = self.param("queries", nn.initializers.normal(width**-0.5), (count, width), jnp.float32)
        own = {name: value for name, value in self.drawer.items() if name != "queries"}
        self.separate_drawer = DiT(grid=self.grid, channels=channels, **own, **shared)
    if self.pixel_decoder:
      self.decoder = PixelDecoder(**self.pixel_decoder, **shared)

  def _check_sizes(self) -> None:
    """UserError where one size of a part does not go into another, or a part's not with the tower's."""
    parts = {"transformer": self.transformer, "pixel_decoder": self.pixel_decoder, "drawer": self.drawer}
    parts |= {f"clip.{name}": self.clip.get(name) for name in ("vision", "text", "captioner")}
    for part, whole, by, times in MULTIPLES:
      fields = parts[part]
      if fields and fields[whole] % (times * fields[by]):
        unit = f"{times} x {by}" if times > 1 else by
        raise UserError(
          f"model.{part}.{whole} {fields[whole]} is no multiple of {unit} {fields[by]}; change one of the two"
        )
    vision, decoder = parts["clip.vision"], self.pixel_decoder
    if not vision:
      return
    if self.clip.get("captioner") and vision["image_size"] % vision["patch_size"]:
      raise UserError(
        f"model.clip.vision.image_size {vision['image_size']} is no multiple of patch_size {vision['patch_size']}, "
        "all of which model.clip.captioner reads out; change one of the two, or leave the captioner out"
      )
    side, pool = vision["image_size"] // vision["patch_size"], vision.get("feature_pool", 1)
    if side % pool:
      raise UserError(f"model.clip.vision.feature_pool {pool} does not divide the {side} tokens of a side; change it")
    chosen = vision.get("feature_layers") or ()
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(1, vision["layers"] + 1)):
      raise UserError(
        f"model.clip.vision.feature_layers {tuple(chosen)}: each must be another of layers 1 to {vision['layers']}"
      )
    if decoder and (patches := decoder["image_size"] // decoder["patch_size"]) != self.grid:
      raise UserError(
        f"model.pixel_decoder has {patches} patches a side, the tower's features {self.grid}: "
        f"set its patch_size to image_size / {self.grid}"
      )

  # Features.

  def see(self, images: jax.Array, want: Want = "features") -> Seen:
    """images u8[B,H,W,3] -> what the tower makes of them, features raw, as far as `VisionTower` is asked for it.

    UserError for pictures of another size.
    """
    height, width, side = *images.shape[1:3], self.clip["vision"]["image_size"]
    if (height, width) != (side, side):
      raise UserError(
        f"pictures are {width} x {height}, model.clip.vision.image_size {side}: set data.source.size to it"
      )
    return self.clip_model.see(images, want)

  def standardise(self, raw: jax.Array) -> jax.Array:
    """Raw features f32[...,T,C] -> standardised by the stored statistics."""
    return self.statistics(raw)

  def features(self, batch: Batch) -> jax.Array:
    """Standardised features f32[B,N,T,C] of the batch's pictures, cached or seen now, without gradients."""
    if batch.features is not None:
      return batch.features.astype(jnp.float32)
    b, n = batch.images.shape[:2]
    raw = self.see(batch.images.reshape(b * n, *batch.images.shape[2:])).features
    return shard(jax.lax.stop_gradient(self.standardise(raw).reshape(b, n, *self.feature_shape)), "batch")

  # Understanding.

  def embed_stream(self, tokens: jax.Array, image_index: jax.Array, features: jax.Array | None) -> jax.Array:
    """The stream's inputs f[B,S,D]: words, and projected features f32[B,N,T,C] where image_index >= 0."""
    tokens, image_index = (shard(ids, "batch", "sequence") for ids in (tokens, image_index))
    x = self.language_model.embed(tokens)
    if features is None:
      return x
    b = tokens.shape[0]
    pictures = self.image_connector(features) + self.image_grid().astype(self.dtype)
    pictures = pictures.reshape(b, -1, pictures.shape[-1])
    slots = jnp.take_along_axis(pictures, jnp.maximum(image_index, 0)[..., None], axis=1)
    return jnp.where((image_index >= 0)[..., None], slots, x)

  def read(self, batch: Batch, features: jax.Array | None) -> tuple[jax.Array, Context]:
    """The text stream of a batch -> (hidden f[B,S,D], Context)."""
    x = self.embed_stream(batch.tokens, batch.image_index, features)
    return self.language_model.read(x, batch.segments, batch.order, batch.positions)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """hidden f[..., D] -> next-token logits f32[..., V]."""
    return self.language_model.logits(hidden)

  def extend(self, tokens: jax.Array, positions: jax.Array, context: Context, write_at: jax.Array):
    """Words i32[B,Q] at positions i32[B,Q] into the context's buffer -> (logits f32[B,Q,V], Context)."""
    x = self.language_model.embed(tokens)
    positions = jnp.broadcast_to(positions[..., None], (*positions.shape, 3))
    hidden, context = self.language_model.extend(x, positions, context, write_at)
    return self.logits(hidden), context

  # Drawing.

  def conditioning(self, context: Context, place: Place, levels: int = 1) -> Conditioning:
    """What drawing needs of the stream, for `levels` blocks at each place: made once for all levels and solver steps.

    For the flow expert all that the stream left behind; for the separate drawer its queries' last hidden states,
    f[B,M,Q,D], each place's queries written behind its word.
    """
    if not self.drawer:
      return context, jax.tree.map(lambda a: jnp.repeat(a, levels, axis=1), place)
    asked = jnp.broadcast_to(self.queries.astype(self.dtype), (*place.order.shape, *self.queries.shape))
    positions = place.positions[:, :, None] + jnp.arange(asked.shape[2])
    hidden = self.language_model.ask(asked, positions, place.segments, place.order, context)
    return jnp.repeat(hidden, levels, axis=1)

  def remember(self, context: Given) -> Given:
    """What `predict` makes of a conditioning before it sees time and noise: for a solver, whose steps need it again."""
    if isinstance(context, jax.Array):
      return self.separate_drawer.remember(context.reshape(-1, *context.shape[2:]))
    return context

  def predict(self, x_t: jax.Array, t: jax.Array, context: Given):
    """The drawer's velocities at x_t f32[B,M,T,C], t f32[B,M] -> (full f32[B,M,T,C], early or None)."""

    def to_velocity(out):
      return path.velocity(out, x_t, t) if self.prediction == "x" else out

    given = self.remember(context)
    if isinstance(given, Remembered):
      x_rows, t_rows = (a.reshape(-1, *a.shape[2:]) for a in (x_t, t))
      return to_velocity(self.separate_drawer(x_rows, t_rows, given).reshape(x_t.shape)), None
    stream, place = given
    grid = jnp.pad(grid_positions(self.grid, self.grid), ((self.flow_head.time_tokens, 0), (0, 0)))
    positions = place.positions[:, :, None, None] + grid
    z = self.flow_head.enter(x_t, t)
    hidden, early = self.language_model.draw(z, positions, place.segments, place.order, stream)
    full = to_velocity(self.flow_head.leave(hidden))
    return full, None if early is None else to_velocity(self.flow_head.leave(early, early=True))

  def velocity(self, x_t: jax.Array, t: jax.Array, context: Given) -> jax.Array:
    """v f32[B,M,T,C] at x_t f32[B,M,T,C], t f32[B,M], given what to draw: where drawers meet solvers."""
    return self.predict(x_t, t, context)[0]

  def decode(self, features: jax.Array, noisy: jax.Array | None = None, t: jax.Array | None = None) -> jax.Array:
    """Standardised features f32[B,T,C] -> pictures f32[B,H,W,3] in -1..1 (a flow: from noisy ones at t)."""
    return self.decoder(features, noisy, t)

  def pixels(self, features: jax.Array) -> jax.Array:
    """Standardised features f32[B,T,C] -> u8[B,H,W,3] by the deterministic decoder."""
    return to_pixels(self.decode(features))

  def everything(self, batch: Batch) -> None:
    """Touches every part once, so that `init` makes every parameter."""
    b, n = batch.image_roles.shape
    images = batch.images.reshape(b * n, *batch.images.shape[2:])
    seen = self.see(images)
    if self.clip.get("text"):
      words = min(self.clip["text"]["length"], batch.tokens.shape[1])
      self.clip_model.embed_text(batch.tokens[:, :words], batch.segments[:, :words] > 0)
      self.clip_model.temperature()
    if self.clip.get("captioner"):
      repeated = jnp.repeat(batch.tokens, n, axis=0)
      words = self.clip_model.caption(repeated, seen.tokens, jnp.repeat(batch.segments, n, axis=0))
      self.clip_model.caption_model.logits(words)
      self.clip_model.read_pixels(seen.tokens)
    features = self.features(batch)
    if self.transformer:
      hidden, context = self.read(batch, features)
      self.logits(hidden)
      if self.draws:
        place = Place(batch.image_segments, batch.image_order, batch.image_positions)
        self.predict(features, jnp.ones((b, n)), self.conditioning(context, place))
    if self.pixel_decoder:
      flat = features.reshape(b * n, *self.feature_shape)
      side = self.pixel_decoder["image_size"]
      self.decode(flat, images[:, :side, :side].astype(jnp.float32), jnp.ones(b * n))
