"""What the page answers: drawings as they form, words as they come, walks through feature space.

Nothing here knows of the page; everything that is wrong with what a visitor sends is a UserError or a BadRecord.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clipflow_jax.data import images, mixture
from clipflow_jax.data.example import BadRecord
from clipflow_jax.demo import uploads
from clipflow_jax.errors import UserError
from clipflow_jax.inference import rerank, show, writing
from clipflow_jax.inference.forming import Forming
from clipflow_jax.inference.messages import Message
from clipflow_jax.inference.pipeline import ClipFlow

MOST_CHARACTERS = 2000  # of a prompt or a question: longer ones fit no model here, and cost time to cut into tokens
MOST_WORDS = 256  # tokens of an answer, as many as over HTTP
SIDE = 360  # small pictures are shown about so large


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
  """A drawing in the making (step < steps) or the finished one; all candidates while they are made, then the best."""

  sheet: Image.Image
  picture: np.ndarray  # u8[H,W,3], the first or the best, as the model sees it
  step: int
  steps: int


@dataclasses.dataclass(frozen=True, eq=False)
class End:
  """Where a walk begins or ends: words, or a picture, which goes first."""

  words: str
  picture: Path | None


class Answers:
  """What one model answers. Not to be asked twice at once."""

  def __init__(self, model: ClipFlow):
    self.model = model
    self._forming = Forming(model)

  def draw(
    self,
    prompt: str,
    picture: np.ndarray | None = None,
    *,
    steps: int,
    guidance: float,
    seed: int,
    best_of: int = 1,
  ) -> Iterator[Drawn]:
    """The same picture as `clipflow draw` with these options, and how it comes about.

    picture: u8[H,W,3], of which the prompt says what shall become; best_of is 1 then.
    """
    model = self.model
    prompts = [_checked(prompt)] * best_of
    scale = max(1, SIDE // (model.image_size * min(best_of, 4)))
    images = None if picture is None else picture[None]
    for look in self._forming.draw(prompts, steps, guidance, seed, images=images):
      pictures = model.decode(look.features, seed)
      if look.step < steps:
        yield Drawn(show.grid(pictures, 4, scale=scale), pictures[0], look.step, steps)
    if best_of > 1:
      best = int(np.argmax(rerank.JUDGES["caption"](model, look.features, prompts)))
      pictures = model.decode(look.features[best : best + 1], seed)
    yield Drawn(enlarged(pictures[0]), pictures[0], steps, steps)

  def chat(self, talk: list[Message]) -> Iterator[str]:
    """The same words as `clipflow chat` says, as far as they have come."""
    for (written,) in writing.stream(self.model, [talk], new=[MOST_WORDS], temperature=[0.0], seeds=[0]):
      yield written.text

  def walk(self, first: End, second: End, *, seed: int, stops: int) -> Image.Image:
    """Pictures on the straight line between two ends in feature space, `stops` of them with the ends."""
    a, b = (self._features(end, seed) for end in (first, second))
    weights = np.linspace(0, 1, stops, dtype=np.float32)[:, None, None]
    pictures = self.model.decode((1 - weights) * a + weights * b, seed)
    return show.grid(pictures, columns=(stops + 1) // 2, scale=max(1, SIDE // 2 // self.model.image_size))

  def question(self, words: str, picture: np.ndarray | None) -> Message:
    """What a visitor says: words, a picture, or both."""
    if picture is None and not words.strip():
      raise UserError("nothing is asked: write a message or attach a picture")
    parts: list[Message] = [{"type": "image", "image": picture}] if picture is not None else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": _checked(words) or mixture.DESCRIBE}]}

  def see(self, file: Path) -> np.ndarray:
    """A picture file as the model sees it, u8[H,W,3]."""
    return uploads.see(file.read_bytes(), self.model.image_size, file.name)

  def _features(self, end: End, seed: int) -> np.ndarray:
    """Standardised features f32[T,C] of what an end is."""
    if end.picture:
      return self.model.encode(self.see(end.picture)[None])[0]
    if not end.words.strip():
      raise UserError("a walk needs two ends: write a prompt or attach a picture at each")
    (look,) = self._forming.draw([_checked(end.words)], seed=seed, looks=1)
    return look.features[0]


def enlarged(picture: np.ndarray) -> Image.Image:
  """A picture u8[H,W,3] large enough to look at, its pixels as they are."""
  return show.enlarged(picture, max(1, SIDE // len(picture)))


def suggestions(model: ClipFlow, most: int) -> tuple[list[str], list[str]]:
  """Prompts and questions like those that the model learned from; none where its data is not to be had."""
  if "data" not in model.config:
    return [], []
  try:
    source = mixture.shown(model.config.data.source)
    examples = [source[i] for i in range(min(most, len(source)))]
  except (UserError, BadRecord):
    return [], []
  prompts = [caption for example in examples for caption in example.captions[:1]]
  questions = [question for example in examples for question, _ in example.questions[:1]]
  return list(dict.fromkeys(prompts)), list(dict.fromkeys(questions))


def samples(workdir: Path, most: int) -> list[tuple[Image.Image, str]]:
  """The newest pictures that a run has left behind, each with where it is from. Plots are not among them, nor what
  cannot be read, as one that is being written."""
  places = ("samples/*.png", "*/samples/*.png", "report/samples.png", "report/reconstructions.png")
  found = [file for place in places for file in workdir.glob(place)]
  newest = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)[:most]
  shown = []
  for file in newest:
    with contextlib.suppress(BadRecord), images.opened(file, file.name) as picture:
      shown.append((picture.copy(), str(file.relative_to(workdir))))
  return shown


def _checked(words: str) -> str:
  if len(words) > MOST_CHARACTERS:
    raise UserError(f"the text has {len(words)} characters; the limit is {MOST_CHARACTERS}")
  return words
