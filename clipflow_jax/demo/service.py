"""The model behind a queue: from what is asked to pieces of work, and from those, side by side, to answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from clipflow_jax.data.text import Chat
from clipflow_jax.demo import schemas
from clipflow_jax.demo.batching import Batcher, Closed, Failed, Full, Job
from clipflow_jax.demo.schemas import ChatRequest, ImageRequest, Refused
from clipflow_jax.errors import UserError
from clipflow_jax.inference.forming import Forming
from clipflow_jax.inference.pipeline import ClipFlow, Written

log = logging.getLogger(__name__)

NEW = 64  # words of an answer, where none are asked for


@dataclasses.dataclass(frozen=True)
class Draw:
  """What pictures must share to be drawn in one batch."""

  steps: int
  guidance: float


@dataclasses.dataclass(frozen=True)
class Talk:
  """Answers share nothing: any go into one batch."""


@dataclasses.dataclass(frozen=True)
class Drawn:
  prompt: str
  seed: int


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
  """A model and its queue. name: of the model over HTTP; size: items of a batch; limit: items that may wait."""

  def __init__(self, model: ClipFlow, name: str, *, size: int = 16, wait: float = 0.005, limit: int = 128):
    self.model, self.name, self.metrics = model, name, Metrics()
    model.tokenizer = Chat(model.tokenizer.tokenizer, remember=64)  # strangers' texts would fill the memory
    self.forming = Forming(model)  # compiles nothing anew for other steps or guidance
    self.batcher = Batcher(self._compute, size=min(size, model.batch_size), wait=wait, limit=limit)
    self.metrics.queue.set_function(lambda: len(self.batcher.waiting))
    self.ready = False
    self.worker: asyncio.Task | None = None
    self._unpacking = ThreadPoolExecutor(1)  # pictures one at a time: each may take much memory

  def _compute(self, settings: Draw | Talk, items: list) -> Iterator[Sequence]:
    self.metrics.batches.labels(type(settings).__name__.lower()).observe(len(items))
    if isinstance(settings, Draw):
      prompts, seeds = [item.prompt for item in items], [item.seed for item in items]
      (drawn,) = self.forming.draw(prompts, settings.steps, settings.guidance, seeds, looks=1)
      yield list(self.model.decode(drawn.features, seeds))
    else:
      new, heat, seeds = ([getattr(item, name) for item in items] for name in ("new", "temperature", "seed"))
      yield from self.model.stream([item.messages for item in items], new=new, temperature=heat, seeds=seeds)

  @contextlib.asynccontextmanager
  async def running(self) -> AsyncIterator[None]:
    """Works while open; compiles what a first answer needs before it says that it is ready."""
    self.worker = asyncio.create_task(self.batcher.work())
    warm = asyncio.create_task(self._warm_up())
    yield
    self.batcher.close()
    warm.cancel()
    await self.worker

  async def _warm_up(self) -> None:
    start = time.perf_counter()
    try:
      for size in (1, self.batcher.size):
        with contextlib.suppress(UserError):  # a model that cannot draw, or cannot talk
          _, settings = self.drawing(ImageRequest(prompt="a", seed=0))
          await first(self.batcher.submit(settings, [Drawn("a", 0)] * size))
        with contextlib.suppress(UserError):
          talk = [{"role": "user", "content": "a"}]
          self.model.slots(talk)
          await first(self.batcher.submit(Talk(), [Asked(talk, NEW, 0.0, 0)] * size))
    except Full:  # so much in demand, it compiles what is asked for
      pass
    except (Closed, Failed):  # about to stop; or the log tells why it will never be ready
      return
    self.ready = True
    log.info("ready after %.0f s of compilation", time.perf_counter() - start)

  # From what is asked to jobs. These raise Refused.

  def named(self, model: str | None) -> None:
    if model not in (None, self.name):
      message = f"the model {model!r} is not here; there is {self.name!r}"
      raise Refused(404, message, param="model", code="model_not_found")

  def drawing(self, asked: ImageRequest) -> tuple[list[Drawn], Draw]:
    side = f"{self.model.image_size}x{self.model.image_size}"
    if asked.size not in (None, "auto", side):
      raise Refused(400, f"this model draws pictures of {side}, not of {asked.size}", param="size")
    self.model.slots(asked.prompt)
    usual = self.model.config.sampling
    settings = Draw(asked.steps or usual.steps, usual.guidance if asked.guidance is None else asked.guidance)
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    return [Drawn(asked.prompt, (seed + i) % 2**31) for i in range(asked.n)], settings

  async def talk(self, asked: ChatRequest) -> tuple[Asked, int]:
    """And how many slots the prompt takes."""
    in_thread = asyncio.get_running_loop().run_in_executor
    characters = sum(len(part.text) for message in asked.messages for part in message.content if part.type == "text")
    if characters > schemas.MAX_CHARACTERS:
      too_long = f"the messages have {characters} characters; the limit is {schemas.MAX_CHARACTERS}"
      raise Refused(400, too_long, param="messages", code="context_length_exceeded")
    messages = []
    for message in asked.messages:
      parts: list[dict] = []
      for part in message.content:
        if part.type == "text":  # a special token in it would be taken for the template's
          parts.append({"type": "text", "text": self.model.tokenizer.without_special(part.text)})
        else:
          pixels = await in_thread(self._unpacking, schemas.picture, part.image_url.url, self.model.image_size)
          parts.append({"type": "image", "image": pixels})
      messages.append({"role": message.role, "content": parts})
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    new = asked.max_completion_tokens or asked.max_tokens or NEW
    return Asked(messages, new, asked.temperature, seed), self.model.slots(messages)


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
