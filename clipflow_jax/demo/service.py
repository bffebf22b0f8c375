"""The model behind a queue: from what is asked to pieces of work, and from those, side by side, to answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from clipflow_jax.data.text import Chat
from clipflow_jax.demo import schemas
from clipflow_jax.demo.batching import Batcher, Job
from clipflow_jax.demo.schemas import ChatRequest, EditRequest, ImageRequest, Refused
from clipflow_jax.errors import UserError
from clipflow_jax.inference import writing
from clipflow_jax.inference.forming import Forming
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.inference.writing import Written

log = logging.getLogger(__name__)

NEW = 64  # words of an answer, where none are asked for
WORDS = 24  # of a usual question or prompt


@dataclasses.dataclass(frozen=True)
class Draw:
  """What pictures must share to be drawn in one batch."""

  steps: int
  guidance: float
  edits: bool  # of pictures, which makes the rows others


@dataclasses.dataclass(frozen=True)
class Talk:
  """Answers share nothing: any go into one batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
  prompt: str
  seed: int
  before: np.ndarray | None = None  # u8[H,W,3], of an edit


@dataclasses.dataclass(frozen=True)
class Asked:
  messages: list[dict]  # as `ClipFlow.chat` takes them
  new: int
  temperature: float
  seed: int


class Metrics:
  """What /metrics tells, in a registry of its own."""

  def __init__(self) -> None:
    self.registry = CollectorRegistry()
    ProcessCollector(registry=self.registry)
    own: dict[str, Any] = {"registry": self.registry}
    self.requests = Counter("clipflow_requests", "Requests answered", ["route", "status"], **own)
    self.seconds = Histogram("clipflow_request_seconds", "From a request to the end of its answer", ["route"], **own)
    sizes = (1, 2, 4, 8, 16, 32, 64)
    self.batches = Histogram("clipflow_batch_size", "Items computed together", ["kind"], buckets=sizes, **own)
    self.queue = Gauge("clipflow_queue_length", "Items that wait", **own)


