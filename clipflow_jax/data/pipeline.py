"""One batch's way from a source to the step: Grain's MapDataset, packed, batched, prefetched.

The stream of batches is a pure function of (source, settings, seed); where it stands is a small dict in checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from clipflow_jax.data import sequence
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.sequence import Conversation, Layout
from clipflow_jax.data.text import Chat
from clipflow_jax.errors import UserError

DESCRIBE = "describe the picture."


def converse(example: Example, rng: np.random.Generator, drop_text: float) -> Conversation:
  """The picture's description, or as often its questions: whatever is said of it must be read from it, not from before."""
  if not example.questions or rng.random() < 0.5:
    return sequence.read(example.image, ((DESCRIBE, example.description),))
  return sequence.read(example.image, tuple(example.questions[i] for i in rng.permutation(len(example.questions))))


def draw(example: Example, rng: np.random.Generator, drop_text: float) -> Conversation:
  """Draw one of the captions; with probability drop_text the text is empty, for guidance and unconditional drawing."""
  text = "" if rng.random() < drop_text else str(rng.choice(example.captions))
  return sequence.drawn(text, example.image)


def caption(example: Example, rng: np.random.Generator, drop_text: float) -> Conversation:
  """A caption for CLIP."""
  return sequence.words(str(rng.choice(example.captions)), example.image)


TASKS: dict[str, Callable[[Example, np.random.Generator, float], Conversation]] = {
  "caption": caption,
  "draw": draw,
  "converse": converse,
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How examples become rows.

  tasks: name -> weight, of TASKS; each example is put to one of them, and Grain packs them, `bins` rows at a time.
  row: instead, names of TASKS in order: every row holds one example of each, as far as they fit. Each row then has the
    same mixture and the same number of targets, so that no noisy block is computed in vain.
  """

  source: Any
  chat: Chat
  layout: Layout
  batch_size: int
  tasks: dict[str, float]
  row: tuple[str, ...] = ()
  drop_text: float = 0.1
  seed: int = 0
  bins: int = 1
  threads: int = 2

  def __post_init__(self):
    unknown = (set(self.tasks) | set(self.row)) - set(TASKS)
    if unknown or not (self.row or sum(self.tasks.values()) > 0):
      raise UserError(
        f"data.tasks {dict(self.tasks)} must weigh, or data.row name, some of {', '.join(TASKS)}, and no other"
      )

  def example(self, i: int, task: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Record i put to a task -> the arrays of one example. Raises BadRecord."""
    record = self.source[i]
    try:
      return sequence.encode(TASKS[task](record, rng, self.drop_text), self.chat, self.layout)
    except UserError as error:
      raise BadRecord(record.id, f"too long: {error}") from error

  def batches(self, bad: BadRecords) -> grain.DatasetIterator:
    """An endless iterator of numpy Batches; its get_state() and set_state() resume it anywhere. `bad` gets bad ones."""
    example = bad.guard(self.example)
    records = grain.MapDataset.range(len(self.source)).shuffle(seed=self.seed).repeat().seed(self.seed)
    options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=64)

    def at_random(i, rng):
      names, weights = zip(*sorted(self.tasks.items()), strict=True)
      return example(i, names[rng.choice(len(names), p=np.array(weights) / sum(weights))], rng)

    def in_order(indices, rng):
      found = [e for i, task in zip(indices, self.row, strict=True) if (e := example(i, task, rng))]
      return sequence.pack(found, self.layout) if found else None

    if self.row:
      rows = records.batch(len(self.row), drop_remainder=True).random_map(in_order).to_iter_dataset(options)
    elif self.layout.images == 1:  # a picture fills the row: there is nothing to pack
      stream = records.random_map(at_random).to_iter_dataset(options)
      rows = stream.map(lambda one: sequence.pack([one], self.layout))
    else:
      packed = grain.experimental.FirstFitPackIterDataset(
        records.random_map(at_random).to_iter_dataset(options),
        length_struct=sequence.lengths(self.layout),
        num_packing_bins=self.bins,
        seed=self.seed,
        shuffle_bins=False,
      )
      rows = packed.map(lambda row: sequence.finish(row, self.layout))
    return iter(rows.batch(self.batch_size, batch_fn=sequence.stack))
