"""From a conversation about pictures to the arrays of one example, and from packed examples to a Batch."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipflow_jax.batch import INPUT, TARGET, Batch
from clipflow_jax.data.example import IMAGE_MARKER, Dialogue
from clipflow_jax.data.text import IMAGE, Chat
from clipflow_jax.errors import UserError


class TooLong(UserError):
  """An example that fits no row. what: that alone, in words."""

  def __init__(self, what: str, text: str):
    super().__init__(f"{what}; shorten it or raise data.length or data.images_per_row: {text[:80]!r}")
    self.what = what


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
  """The static shape of a row: S slots, N pictures of grid x grid tokens. pad: the token of a slot without a word.

  targets: how many of its pictures may be drawn, where Grain packs it (0: all).
  """

  length: int
  images: int
  grid: int
  pad: int = 0
  targets: int = 0

  @property
  def tokens_per_image(self) -> int:
    return self.grid**2


def encode(
  conversation: Conversation, chat: Chat, layout: Layout, *, prompt: bool = False, cut: bool = False
) -> dict[str, np.ndarray]:
  """The un-packed arrays of one example: slots i32[s] (rank-1 Batch fields) and pictures [n].

  IMAGE is one word ("a picture begins"); where the picture is read, its tokens follow at one order, at rotary positions
  (time, time+row, time+column). A picture that is only drawn has no slots, and ends the stream when nothing follows it.
  prompt: the last turn is the user's, and the stream ends where the assistant begins to write. cut: of words alone
  those that do not fit are left out, as CLIP's own tokenizers do.

  Raises TooLong when it does not fit the layout: what a prompt that is too long gets; UserError for what the chat
  template cannot show, or pictures that the text does not name.
  """
  roles = np.asarray(conversation.roles, np.int32)
  ids: list[int] = []
  written: list[bool] = []
  begins: list[int] = []  # which words begin a picture
  if conversation.words_only:
    opening, closing = ([token] if token is not None else [] for token in (chat.begin, chat.eos))
    room = layout.length - len(opening) - len(closing) if cut else None
    ids = [*opening, *chat.encode(chat.without_special(conversation.turns[0][1]))[:room], *closing]
    written = [False] * len(opening) + [True] * (len(ids) - len(opening))
  else:
    for piece, is_written in chat.pieces(conversation.turns, prompt=prompt):
      ids += piece
      written += [is_written] * len(piece)
    begins = [i for i, token in enumerate(ids) if token == chat.image]
    if len(begins) != len(roles):
      raise UserError(f"{len(begins)} {IMAGE} in the text for {len(roles)} pictures: write one for each")
    if begins and not roles[-1] & INPUT and conversation.turns[-1][1].endswith(IMAGE):
      del ids[begins[-1] + 1 :], written[begins[-1] + 1 :]
  read = [i for i, role in zip(begins, conversation.roles, strict=False) if role & INPUT]
  length, n = len(ids) + layout.tokens_per_image * len(read), len(roles)
  if length > layout.length or n > layout.images:
    text = " ".join(text for _, text in conversation.turns)
    what = f"an example of {length} tokens and {n} pictures does not fit a row of {layout.length} and {layout.images}"
    raise TooLong(what, text)

  # A picture that is read takes all its slots, one step of order, and as much time as it has rows.
  word = np.arange(len(ids), dtype=np.int32)
  before = np.searchsorted(read, word).astype(np.int32)  # pictures that are read before each word
  slot, step, time = word + layout.tokens_per_image * before, word + before, word + layout.grid * before
  tokens, index = np.empty(length, np.int32), np.full(length, -1, np.int32)
  weights, order = np.zeros(length, np.float32), np.empty(length, np.int32)
  positions = np.empty((length, 3), np.int32)
  tokens[slot], weights[slot], order[slot], positions[slot] = ids, written, step, time[:, None]
  image_order, image_positions = np.full(n, -1, np.int32), np.zeros(n, np.int32)
  for picture, begin in enumerate(begins):
    image_order[picture], image_positions[picture] = step[begin], time[begin] + 1
    if begin in read:
      own = slice(slot[begin] + 1, slot[begin] + 1 + layout.tokens_per_image)
      cells = np.arange(layout.tokens_per_image)
      row, column = np.divmod(cells, layout.grid)
      tokens[own], order[own], index[own] = chat.image, step[begin] + 1, picture * layout.tokens_per_image + cells
      positions[own] = time[begin] + 1 + np.stack([0 * row, row, column], axis=1)
  return {
    "tokens": tokens,
    "loss_weights": weights,
    "order": order,
    "positions": positions,
    "image_index": index,
    "images": conversation.images,
    "image_roles": roles,
    "image_order": image_order,
    "image_positions": image_positions,
    "targets": np.flatnonzero(roles & TARGET),
  }


SLOTS = ("tokens", "loss_weights", "order", "positions", "image_index")
PICTURES = ("images", "image_roles", "image_order", "image_positions")


def lengths(layout: Layout) -> dict[str, int]:
  """The room that a row has for each field of `encode`: what Grain packs into."""
  pictures = dict.fromkeys(PICTURES, layout.images) | {"targets": layout.targets or layout.images}
  return dict.fromkeys(SLOTS, layout.length) | pictures


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
    tokens=np.where(segments > 0, row["tokens"], np.int32(layout.pad)),
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
  row |= {f"{name}_segment_ids": np.zeros(room[name], np.int32) for name in ("tokens", "images")}
  slot = picture = number = 0
  for example in examples:
    slots = slice(slot, slot + len(example["tokens"]))
    pictures = slice(picture, picture + len(example["images"]))
    if slots.stop > layout.length or pictures.stop > layout.images:
      continue
    number += 1
    for name in SLOTS:
      row[name][slots] = example[name]
    for name in PICTURES:
      row[name][pictures] = example[name]
    row["tokens_segment_ids"][slots] = row["images_segment_ids"][pictures] = number
    slot, picture = slots.stop, pictures.stop
  return finish(row, layout)


def stack(rows: list[Batch]) -> Batch:
  """Rows without the B axis -> one Batch."""
  fields = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(Batch)}
  return Batch(**{name: None if values[0] is None else np.stack(values) for name, values in fields.items()})


def spoken(*runs: str) -> str:
  """People's words as the text of a turn, a picture standing between one run of them and the next.

  IMAGE in them is noise, as any special token, and stands for none.
  """

  def plain(words: str) -> str:
    while (shorter := words.replace(IMAGE, "")) != words:
      words = shorter
    return words

  return IMAGE.join(map(plain, runs))


def drawn(text: str, image: np.ndarray) -> Conversation:
  """Draw `text`, whose truth is the image (as in Example); the empty text is the unconditional case."""
  return Conversation((("user", spoken(text)), ("assistant", IMAGE)), image[None], (TARGET,))


PICTURE, QUESTION, CAPTION = "{picture}", "{question}", "{caption}"
ASK, EDIT = PICTURE + QUESTION, PICTURE + CAPTION


def edited(before: np.ndarray, text: str, image: np.ndarray, edit: str) -> Conversation:
  """Draw what by the text becomes of the picture `before`, whose truth is the image; put together as `edit` has it."""
  words = edit.replace(PICTURE, IMAGE).replace(CAPTION, spoken(text))
  return Conversation((("user", words), ("assistant", IMAGE)), np.stack([before, image]), (INPUT, TARGET))


def beside(question: str, ask: str) -> str:
  """A question with its picture as `ask` puts them, in which PICTURE and QUESTION stand for them."""
  return ask.replace(PICTURE, IMAGE).replace(QUESTION, spoken(question))


def asked(image: np.ndarray, question: str, ask: str = ASK) -> Conversation:
  """A question about image u8[H,W,3] that waits for its answer."""
  return Conversation((("user", beside(question, ask)),), image[None], (INPUT,))


def read(image: np.ndarray, exchanges: tuple[tuple[str, str], ...], ask: str = ASK) -> Conversation:
  """Questions and answers about image u8[H,W,3], which stands beside the first question."""
  turns: list[tuple[str, str]] = []
  for i, (question, answer) in enumerate(exchanges):
    turns += [("user", spoken(question) if i else beside(question, ask)), ("assistant", spoken(answer))]
  return Conversation(tuple(turns), image[None], (INPUT,))


def held(dialogue: Dialogue, ask: str = ASK) -> Conversation:
  """A conversation as it was held, its pictures read where they stand, or a single one beside the first words."""
  turns = [(role, spoken(*text.split(IMAGE_MARKER))) for role, text in dialogue.turns]
  if len(dialogue.images) and not dialogue.marked:
    first = [role for role, _ in turns].index("user")
    turns[first] = ("user", beside(turns[first][1], ask))
  return Conversation(tuple(turns), dialogue.images, (INPUT,) * len(dialogue.images))


def talked(exchanges: tuple[tuple[str, str], ...], image: np.ndarray) -> Conversation:
  """Questions and answers alone; of image u8[H,W,3] only the shape is taken, which all of a row's pictures share."""
  turns = (turn for question, answer in exchanges for turn in (("user", question), ("assistant", answer)))
  return Conversation(tuple((role, spoken(text)) for role, text in turns), image[None][:0], ())


def words(text: str, image: np.ndarray) -> Conversation:
  """A caption beside image u8[H,W,3], for CLIP's two towers."""
  return Conversation((("user", text),), image[None], (INPUT,), words_only=True)
