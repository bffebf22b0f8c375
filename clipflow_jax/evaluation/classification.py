"""Does it know what it sees? Zero-shot by CLIP or by words, a linear probe, nearest class means, retrieval."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize
import scipy.special

from clipflow_jax.data import shapes
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import tasks
from clipflow_jax.evaluation.items import Item
from clipflow_jax.evaluation.tasks import Answer, Scores

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

PAIRS = tuple(itertools.product(shapes.COLOURS, shapes.SHAPES))
"""Every (colour, shape): the 48 classes."""

NAMES = tuple(f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour, shape in PAIRS)
"""What CLIP is asked to choose from, in the order of PAIRS."""

NAMED = ("shapes", "imagenet1k", "cifar10", "cifar100", "flowers102", "oxfordpets", "food101")
"""Data sets whose class names and prompt templates are known (zero_shot/, from OpenAI's CLIP)."""


def names_of(dataset: str) -> tuple[list[str], list[str]]:
  """(class names in the order of labels, prompt templates with {} for the name) of a data set of NAMED."""
  if dataset not in NAMED:
    raise UserError(f"no class names of {dataset!r} are known; there are {', '.join(NAMED)}")
  if dataset == "shapes":
    return list(NAMES), ["{}"]
  file = resources.files("clipflow_jax.evaluation").joinpath("zero_shot", f"{dataset}.json")
  found = json.loads(file.read_text(encoding="utf-8"))
  return found["classes"], found["templates"]


def ensemble(model: ClipFlow, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
  """Each class's direction f32[K,E] of unit norm: the mean over templates of what CLIP makes of its prompts.

  Source: Radford et al. 2021, section 3.1.4; open_clip's build_zero_shot_classifier.
  """
  prompts = [template.replace("{}", name) for name in names for template in templates]
  each = model.embed_text(prompts).reshape(len(names), len(templates), -1)
  return _unit(_unit(each).mean(axis=1))


def per_class(scores: Scores, weights: np.ndarray, categories: np.ndarray) -> dict[str, float]:
  """The means, and of `top1` the mean over classes, each class counting once (Oxford Flowers is reported so).

  A class is what `label` numbers: categories may be other things, or none.
  """
  _, number = np.unique(scores["label"], return_inverse=True)
  total, right = (np.bincount(number, weights * x) for x in (np.ones(len(weights)), scores["top1"]))
  there = total > 0
  shares = {name: values for name, values in scores.items() if name != "label"}
  return tasks.means(shares, weights, categories) | {"mean_per_class": float((right[there] / total[there]).mean())}


class Classifier:
  """A picture's class by whatever ranks the classes: `similar` takes u8[n,H,W,3], gives f[n,K], higher is likelier."""

  summary = staticmethod(per_class)

  def __init__(self, similar: Callable[[np.ndarray], np.ndarray], names: Sequence[str], size: int):
    self.similar, self.names, self.size = similar, list(names), size

  def score(self, items: Sequence[Item]) -> list[Answer]:
    similar = self.similar(np.stack([item.look(self.size) for item in items]))
    tasks.check_finite(similar, items)
    labels = [label_of(item, self.names) for item in items]
    # Of classes that are equally likely, such as two of one name, the first is the answer.
    ahead = [
      int((row > row[label]).sum() + (row[:label] == row[label]).sum())
      for row, label in zip(similar, labels, strict=True)
    ]
    return [
      Answer(
        {"top1": float(rank < 1), "top5": float(rank < 5), "label": float(label)},
        self.names[int(row.argmax())],
        self.names[label],
      )
      for row, label, rank in zip(similar, labels, ahead, strict=True)
    ]


def label_of(item: Item, names: Sequence[str]) -> int:
  """The number of an item's class. UserError for a name that is no class."""
  if item.label is not None:
    return item.label
  if not item.answers or item.answers[0] not in names:
    raise UserError(f"item {item.id} is answered by {item.answers}, which is none of the {len(names)} classes")
  return list(names).index(item.answers[0])


def by_clip(model: ClipFlow, names: Sequence[str], templates: Sequence[str]) -> Classifier:
  """Zero-shot: the class whose prompts CLIP puts nearest to the picture."""
  directions = ensemble(model, names, templates).T
  return Classifier(lambda images: model.embed_image(images) @ directions, names, model.image_size)


def by_words(model: ClipFlow, names: Sequence[str], question: str) -> Classifier:
  """Zero-shot: the class whose name the language model most likely answers to the question. A pass for each name.

  The tower looks at each picture once, and names are judged of one picture at a time: there may be a thousand.
  """

  def similar(images: np.ndarray) -> np.ndarray:
    return np.stack([ranked(features) for features in model.encode(images)])

  def ranked(features: np.ndarray) -> np.ndarray:
    shared = np.broadcast_to(features, (len(names), *features.shape))  # which takes no memory
    return np.asarray(model.likelihood([question] * len(names), list(names), features=shared).log_p)

  return Classifier(similar, names, model.image_size)


def by_examples(
  model: ClipFlow, names: Sequence[str], train: Sequence[Item], *, shots: int = 0, l2: float = 1.0, probe: bool = True
) -> Classifier:
  """Few-shot on CLIP's embeddings: `probe` a logistic regression of strength l2, else the nearest class mean.

  shots: the first so many examples of every class, 0 for all of them. UserError for a class without an example.
  """
  labels = np.array([label_of(item, names) for item in train])
  if shots:
    rows = np.concatenate([np.flatnonzero(labels == label)[:shots] for label in range(len(names))])
    train, labels = [train[row] for row in rows], labels[rows]
  lacking = sorted(set(range(len(names))) - set(labels.tolist()))
  if lacking:
    raise UserError(f"class {names[lacking[0]]!r} has no example to learn from")
  parts = [train[start : start + model.batch_size] for start in range(0, len(train), model.batch_size)]
  x = np.concatenate([model.embed_image(np.stack([item.look(model.image_size) for item in part])) for part in parts])
  if probe:
    matrix, bias = logistic_regression(x, labels, len(names), l2)
  else:
    matrix = _unit(np.stack([x[labels == label].mean(axis=0) for label in range(len(names))])).T
    bias = np.zeros(len(names))
  return Classifier(lambda images: model.embed_image(images) @ matrix + bias, names, model.image_size)


class InContext:
  """k examples at random, a picture and its class each, stand before every question; right is the very class name.

  One conversation at a time: examples of other pictures make prompts of other lengths.
  """

  def __init__(
    self, model: ClipFlow, names: Sequence[str], train: Sequence[Item], question: str, k: int, seed: int = 0
  ):
    self.model, self.names, self.train, self.question, self.k, self.seed = model, names, train, question, k, seed

  summary = staticmethod(tasks.means)

  def score(self, items: Sequence[Item]) -> list[Answer]:
    made = []
    for item in items:
      rng = np.random.default_rng([self.seed, zlib.crc32(item.id.encode())])  # of the item alone, wherever it stands
      shown = [self.train[i] for i in rng.choice(len(self.train), min(self.k, len(self.train)), replace=False)]
      messages = []
      for example in shown:
        name = self.names[label_of(example, self.names)]
        messages += [self._asked(example), {"role": "assistant", "content": name}]
      written = self.model.chat([*messages, self._asked(item)])
      truth = self.names[label_of(item, self.names)]
      made.append(Answer({"top1": float(written.strip() == truth)}, written, truth))
    return made

  def _asked(self, item: Item) -> dict[str, Any]:
    picture = {"type": "image", "image": item.look(self.model.image_size)}
    return {"role": "user", "content": [picture, {"type": "text", "text": self.question}]}


def logistic_regression(x: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
  """(matrix f64[D,K], bias f64[K]) of the least summed cross-entropy of x f[N,D], labels i[N], plus l2 / 2 |matrix|².

  It is scikit-learn's LogisticRegression(C=1 / l2). UserError where it does not converge.
  """
  x = np.asarray(x, np.float64)
  truth = np.eye(classes)[labels]
  n, d = x.shape

  def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
    matrix, bias = flat[: d * classes].reshape(d, classes), flat[d * classes :]
    logits = x @ matrix + bias
    log_p = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
    error = np.exp(log_p) - truth
    gradient = np.concatenate([(x.T @ error + l2 * matrix).ravel(), error.sum(axis=0)])
    return float(-(log_p * truth).sum() + l2 / 2 * np.square(matrix).sum()), gradient

  start = np.zeros((d + 1) * classes)
  options = dict(maxiter=10000, maxfun=20000, ftol=1e-14, gtol=1e-8 * n)
  found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
  if not found.success:
    raise UserError(f"the linear probe did not converge ({found.message}); raise l2")
  return found.x[: d * classes].reshape(d, classes), found.x[d * classes :]


def shapes_items(n: int, seed: int, size: int) -> list[Item]:
  """n pictures u8[size,size,3] of one filled object, every colour and shape equally often; the class is the answer."""
  rng = np.random.default_rng([seed, n])
  labels = np.arange(n) % len(PAIRS)
  return [
    Item(str(i), shapes.render(_alone(PAIRS[label], rng), size), "", (NAMES[label],), (), NAMES[label], int(label))
    for i, label in enumerate(labels)
  ]


def zero_shot(model: ClipFlow, *, n: int, seed: int, size: int) -> dict[str, float]:
  """Zero-shot accuracy over shape x colour on n pictures of one filled object, every pair equally often.

  size: height and width of the pictures. zero_shot_accuracy counts all 48 pairs; zero_shot_seen and
  zero_shot_unseen split them by whether training showed the pair.
  """
  items = shapes_items(n, seed, size)
  images = np.stack([item.look(size) for item in items])
  right = np.asarray(model.classify(images, list(NAMES))) == [item.label for item in items]
  unseen = np.array([pair in shapes.UNSEEN for pair in PAIRS])[[item.label for item in items]]
  parts = {"zero_shot_accuracy": right, "zero_shot_seen": right[~unseen], "zero_shot_unseen": right[unseen]}
  return {name: float(part.mean()) for name, part in parts.items() if len(part)}


def retrieval(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> float:
  """Share of pictures whose nearest text is their own. Both f[N,E], unit norm; the texts must be distinct."""
  nearest = np.argmax(image_embeddings @ text_embeddings.T, axis=1)
  return float(np.mean(nearest == np.arange(len(nearest))))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _alone(pair: tuple[str, str], rng: np.random.Generator) -> shapes.Scene:
  """One filled object of this colour and shape; everything else at random."""
  colour, shape = pair
  thing = shapes.Object(
    shape=shape,
    colour=colour,
    size=str(rng.choice(shapes.SIZES)),
    outlined=False,  # what is outlined is named so: it is of no class
    place=int(rng.integers(len(shapes.PLACES))),
  )
  return shapes.Scene(objects=(thing,), background=str(rng.choice(list(shapes.BACKGROUNDS))))
