"""What is drawn, kept as files so that no picture is drawn twice, and scored: CLIP, detector, questions, FID."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clipflow_jax import files
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import compositional, folders, geneval, tasks
from clipflow_jax.evaluation.items import Item
from clipflow_jax.evaluation.tasks import Answer

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow


class Drawer:
  """Draws items' questions into `folder`, a PNG each, those that are not there yet; `draw` gives them as u8[n,H,W,3].

  size: height and width of what is kept, resampled by Pillow's antialiased bicubic; 0 keeps the model's. The noise of a
  picture is a function of the seed and its place among all items, so a resumed run draws the same. edits: the items'
  pictures are changed as their questions say.
  """

  def __init__(
    self, model: ClipFlow, folder: Path, *, size: int = 0, seed: int = 0, edits: bool = False, **sampling: Any
  ):
    self.model, self.folder, self.size = model, folder, size or model.image_size
    self.seed, self.edits, self.sampling = seed, edits, sampling

  def kept(self, place: int) -> np.ndarray:
    """The picture u8[H,W,3] of an item that was drawn."""
    return np.asarray(Image.open(self._file(place)))

  def draw(self, items: Sequence[Item], first: int) -> np.ndarray:
    """Pictures of items that are the first-th and following ones of all."""
    pictures = [self._file(first + i) for i in range(len(items))]
    if not all(file.is_file() for file in pictures):
      self.folder.mkdir(parents=True, exist_ok=True)
      seed = int(np.random.SeedSequence([self.seed, first]).generate_state(1)[0] >> 1)  # of 31 bits, as a key takes
      shown = np.stack([item.look(self.model.image_size) for item in items]) if self.edits else None
      drawn = self.model.draw([item.question for item in items], seed=seed, images=shown, **self.sampling)
      for file, image in zip(pictures, drawn, strict=True):
        self._write(file, image)
    return np.stack([self.kept(first + i) for i in range(len(items))])

  def _file(self, place: int) -> Path:
    return self.folder / f"{place:06d}.png"

  def _write(self, file: Path, image: np.ndarray) -> None:
    picture = Image.fromarray(image)
    if picture.size != (self.size, self.size):
      picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
    files.write(file, picture.save)


class Drawn:
  """Draws each item and scores what is drawn: judge (u8[n,H,W,3], items) -> answers. Metrics are means."""

  summary = staticmethod(tasks.means)

  def __init__(
    self, drawer: Drawer, items: Sequence[Item], judge: Callable[[np.ndarray, Sequence[Item]], list[Answer]]
  ):
    self.drawer, self.judge = drawer, judge
    self.places = {item.id: place for place, item in enumerate(items)}
    if len(self.places) < len(items):
      raise UserError("two prompts have the same id; give each its own")

  def score(self, items: Sequence[Item]) -> list[Answer]:
    return self.judge(self.drawer.draw(items, self.places[items[0].id]), items)


class Detected(Drawn):
  """GenEval: whether a detector finds what the prompt wants. `score` is the mean over categories, as it is reported."""

  def __init__(self, drawer: Drawer, items: Sequence[Item], detector: geneval.Detector):
    super().__init__(drawer, items, self._judge)
    self.detector = detector

  def _judge(self, images: np.ndarray, items: Sequence[Item]) -> list[Answer]:
    verdicts = [
      geneval.right(item.more, found, item.category) for item, found in zip(items, self.detector(images), strict=True)
    ]
    return [
      Answer({"correct": float(good)}, why or "right", item.question)
      for (good, why), item in zip(verdicts, items, strict=True)
    ]

  @staticmethod
  def summary(scores: tasks.Scores, weights: np.ndarray, categories: np.ndarray) -> dict[str, float]:
    _, number = np.unique(categories, return_inverse=True)
    total, right = np.bincount(number, weights), np.bincount(number, weights * scores["correct"])
    there = total > 0
    return tasks.means(scores, weights, categories) | {"score": float((right[there] / total[there]).mean())}


class Questioned(Drawn):
  """DPG-Bench, answered by the model itself: the share of a prompt's questions to which yes is likelier than no.

  An item's `questions` are such as "Is there a dog?"; in `depends`, a list for each question names by number from 0 the
  questions whose no makes it wrong, and so in turn what depends on it. With `kinds`, a word for each question, there is
  a metric of each kind too, where an answer counts as it was given. Source: DSG (Cho et al. 2024); Hu et al. 2024 and
  compute_dpg_bench.py, whose kinds are of the last of a prompt's four pictures alone; here they are of all.
  """

  def __init__(self, drawer: Drawer, items: Sequence[Item], model: ClipFlow):
    super().__init__(drawer, items, self._judge)
    self.model = model
    self.kinds = sorted({kind for item in items for kind in item.more.get("kinds", [])})

  @staticmethod
  def check(item: Item) -> None:
    """UserError for an item that cannot be judged so."""
    questions, depends, kinds = (item.more.get(key, []) for key in ("questions", "depends", "kinds"))
    if not questions:
      raise UserError(f"prompt {item.id} has no questions to be judged by: give a file of prompts that have some")
    for key, given in (("depends", depends), ("kinds", kinds)):
      if given and len(given) != len(questions):
        raise UserError(f"prompt {item.id} has {len(given)} {key} for {len(questions)} questions: one each is needed")
    strange = [number for parents in depends for number in parents if number not in range(len(questions))]
    if strange:
      raise UserError(f"prompt {item.id}: a question depends on number {strange[0]} of {len(questions)}, from 0")

  def _judge(self, images: np.ndarray, items: Sequence[Item]) -> list[Answer]:
    lists = [list(item.more["questions"]) for item in items]
    counts = [len(questions) for questions in lists]
    asked = [question for questions in lists for question in questions]
    shown = np.repeat(folders.fit(images, self.model.image_size), counts, axis=0)
    yes, no = (self.model.likelihood(asked, [word] * len(asked), shown).log_p for word in ("yes", "no"))
    answers = np.split(np.asarray(yes > no), np.cumsum(counts)[:-1])
    return [self._answer(item, given) for item, given in zip(items, answers, strict=True)]

  def _answer(self, item: Item, given: np.ndarray) -> Answer:
    true = given.copy()
    for number, parents in enumerate(item.more.get("depends", [])):
      true[number] &= all(true[parent] for parent in parents)
    scores = {"score": float(true.mean())}
    kinds = np.array(item.more.get("kinds", [""] * len(given)))
    for kind in self.kinds:
      scores |= {f"asked {kind}": float((kinds == kind).sum()), f"yes {kind}": float(given[kinds == kind].sum())}
    wrong = [question for question, right in zip(item.more["questions"], true, strict=True) if not right]
    return Answer(scores, f"no: {' '.join(wrong)}" if wrong else "yes", item.question)

  @staticmethod
  def summary(scores: tasks.Scores, weights: np.ndarray, categories: np.ndarray) -> dict[str, float]:
    sums = {name: float(weights @ values) for name, values in scores.items()}
    shares = {"score": sums["score"] / float(weights.sum())}
    for name in scores:
      if name.startswith("asked "):
        kind = name.removeprefix("asked ")
        shares[kind] = sums[f"yes {kind}"] / sums[name] if sums[name] else float("nan")
    return shares


def by_clip(model: ClipFlow) -> Callable[[np.ndarray, Sequence[Item]], list[Answer]]:
  """The CLIP score of each picture and its prompt, 100 x cosine or 0 (Hessel et al. 2021), by the model's own CLIP."""

  def judge(images: np.ndarray, items: Sequence[Item]) -> list[Answer]:
    texts = [item.question for item in items]
    cosines = np.sum(model.embed_image(folders.fit(images, model.image_size)) * model.embed_text(texts), axis=1)
    tasks.check_finite(cosines, items)
    return [Answer({"clip_score": 100 * max(0.0, float(c))}, "", text) for c, text in zip(cosines, texts, strict=True)]

  return judge


