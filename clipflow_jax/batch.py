"""The one currency between data, training and models."""

from __future__ import annotations

from typing import Any

import flax.struct

Array = Any  # numpy on the host, jax.Array on devices, ShapeDtypeStruct where only shapes are asked for

ABSENT, INPUT, TARGET, BOTH = 0, 1, 2, 3  # values of Batch.image_roles; INPUT and TARGET are bits


@flax.struct.dataclass
class Batch:
  """B rows of packed examples: a stream of S slots and N pictures (H x W pixels, T tokens of C channels).

  A picture that is *read* takes T slots of the stream; a picture that is *drawn* takes none: its noisy blocks
  stand beside the stream and see it by `image_segments` and `image_order`.
  """

  tokens: Array  # i32[B,S] token ids
  segments: Array  # i32[B,S] 0 padding, 1.. the packed example; attention never crosses
  order: Array  # i32[B,S] place in the example; all tokens of one picture share one value
  positions: Array  # i32[B,S,3] rotary positions (time, row, column); equal thrice for text
  loss_weights: Array  # f32[B,S] weight of predicting this token from the slots before it
  image_index: Array  # i32[B,S] -1 text, else which of the row's N*T picture tokens feeds this slot
  image_roles: Array  # i32[B,N] ABSENT, INPUT, TARGET or BOTH
  image_segments: Array  # i32[B,N] the example that a picture belongs to
  image_order: Array  # i32[B,N] the order at which a target is drawn: it sees the slots of order <= this
  image_positions: Array  # i32[B,N] the rotary time at which a target is drawn
  images: Array | None = None  # u8[B,N,H,W,3] (absent when features are cached)
  features: Array | None = None  # f[B,N,T,C] standardised features (absent when images are given)