class Service:
  """A model, which is from then on the service's own, and its queue.

  name: of the model over HTTP; size: items of a batch at most; wait, limit: as `Batcher`.
  """

  def __init__(self, model: ClipFlow, name: str, *, size: int = 16, wait: float = 0.005, limit: int = 128):
    self.model, self.name, self.metrics = model, name, Metrics()
    # One length of rows for most of what is asked: a picture and some words.
    model.shortest = 1 << (model.model.grid**2 + WORDS - 1).bit_length()
    # Strangers' texts would fill the memory.
    model.tokenizer = Chat(model.tokenizer.tokenizer, remember=64, ends=model.tokenizer.ends)
    self.forming = Forming(model)  # compiles nothing anew for other steps or guidance
    most = min(size, model.batch_size)
    # Batches are filled up to one of these: each has to be compiled before the first answer.
    self.sizes = [*(4**i for i in range(8) if 4**i < most), most]
    self.batcher = Batcher(self._compute, size=most, wait=wait, limit=limit)
    self.metrics.queue.set_function(lambda: self.batcher.length)
    self.ready = False
    self.worker: asyncio.Task | None = None
    self._unpacking = ThreadPoolExecutor(1)  # pictures one at a time: each may take much memory

  def _compute(self, settings: Draw | Talk, items: list) -> Iterator[Sequence]:
    self.metrics.batches.labels(type(settings).__name__.lower()).observe(len(items))
    size = next(size for size in self.sizes if size >= len(items))
    for pieces in self._run(settings, items + [items[-1]] * (size - len(items))):
      yield pieces[: len(items)]

  def _run(self, settings: Draw | Talk, items: list) -> Iterator[Sequence]:
    if isinstance(settings, Draw):
      prompts, seeds = [item.prompt for item in items], [item.seed for item in items]
      images = np.stack([item.before for item in items]) if settings.edits else None
      (drawn,) = self.forming.draw(prompts, settings.steps, settings.guidance, seeds, looks=1, images=images)
      yield list(self.model.decode(drawn.features, seeds))
    else:
      new, heat, seeds = ([getattr(item, name) for item in items] for name in ("new", "temperature", "seed"))
      talks, room = [item.messages for item in items], schemas.MAX_TOKENS
      yield from writing.stream(self.model, talks, new=new, temperature=heat, seeds=seeds, room=room)

  @contextlib.asynccontextmanager
  async def running(self) -> AsyncIterator[None]:
    """Works while open; what comes in waits until all is compiled."""
    self.worker = asyncio.create_task(self._work())
    yield
    self.batcher.close()
    await self.worker

  async def _work(self) -> None:
    start = time.perf_counter()
    await asyncio.to_thread(self._compile)
    self.ready = True
    log.info("ready after %.0f s: compiled for batches of %s", time.perf_counter() - start, self.sizes)
    await self.batcher.work()

  def _compile(self) -> None:
    """Runs what is usual once at every size, so that it waits for no compiler later.

    Not so long rows, several pictures in a row, and guidance 1 in a model that is usually guided: when they first come.
    """
    for size in self.sizes:
      for settings, item in self._usual():
        if self.batcher.closed:  # to stop before it began
          return
        next(self.batcher.compute(settings, [item] * size))

  def _usual(self) -> Iterator[tuple[Draw | Talk, Drawn | Asked]]:
    with contextlib.suppress(UserError):  # a model that cannot draw, or only without pictures
      (drawn,), settings = self.drawing(ImageRequest(prompt="a", seed=0))
      yield settings, drawn
      side = self.model.image_size
      (drawn,), settings = self.drawing(ImageRequest(prompt="a", seed=0), np.zeros((side, side, 3), np.uint8))
      yield settings, drawn
    with contextlib.suppress(UserError):  # or cannot talk, or only without pictures
      words = {"type": "text", "text": "a"}
      picture = {"type": "image", "image": np.zeros((1, 1, 3), np.uint8)}  # is made to fit
      for content in ([words], [picture, words]):
        talk = [{"role": "user", "content": content}]
        self.model.slots(talk)
        yield Talk(), Asked(talk, NEW, 0.0, 0)

  # From what is asked to jobs. These raise Refused, and what `Batcher.submit` raises.

  def named(self, model: str | None) -> None:
    if model not in (None, self.name):
      message = f"the model {model!r} is not here; there is {self.name!r}"
      raise Refused(404, message, param="model", code="model_not_found")

  def drawing(self, asked: ImageRequest | EditRequest, before: np.ndarray | None = None) -> tuple[list[Drawn], Draw]:
    """before: u8[H,W,3], of an edit."""
    self.model.slots(asked.prompt, before)
    side = f"{self.model.image_size}x{self.model.image_size}"
    if asked.size not in (None, "auto", side):
      raise Refused(400, f"this model draws pictures of {side}, not of {asked.size}", param="size")
    usual = self.model.config.sampling
    guidance = usual.guidance if asked.guidance is None else asked.guidance
    settings = Draw(asked.steps or usual.steps, guidance, before is not None)
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    return [Drawn(asked.prompt, (seed + i) % 2**31, before) for i in range(asked.n)], settings

  def draw(self, asked: ImageRequest) -> list[Job]:
    items, settings = self.drawing(asked)
    return self.batcher.submit(settings, items)

  async def edit(self, asked: EditRequest) -> list[Job]:
    self.model.check_edits()
    with self.batcher.places(asked.n):
      before = await self._unpack(schemas.unpacked, await asked.image.read(), "image")
      items, settings = self.drawing(asked, before)
    return self.batcher.submit(settings, items)

  async def talk(self, asked: ChatRequest) -> tuple[Job, int]:
    """And how many slots the prompt takes."""
    parts = [part for message in asked.messages for part in message.content]
    characters = sum(len(part.text) for part in parts if part.type == "text")
    pictures = sum(part.type == "image_url" for part in parts)
    room = self.model.longest // (self.model.model.grid**2 + 1)  # each, and the word before it
    for count, most, what in ((characters, schemas.MAX_CHARACTERS, "characters"), (pictures, room, "pictures")):
      if count > most:  # known before any is unpacked or cut into tokens
        too_long = f"the messages have {count} {what}; the limit is {most}"
        raise Refused(400, too_long, param="messages", code="context_length_exceeded")
    with self.batcher.places(1):
      messages = [
        {"role": message.role, "content": [await self._part(part) for part in message.content]}
        for message in asked.messages
      ]
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    new = asked.max_completion_tokens or asked.max_tokens or NEW
    slots = self.model.slots(messages)
    (job,) = self.batcher.submit(Talk(), [Asked(messages, new, asked.temperature, seed)])
    return job, slots

  async def _part(self, part: schemas.Part) -> dict[str, Any]:
    if part.type == "text":
      return {"type": "text", "text": part.text}
    return {"type": "image", "image": await self._unpack(schemas.picture, part.image_url.url)}

  async def _unpack(self, how: Callable[..., np.ndarray], data: bytes | str, *param: str) -> np.ndarray:
    def unpacked() -> np.ndarray:
      self.batcher.check_open()  # what waited for its turn when the server was asked to stop shall not keep it
      return how(data, self.model.image_size, *param)

    # Given up before its turn it is passed over.
    return await asyncio.get_running_loop().run_in_executor(self._unpacking, unpacked)


async def first(jobs: list[Job]) -> list[Any]:
  """The first piece of each."""
  try:
    return [await anext(job) for job in jobs]
  finally:
    for job in jobs:
      job.dropped = True


async def written(job: Job) -> AsyncIterator[Written]:
  """What is written so far, until it is finished."""
  try:
    async for so_far in job:
      yield so_far
      if so_far.finish:
        return
  finally:
    job.dropped = True


async def finished(job: Job) -> Written:
  """All that is written."""
  *_, whole = [so_far async for so_far in written(job)]
  return whole