class Edited(Drawn):
  """Changes each item's picture as its question says, and compares the result with the true one, u8[H,W,3] by id.

  l1: mean distance of pixels, of 0 to 1; clip_i: 100 x cosine of both by the model's own CLIP (MagicBrush, Zhang et al.
  2023); l1_unchanged: what no change at all would have as l1. With shapes also correct: the rule-based reader sees in
  both the same.
  """

  def __init__(self, drawer: Drawer, items: Sequence[Item], truths: Mapping[str, np.ndarray], shapes: bool):
    super().__init__(drawer, items, self._judge)
    self.truths, self.shapes = truths, shapes

  def _judge(self, images: np.ndarray, items: Sequence[Item]) -> list[Answer]:
    truths = np.stack([self.truths[item.id] for item in items])
    before = np.stack([item.look(truths.shape[1]) for item in items])
    model = self.drawer.model
    cosines = np.sum(model.embed_image(images) * model.embed_image(truths), axis=1)
    answers = []
    for i, item in enumerate(items):
      scores = {"l1": _apart(images[i], truths[i]), "clip_i": 100 * float(cosines[i])}
      scores["l1_unchanged"] = _apart(before[i], truths[i])
      seen = compositional.read(images[i]) if self.shapes else None
      if seen:
        scores["correct"] = float(seen == compositional.read(truths[i]))
      answers.append(Answer(scores, str(seen or ""), item.question))
    return answers


def _apart(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.abs(a.astype(np.float32) - b).mean() / 255)


def check_reference(reference: Path, metrics: Sequence[str], size: int) -> None:
  """UserError where pictures kept at this size cannot be compared with the reference, a folder or statistics.

  How pictures are resampled is part of the metric, so it is not done here: a folder's must be of that size.
  """
  folders.check_real(metrics, reference)
  if reference.is_dir():
    first = next(folders.pictures(reference))
    if first.shape[1:3] != (size, size):
      raise UserError(
        f"the pictures of {reference} are {first.shape[2]} x {first.shape[1]} pixels, those drawn are kept at {size}; "
        "resample the reference once as its literature does, or set size"
      )


def distances(
  drawer: Drawer,
  items: Sequence[Item],
  reference: Path,
  metrics: Sequence[str],
  using: folders.Extractors,
  *,
  chunk: int = 64,
) -> dict[str, Any]:
  """Draws all items and compares what is drawn with a folder of real pictures, or their saved statistics.

  metrics: names of folders.TASKS. What cannot be compared is `check_reference`'s to find.
  """
  for start in range(0, len(items), chunk):
    drawer.draw(items[start : start + chunk], start)
  return folders.compare(metrics, reference, drawer.folder, using)
