"""One batch's way from a source to the step: Grain's MapDataset, packed, batched, prefetched.

The stream of batches is a pure function of (source, settings, seed); where it stands is a small dict that checkpoints keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from clipflow_jax.batch import Batch
from clipflow_jax.data import sequence
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.data.sequence import Conversation, Layout
from clipflow_jax.data.text import Chat
from clipflow_jax.errors import UserError

DESCRIBE = "describe the picture."


def converse(example: Example, rng: np.random.Generator, drop_text: float) -> Conversation:
  """The picture's description, then its questions."""
  return sequence.read(example.image, ((DESCRIBE, example.description), *example.questions))


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
  """tasks: name -> weight, of TASKS; each example is put to one of them. bins: rows that packing fills at a time."""

  source: Any
  chat: Chat
  layout: Layout
  batch_size: int
  tasks: dict[str, float]
  drop_text: float = 0.1
  seed: int = 0
  bins: int = 1
  threads: int = 2

  def __post_init__(self):
    unknown = set(self.tasks) - set(TASKS)
    if unknown or not sum(self.tasks.values()) > 0:
      raise UserError(
        f"data.tasks {dict(self.tasks)} must give a weight to some of {', '.join(TASKS)}, and no other"
      )

  def example(self, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Record i under a random task -> the arrays of one example. Raises BadRecord."""
    record = self.source[i]
    names, weights = zip(*sorted(self.tasks.items()), strict=True)
    task = names[rng.choice(len(names), p=np.array(weights) / sum(weights))]
    try:
      return sequence.encode(TASKS[task](record, rng, self.drop_text), self.chat, self.layout)
    except UserError as error:
      raise BadRecord(record.id, f"too long: {error}") from error

  def batches(self, bad: BadRecords) -> grain.DatasetIterator:
    """An endless iterator of Batches (numpy). Its get_state() and set_state() resume it anywhere. Bad records go to `bad`."""
    rows = grain.MapDataset.range(len(self.source)).shuffle(seed=self.seed).repeat()
    rows = rows.seed(self.seed).random_map(bad.guard(self.example))
    stream = rows.to_iter_dataset(grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=64))
    if self.layout.images == 1:  # a picture fills the row: there is nothing to pack
      finished = stream.map(lambda example: sequence.pad(example, self.layout))
    else:
      packed = grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct=sequence.lengths(self.layout),
        num_packing_bins=self.bins,
        seed=self.seed,
        shuffle_bins=False,
      )
      finished = packed.map(lambda row: sequence.finish(row, self.layout))
    return iter(finished.batch(self.batch_size, batch_fn=sequence.stack))
