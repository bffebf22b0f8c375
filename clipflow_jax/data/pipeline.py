"""One batch's way from a source to the step: Grain's MapDataset, packed, batched, prefetched.

The stream of batches is a pure function of (sources, settings, seed): it is cut into a fixed number of shards, each of
which makes its own rows of every batch, and a process reads the shards that its rows belong to. Where each shard stands
is a small dict in checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from clipflow_jax.batch import Batch
from clipflow_jax.data import sequence
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import IMAGE_MARKER, BadRecord, Dialogue, Example
from clipflow_jax.data.mixture import Order, Part
from clipflow_jax.data.sequence import CAPTION, Conversation, Layout
from clipflow_jax.data.text import Chat
from clipflow_jax.errors import UserError

Rng = np.random.Generator
# What a thread makes at a time: for each thing that Grain takes from a thread it works a tenth of a millisecond, and
# holds the others up.
TOGETHER = 8


def converse(example: Example, part: Part, rng: Rng, drop_text: float) -> Conversation:
  """The description, or as often what else is said: a conversation as it was held, or all questions in any order.

  What is said of a picture must be read from it, not from before.
  """
  if (example.questions or example.dialogue) and (not example.description or rng.random() >= 0.5):
    if example.dialogue:
      return sequence.held(example.dialogue, _phrasing(part.ask, rng))
    told = tuple(example.questions[i] for i in rng.permutation(len(example.questions)))
  else:
    told = _described(example, part, rng)
  return sequence.read(example.image, told, _phrasing(part.ask, rng))


def ask(example: Example, part: Part, rng: Rng, drop_text: float) -> Conversation:
  """One of the questions, or a conversation up to one of its answers; where there are none, the description."""
  if example.dialogue:
    until = example.dialogue.until(int(rng.integers(example.dialogue.answers)))
    return sequence.held(until, _phrasing(part.ask, rng))
  known = example.questions or _described(example, part, rng)
  return sequence.read(example.image, (known[int(rng.integers(len(known)))],), _phrasing(part.ask, rng))


def draw(example: Example, part: Part, rng: Rng, drop_text: float) -> Conversation:
  """Draw one of the captions; with probability drop_text the text is empty, for guidance and unconditional drawing."""
  captions = _captions(example)
  if rng.random() < drop_text:
    return sequence.drawn("", example.image)
  text = str(rng.choice(captions))
  return sequence.drawn(_phrasing(part.draw, rng).replace(CAPTION, text), example.image)


def edit(example: Example, part: Part, rng: Rng, drop_text: float) -> Conversation:
  """Draw what a caption makes of the picture before it; with probability drop_text neither is there, as in `draw`."""
  if example.before is None:
    raise BadRecord(example.id, "no picture before it: what is to be edited needs 'before'")
  if rng.random() < drop_text:
    return sequence.drawn("", example.image)
  return sequence.edited(example.before, str(rng.choice(example.captions)), example.image, _phrasing(part.edit, rng))


def caption(example: Example, part: Part, rng: Rng, drop_text: float) -> Conversation:
  """A caption for CLIP."""
  return sequence.words(str(rng.choice(_captions(example))), example.image)


def talk(example: Example, part: Part, rng: Rng, drop_text: float) -> Conversation:
  """What is said, without its pictures; where nothing is, the description as an answer to nothing."""
  if example.dialogue:
    turns = tuple((role, text.replace(IMAGE_MARKER, "").strip()) for role, text in example.dialogue.turns)
    return sequence.held(Dialogue(turns, example.dialogue.images[:0]))
  return sequence.talked(example.questions or (("", example.description),), example.image)


TASKS: dict[str, Callable[[Example, Part, Rng, float], Conversation]] = {
  "caption": caption,
  "draw": draw,
  "converse": converse,
  "ask": ask,
  "talk": talk,
  "edit": edit,
}
PICTURES = dict.fromkeys(TASKS, 1) | {"talk": 0, "edit": 2}  # that an example of a task takes in its row


def _captions(example: Example) -> tuple[str, ...]:
  if not example.captions:
    raise BadRecord(
      example.id,
      'no caption: a conversation alone is neither drawn nor for CLIP; give its source role="understand", or a caption',
    )
  return example.captions


def _described(example: Example, part: Part, rng: Rng) -> tuple[tuple[str, str], ...]:
  return ((_phrasing(part.describe, rng), example.description),)


def _phrasing(phrasings: tuple[str, ...], rng: Rng) -> str:
  return phrasings[int(rng.integers(len(phrasings)))] if len(phrasings) > 1 else phrasings[0]


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How examples become rows.

  parts: the sources, each with its weight and role.
  tasks: name -> weight, of TASKS; each example is put to one of those that its part's role allows (words alone always
    to talk), and Grain packs them, `bins` rows at a time.
  row: instead, names of TASKS in order: every row holds one example of each, as far as their words fit (how many do
    not is counted), of the parts whose role allows it. Each row then has the same mixture and the same number of
    targets, so that no noisy block is computed in vain.
  shards: how many parts the stream is cut into. It is a setting of the stream, not of who reads it: every shard fills
    batch_size / shards rows. A run whose shards are a multiple of its hosts reads nothing twice.
  """

  parts: tuple[Part, ...]
  chat: Chat
  layout: Layout
  batch_size: int
  tasks: dict[str, float]
  row: tuple[str, ...] = ()
  drop_text: float = 0.1
  seed: int = 0
  bins: int = 1
  threads: int = 2
  shards: int = 1

  def __post_init__(self):
    if not 0 <= self.seed < 2**32:
      raise UserError(f"config.seed is {self.seed}: give one from 0 to {2**32 - 1}")
    for name, least in (("batch_size", 1), ("bins", 1), ("threads", 0)):
      if getattr(self, name) < least:
        raise UserError(f"data.{name} is {getattr(self, name)}: give {least} or more")
    if self.shards < 1 or self.batch_size % self.shards:
      raise UserError(f"data.shards {self.shards} must divide data.batch_size {self.batch_size}: change one of them")
    unknown = (set(self.tasks) | set(self.row)) - set(TASKS)
    weights = self.tasks.values()
    if unknown or not all(0 <= weight < np.inf for weight in weights) or not (self.row or sum(weights) > 0):
      raise UserError(
        f"data.tasks {dict(self.tasks)} must weigh by 0 or more, or data.row name, some of {', '.join(TASKS)}, no other"
      )
    for part in self.parts:
      if not (set(self.row) & set(part.tasks) if self.row else self._tasks_of(part)):
        raise UserError(
          f"{part.name}: its role {part.role} is for {', '.join(part.tasks)}, of which data.tasks and data.row want "
          "none: give it another role or leave it out"
        )
    for task in self.row:
      if not any(task in part.tasks for part in self.parts):
        raise UserError(f"data.row wants {task}, for which no source has a role: change one's role, or data.row")
    pictures = sum(PICTURES[task] for task in self.row)
    if pictures > self.layout.images:  # what does not fit would be left out of every row
      raise UserError(
        f"the tasks of data.row take {pictures} pictures, data.images_per_row is {self.layout.images}: raise it to "
        f"{pictures}, or shorten data.row"
      )
    wanted = set(self.row or [task for part in self.parts for task in self._tasks_of(part)])
    if wanted != {"caption"}:
      self.chat.check()
    if wanted & {"converse", "ask", "talk"}:
      self.chat.pieces((("user", "a"), ("assistant", "b")) * 2)  # UserError where the template cannot show a talk

  def _tasks_of(self, part: Part) -> dict[str, float]:
    """{task: weight} of what examples of a part are put to, by name."""
    if part.role == "text":
      return {"talk": 1.0}
    return {task: weight for task, weight in sorted(self.tasks.items()) if task in part.tasks and weight}

  def example(self, item: tuple[int, int], task: str | None, rng: Rng) -> dict[str, np.ndarray]:
    """(part, number of the record in it), put to a task or to one of its part's -> the arrays of one example.

    Raises BadRecord.
    """
    part = self.parts[item[0]]
    record = part.source[item[1]]
    if task is None:
      names, weights = zip(*self._tasks_of(part).items(), strict=True)
      task = names[rng.choice(len(names), p=np.array(weights) / sum(weights))]
    try:
      return sequence.encode(TASKS[task](record, part, rng, self.drop_text), self.chat, self.layout, cut=True)
    except UserError as error:
      kind = "too long" if isinstance(error, sequence.TooLong) else "cannot be told"
      raise BadRecord(record.id, f"{kind}: {error}") from error

  def items(self) -> grain.MapDataset:
    """The endless stream of (part, number of the record in it); with `row`, as many in turn as it has tasks."""
    every = range(len(self.parts))
    slots = [[p for p in every if task in self.parts[p].tasks] for task in self.row] or [list(every)]
    records = [
      grain.MapDataset.range(len(part.source)).shuffle(seed=(self.seed + p) % 2**32).repeat().map(lambda i, p=p: (p, i))
      for p, part in enumerate(self.parts)
    ]
    return grain.MapDataset.select_from_datasets(records, Order(self.parts, slots, self.seed))

  def shards_of(self, rows: np.ndarray) -> list[int]:
    """The shards that fill the given rows of a batch, ascending."""
    return sorted({int(row) // (self.batch_size // self.shards) for row in rows})

  def rows_of(self, shards: Sequence[int]) -> np.ndarray:
    """i64[r]: the rows of a batch that the given shards fill, in their order."""
    return np.arange(self.batch_size).reshape(self.shards, -1)[list(shards)].ravel()

  def batches(self, bad: BadRecords, shards: Sequence[int] | None = None) -> Batches:
    """The endless stream, of which only the rows of `shards` (by default of all) are made. `bad` gets bad records."""
    shards = range(self.shards) if shards is None else shards
    example = bad.guard(self.example)
    stream = self.items().seed(self.seed)

    def in_order(items, rng):
      found = [e for item, task in zip(items, self.row, strict=True) if (e := example(item, task, rng))]
      if not found:
        return None
      row = sequence.pack(found, self.layout)
      bad.leave_out(len(found) - int(row.segments.max()), len(found))
      return row

    if self.row:
      stream = stream.batch(len(self.row), drop_remainder=True, batch_fn=list).random_map(in_order)
    else:
      stream = stream.random_map(lambda item, rng: example(item, None, rng))

    def rows(shard):
      own = ahead(stream[shard :: self.shards], -(-self.threads // len(shards)), 64 // len(shards))
      if self.row:
        return own
      if self.layout.images == 1:  # a picture fills the row: there is nothing to pack
        return own.map(lambda one: sequence.pack([one], self.layout))
      packed = grain.experimental.FirstFitPackIterDataset(
        own,
        length_struct=sequence.lengths(self.layout),
        num_packing_bins=self.bins,
        seed=self.seed,
        shuffle_bins=False,
      )
      return packed.map(lambda row: sequence.finish(row, self.layout))

    parts = {shard: rows(shard).batch(self.batch_size // self.shards, batch_fn=sequence.stack) for shard in shards}
    records = {part.name: len(part.source) for part in self.parts}
    return Batches({shard: iter(part) for shard, part in parts.items()}, self.shards, records)


def ahead(items: grain.MapDataset, threads: int, buffer: int) -> grain.IterDataset:
  """The items that are there, in their order, of which `threads` make about `buffer` before they are taken."""
  lists = items.batch(TOGETHER, drop_remainder=False, batch_fn=lambda some: [item for item in some if item is not None])
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, threads, buffer // TOGETHER))
  return grain.experimental.FlatMapIterDataset(lists.to_iter_dataset(options), _Members())


class _Members(grain.experimental.FlatMapTransform):
  max_fan_out = TOGETHER

  def flat_map(self, element: list[Any]) -> list[Any]:
    return element


class Batches(Iterator[Batch]):
  """An endless stream of numpy Batches of some shards, one shard's rows behind the other's."""

  def __init__(self, parts: dict[int, grain.DatasetIterator], count: int, records: dict[str, int]):
    """parts: {shard: its part of every batch}, of `count` shards in all. records: {source: how many it has}."""
    self._parts, self._count = dict(sorted(parts.items())), count
    self._records = {f"records of {name}": number for name, number in records.items()}

  def __next__(self) -> Batch:
    parts = [next(part) for part in self._parts.values()]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

  def get_state(self) -> dict[str, Any]:
    """{shard: where it stands}: JSON, of the shards that are made here, and what they are made of. Moves nothing."""
    return self._records | {f"{shard} of {self._count}": part.get_state() for shard, part in self._parts.items()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes where `state`, of all shards, says. UserError when it is of other shards, records or another release."""
    for name, number in self._records.items():
      if state.get(name, number) != number:
        raise UserError(
          f"the checkpoint's run has {state[name]} {name}, which now has {number}: in which order they come depends on "
          "it. Bring back what it had, or begin another workdir from this one by init_from"
        )
    for shard, part in self._parts.items():
      name = f"{shard} of {self._count}"
      if name not in state:
        there = ", ".join(sorted(state.keys() - self._records)[:3])
        raise UserError(
          f"the checkpoint's data has the shards {there}, ..., but not {name}: "
          "set data.shards to what the run began with, or use another workdir"
        )
      try:
        part.set_state(state[name])
      except (KeyError, TypeError) as error:
        raise UserError(
          f"the checkpoint says in another form than this release's where the data stand ({error!r}): go on with the "
          "release that wrote it, or begin another workdir from this one by init_from"
        ) from error


def places(state: Any) -> list[int]:
  """How many items each of Grain's iterators in what `Batches.get_state` gave has passed on, wherever it says so."""
  if isinstance(state, dict) and "next_index_in_buffer" in state:  # of lists, of which the last is half taken
    return [lists * TOGETHER + state["next_index_in_buffer"] for lists in places(state["parent"])]
  if isinstance(state, dict) and isinstance(state.get("next_index"), int):
    return [state["next_index"]]
  inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
  return [place for value in inner for place in places(value)]
