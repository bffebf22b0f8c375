"""A ClipFlow small enough to compile in a second, and packed batches for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.batch import BOTH, INPUT, TARGET, Batch
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.training.state import flatten, nest

SIZE, PATCH, GRID, TOKENS, CHANNELS = 16, 8, 2, 4, 32  # pictures of 16 px are 2 x 2 tokens of 32 channels
VOCABULARY, LENGTH, PICTURES = 50, 24, 3

ATTENTION = dict(heads=2, kv_heads=1, head_dim=16)
FIELDS: dict[str, Any] = dict(
  clip=dict(
    vision=dict(image_size=SIZE, patch_size=PATCH, width=CHANNELS, layers=2, heads=2, mlp=48, embedding=16),
    text=dict(vocabulary=VOCABULARY, length=LENGTH, width=16, layers=1, heads=2, mlp=32, embedding=16),
    captioner=dict(vocabulary=VOCABULARY, width=16, layers=1, mlp=32, **ATTENTION),
  ),
  transformer=dict(
    vocabulary=VOCABULARY,
    width=32,
    layers=2,
    mlp=48,
    flow_width=24,
    flow_mlp=40,
    early_layer=1,
    rope_sections=(4, 2, 2),
    qkv_bias=True,
    **ATTENTION,
  ),
  pixel_decoder=dict(image_size=SIZE, patch_size=PATCH, width=32, layers=1, heads=2, mlp=48),
  shift_scale=20.0,
)


def model(**fields: Any) -> ClipFlow:
  """The tiny ClipFlow, `fields` in place of its own."""
  return ClipFlow(**(FIELDS | fields))


def random_params(abstract: Any, seed: int = 0) -> Any:
  """Parameters of the given shapes, none of them a special value: biases and gains are random too. Compiles nothing."""
  rng = np.random.default_rng(seed)

  def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.normal(size=shape)
    if path.endswith("kernel"):
      return noise * shape[-2] ** -0.5
    return np.exp(0.1 * noise) if path.endswith(("scale", "std")) else 0.3 * noise

  flat = {path: jnp.asarray(draw(path, leaf.shape), leaf.dtype) for path, leaf in flatten(abstract).items()}
  return nest(flat)


@functools.cache
def params(flow_decoder: bool = False) -> Any:
  """Parameters of `model()`, or of the one whose decoder is a flow."""
  whole = model(pixel_decoder=dict(FIELDS["pixel_decoder"], flow=flow_decoder))
  init = functools.partial(whole.init, method="everything")
  abstract = jax.eval_shape(init, jax.random.key(0), batch())["params"]
  with jax.ensure_compile_time_eval():  # arrays, also for who asks first while something is traced
    return random_params(abstract)


# What an example is made of: this many words, or a picture that is read (INPUT), drawn (TARGET) or BOTH.
Part = int | str
READ, DRAW, READ_AND_DRAW = "read", "draw", "both"
ROLES = {READ: INPUT, DRAW: TARGET, READ_AND_DRAW: BOTH}
Example = dict[str, np.ndarray]


def example(rng: np.random.Generator, *parts: Part) -> Example:
  """The arrays of one example. Each picture begins with one word, and where it is read its tokens follow it."""
  slots: list[tuple] = []  # order, positions, image_index, loss_weight
  pictures: list[tuple] = []  # role, order, rotary time
  order = time = 0

  def word() -> None:
    nonlocal order, time
    slots.append((order, (time,) * 3, -1, float(rng.integers(2))))
    order, time = order + 1, time + 1

  for part in parts:
    if isinstance(part, int):
      for _ in range(part):
        word()
      continue
    word()
    first = len(pictures) * TOKENS
    pictures.append((ROLES[part], order - 1, time))
    if ROLES[part] & INPUT:
      places = [(time, time + token // GRID, time + token % GRID) for token in range(TOKENS)]
      slots += [(order, place, first + token, 0.0) for token, place in enumerate(places)]
      order, time = order + 1, time + GRID
  orders, positions, index, weights = zip(*slots, strict=True)
  roles, image_order, image_positions = zip(*pictures, strict=True) if pictures else ((), (), ())
  return {
    "tokens": rng.integers(1, VOCABULARY, len(slots), dtype=np.int32),
    "order": np.array(orders, np.int32),
    "positions": np.array(positions, np.int32),
    "image_index": np.array(index, np.int32),
    "loss_weights": np.array(weights, np.float32),
    "image_roles": np.array(roles, np.int32),
    "image_order": np.array(image_order, np.int32),
    "image_positions": np.array(image_positions, np.int32),
    "images": rng.integers(0, 256, (len(pictures), SIZE, SIZE, 3), dtype=np.uint8),
  }


def pack(rows: Sequence[Sequence[Example]], length: int = LENGTH, pictures: int = PICTURES) -> Batch:
  """Each row's examples one behind the other, then padding: zeros, and -1 in image_index."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *[_row(row, length, pictures) for row in rows])


def _row(examples: Sequence[Example], length: int, pictures: int) -> Batch:
  def joined(name: str, room: int, values: list[np.ndarray], fill: int = 0) -> np.ndarray:
    like = example(np.random.default_rng(0), 1)[name]
    out = np.full((room, *like.shape[1:]), fill, like.dtype)
    found = np.concatenate([like[:0], *values])
    assert len(found) <= room, f"{name}: {len(found)} do not fit {room}"
    out[: len(found)] = found
    return out

  def of(name: str) -> list[np.ndarray]:
    return [one[name] for one in examples]

  counts = np.cumsum([0, *(len(roles) for roles in of("image_roles"))])
  index = [np.where(own < 0, -1, own + TOKENS * before) for own, before in zip(of("image_index"), counts)]
  segments = [np.full(len(own), i + 1) for i, own in enumerate(of("tokens"))]
  image_segments = [np.full(len(own), i + 1) for i, own in enumerate(of("image_roles"))]
  slots = {name: joined(name, length, of(name)) for name in ("tokens", "order", "positions", "loss_weights")}
  drawn = ("image_roles", "image_order", "image_positions", "images")
  return Batch(
    **slots,
    **{name: joined(name, pictures, of(name)) for name in drawn},
    segments=joined("tokens", length, segments),
    image_index=joined("image_index", length, index, fill=-1),
    image_segments=joined("image_roles", pictures, image_segments),
  )


def batch(seed: int = 0) -> Batch:
  """Two rows: several packed examples with padding behind them, and one that fills the row."""
  rng = np.random.default_rng(seed)
  first = [example(rng, 3, READ, 2), example(rng, 4, DRAW), example(rng, 1, READ_AND_DRAW)]
  second = [example(rng, 2, READ, 10, DRAW, 4)]
  assert sum(len(one["tokens"]) for one in first) < LENGTH
  return pack([first, second])
