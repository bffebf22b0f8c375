"""From a conversation about pictures to the arrays of one example, and from packed examples to a Batch."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipflow_jax.batch import INPUT, TARGET, Batch
from clipflow_jax.data.text import IMAGE, Chat
from clipflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
  """turns: (role, text), IMAGE in a text standing for the next picture. images: u8[n,H,W,3], or their cached
  features bf16[n,T,C]; roles i32[n].

  words_only: the turns are one plain text without a template, for CLIP; its pictures are not in the stream.
  """

  turns: tuple[tuple[str, str], ...]
  images: np.ndarray
  roles: tuple[int, ...]
  words_only: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
  """The static shape of a row: S slots, N pictures of grid x grid tokens."""

  length: int
  images: int
  grid: int

  @property
  def tokens_per_image(self) -> int:
    return self.grid**2


def encode(conversation: Conversation, chat: Chat, layout: Layout, *, prompt: bool = False) -> dict[str, np.ndarray]:
  """The un-packed arrays of one example: slots i32[s] (rank-1 Batch fields) and pictures [n].

  IMAGE is one word ("a picture begins"); where the picture is read, its tokens follow at one order, at rotary positions
  (time, time+row, time+column). A picture that is only drawn has no slots, and ends the stream when nothing follows it.
  prompt: the last turn is the user's, and the stream ends where the assistant begins to write.

  Raises UserError when it does not fit the layout: what a prompt that is too long gets.
  """
  ids, written, image_of = [], [], []
  if conversation.words_only:
    ids = [chat.begin, *chat.encode(chat.without_special(conversation.turns[0][1])), chat.end]
    written = [False] + [True] * (len(ids) - 1)
    image_of = [-1] * len(ids)
  else:
    seen = 0
    for piece, is_written in chat.pieces(conversation.turns, prompt=prompt):
      for token in piece:
        ids.append(token)
        written.append(is_written)
        image_of.append(seen if token == chat.image else -1)
        seen += token == chat.image
    if seen != len(conversation.roles):
      raise UserError(f"{seen} {IMAGE} in the text for {len(conversation.roles)} pictures: write one for each")
    last = max((i for i, image in enumerate(image_of) if image >= 0), default=-1)
    if last >= 0 and not conversation.roles[image_of[last]] & INPUT and set(ids[last + 1 :]) <= {chat.end}:
      ids, written, image_of = ids[: last + 1], written[: last + 1], image_of[: last + 1]
  return _lay_out(ids, written, image_of, conversation, chat, layout)


def _lay_out(ids, written, image_of, conversation, chat, layout) -> dict[str, np.ndarray]:
  grid, per_image = layout.grid, layout.tokens_per_image
  roles = np.asarray(conversation.roles, np.int32)
  image_of = np.asarray(image_of, np.int32)
  begins = np.flatnonzero(image_of >= 0)  # the words that begin a picture
  followed = np.zeros(len(ids), np.int32)
  followed[begins] = (roles[image_of[begins]] & INPUT) > 0
  # The stream in order: words, each one slot and one step of time, and pictures, each all its slots and a grid of time.
  word = np.repeat(np.arange(len(ids)), 1 + followed)
  is_picture = np.append(False, word[1:] == word[:-1])
  time = np.cumsum(np.where(is_picture, grid, 1)) - np.where(is_picture, grid, 1)
  owner = np.repeat(np.arange(len(word)), np.where(is_picture, per_image, 1))
  length, n = len(owner), len(roles)
  if length > layout.length or n > layout.images:
    text = " ".join(text for _, text in conversation.turns)
    raise UserError(
      f"an example of {length} tokens and {n} pictures does not fit a row of {layout.length} and {layout.images}; "
      f"shorten it or raise data.length or data.images_per_row: {text[:80]!r}"
    )
  in_picture = is_picture[owner]
  positions = np.repeat(time[owner, None], 3, axis=1).astype(np.int32)
  index = np.full(length, -1, np.int32)
  if in_picture.any():
    row, column = np.divmod(np.arange(per_image), grid)
    read = image_of[word[is_picture]]
    positions[in_picture] += np.tile(np.stack([0 * row, row, column], axis=1), (len(read), 1))
    index[in_picture] = (read[:, None] * per_image + np.arange(per_image)).ravel()
  first = np.flatnonzero(~is_picture)[begins]  # where in the stream the pictures' words stand
  image_order, image_positions = np.full(n, -1, np.int32), np.zeros(n, np.int32)
  image_order[image_of[begins]], image_positions[image_of[begins]] = first, time[first] + 1
  return {
    "tokens": np.asarray(ids, np.int32)[word[owner]],
    "loss_weights": np.where(in_picture, 0, np.asarray(written, np.float32)[word[owner]]).astype(np.float32),
    "order": owner.astype(np.int32),
    "positions": positions,
    "image_index": index,
    "images": conversation.images,
    "image_roles": roles,
    "image_order": image_order,
    "image_positions": image_positions,
  }


SLOTS = ("tokens", "loss_weights", "order", "positions", "image_index")
PICTURES = ("images", "image_roles", "image_order", "image_positions")


def lengths(layout: Layout) -> dict[str, int]:
  """The room that a row has for each field of `encode`: what Grain packs into."""
  return dict.fromkeys(SLOTS, layout.length) | dict.fromkeys(PICTURES, layout.images)


def finish(row: dict[str, np.ndarray], layout: Layout) -> Batch:
  """One packed row (Grain's packing of `encode`d examples, with its *_segment_ids) -> a Batch without the B axis.

  image_index counts the pictures of its own example; here it becomes an index into all of the row's pictures.
  """
  segments, image_segments = row["tokens_segment_ids"], row["images_segment_ids"]
  first = np.searchsorted(
    image_segments[image_segments > 0], segments
  )  # the row's first picture of each slot's example
  index = np.where(row["image_index"] < 0, -1, row["image_index"] + first * layout.tokens_per_image)
  return Batch(
    tokens=row["tokens"],
    segments=segments.astype(np.int32),
    order=row["order"],
    positions=row["positions"],
    loss_weights=row["loss_weights"],
    image_index=np.where(segments > 0, index, -1).astype(np.int32),
    image_roles=row["image_roles"],
    image_segments=image_segments.astype(np.int32),
    image_order=row["image_order"],
    image_positions=row["image_positions"],
    **{"images" if row["images"].dtype == np.uint8 else "features": row["images"]},
  )


def pack(examples: list[dict[str, np.ndarray]], layout: Layout) -> Batch:
  """One row of the examples in their order, leaving out those for which no room is left."""
  room = lengths(layout)
  row = {name: np.zeros((room[name], *value.shape[1:]), value.dtype) for name, value in examples[0].items()}
  used, number = dict.fromkeys(room, 0), 0
  row |= {f"{name}_segment_ids": np.zeros(room[name], np.int32) for name in ("tokens", "images")}
  for example in examples:
    if any(used[name] + len(value) > room[name] for name, value in example.items()):
      continue
    number += 1
    for name, value in example.items():
      place = slice(used[name], used[name] + len(value))
      row[name][place] = value
      if f"{name}_segment_ids" in row:
        row[f"{name}_segment_ids"][place] = number
      used[name] = place.stop
  return finish(row, layout)


def stack(rows: list[Batch]) -> Batch:
  """Rows without the B axis -> one Batch."""
  fields = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(Batch)}
  return Batch(**{name: None if values[0] is None else np.stack(values) for name, values in fields.items()})


def drawn(text: str, image: np.ndarray) -> Conversation:
  """Draw `text`, whose truth is the image (as in Example); the empty text is the unconditional case."""
  return Conversation((("user", text), ("assistant", IMAGE)), image[None], (TARGET,))


def asked(image: np.ndarray, question: str) -> Conversation:
  """A question about image u8[H,W,3] that waits for its answer."""
  return Conversation((("user", IMAGE + question),), image[None], (INPUT,))


def read(image: np.ndarray, exchanges: tuple[tuple[str, str], ...]) -> Conversation:
  """Questions and answers about image u8[H,W,3], which stands before the first question."""
  turns: list[tuple[str, str]] = []
  for i, (question, answer) in enumerate(exchanges):
    turns += [("user", (IMAGE if i == 0 else "") + question), ("assistant", answer)]
  return Conversation(tuple(turns), image[None], (INPUT,))


def talked(exchanges: tuple[tuple[str, str], ...], image: np.ndarray) -> Conversation:
  """Questions and answers alone; of image u8[H,W,3] only the shape is taken, which all of a row's pictures share."""
  turns = tuple(turn for question, answer in exchanges for turn in (("user", question), ("assistant", answer)))
  return Conversation(turns, image[None][:0], ())


def words(text: str, image: np.ndarray) -> Conversation:
  """A caption beside image u8[H,W,3], for CLIP's two towers."""
  return Conversation((("user", text),), image[None], (INPUT,), words_only=True)
