"""Two folders of pictures, compared: `clipflow evaluate --tasks=fid,kid --real=DIR --fake=DIR --inception=DIR`.

What the real ones' features are is known after the first time: their moments are kept in the user's cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from clipflow_jax import files
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.images import opened, square
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import dinov2, images, inception

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

log = logging.getLogger(__name__)

INCEPTION_TASKS = ("fid", "kid", "is", "precision_recall")  # of Inception's features
DINOV2_TASK = "fd_dinov2"  # the Fréchet distance of DINOv2's
TASKS = (*INCEPTION_TASKS, DINOV2_TASK)
CLIP_TASKS = ("cmmd", "clip_distance")  # of the embeddings of a model's own CLIP
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
_TOGETHER = 64  # pictures read before they are looked at
_SUBSET = 1000  # features in each of KID's draws, as in print


class Features(Protocol):
  """u8[n,H,W,3] -> f[n,D], and a text that changes with whatever changes a feature."""

  key: str

  def __call__(self, images: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Extractors:
  """What looks at the pictures: of those that no task needs, None."""

  inception: inception.Extractor | None = None
  dinov2: Features | None = None


def extractors(
  tasks: Sequence[str], *, inception_weights: str | None, resize: str, dinov2_weights: str | None
) -> Extractors:
  """Those that the tasks need. UserError where their weights are not given, and as the extractors raise it."""
  by_inception = [task for task in tasks if task in INCEPTION_TASKS]
  if by_inception and not inception_weights:
    raise UserError(
      f"{', '.join(by_inception)}: give --inception=DIR (to a task, --config.tasks.NAME.inception=DIR), Inception's "
      "weights; clipflow_jax/interop/inception.py says how to make it"
    )
  if DINOV2_TASK in tasks and not dinov2_weights:
    raise UserError(
      f"{DINOV2_TASK}: give --dinov2=DIR (to a task, --config.tasks.NAME.dinov2=DIR), a folder or hub id such as "
      "facebook/dinov2-large"
    )
  return Extractors(
    inception.Extractor(inception_weights, resize=resize) if by_inception else None,
    dinov2.Extractor(dinov2_weights) if DINOV2_TASK in tasks else None,
  )


def pictures(folder: Path) -> Iterator[np.ndarray]:
  """The pictures of a folder and those in it, by name, as u8[n,H,W,3]: n of one size one behind the other.

  They keep their size: how it changes is part of a metric. UserError for a folder without pictures, and for a
  picture that cannot be read: a metric of fewer pictures than one believes is worse than none.
  """
  held: list[np.ndarray] = []
  for file in list_pictures(folder):
    image = _read(file)
    if held and (image.shape != held[0].shape or len(held) == _TOGETHER):
      yield np.stack(held)
      held = []
    held.append(image)
  yield np.stack(held)


def list_pictures(folder: Path) -> list[Path]:
  """The files of `pictures`. UserError where there are none."""
  if not folder.is_dir():
    raise UserError(f"there is no folder {folder}: give one with pictures")
  found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _ENDINGS and not f.name.startswith("."))
  if not found:
    raise UserError(f"{folder} has no pictures: none of {', '.join(_ENDINGS)}")
  return found


def _read(file: Path) -> np.ndarray:
  try:
    with opened(file, str(file)) as image:
      return np.asarray(image.convert("RGB"))
  except BadRecord as error:
    raise UserError(f"{file} cannot be read as a picture ({error.why}); mend or remove it") from error


def check(tasks: Sequence[str], real: Path | None, fake: Path | None) -> None:
  """UserError for what `compare` cannot do, before anything is loaded."""
  if fake is None or (real is None and tuple(tasks) != ("is",)):
    raise UserError(f"the tasks {', '.join(tasks)} need --real=DIR and --fake=DIR")
  check_real(tasks, real)
  list_pictures(fake)


def check_real(tasks: Sequence[str], real: Path | None) -> None:
  """UserError for tasks that are unknown, and for what they cannot be made of."""
  unknown = [task for task in tasks if task not in TASKS + CLIP_TASKS]
  if unknown:
    raise UserError(f"no task {unknown[0]!r} of folders; choose of {', '.join(TASKS + CLIP_TASKS)}")
  if real is not None and real.suffix == ".npz":
    if not set(tasks) <= {"fid", "is"}:
      raise UserError(f"{real} holds statistics of Inception, which do for fid alone; for other tasks give the folder")
    images.Moments.load(real)
  elif real is not None:
    list_pictures(real)


def save_statistics(folder: Path, features: Features, file: Path) -> None:
  """Writes the moments of a folder's features, an .npz that `compare` and pytorch-fid take in the folder's place."""
  if file.suffix != ".npz":
    raise UserError(f"statistics are written to an .npz, not to {file}")
  files.write(file, images.moments(pictures(folder), features).save)


def reference(folder: Path, features: Features) -> images.Moments:
  """The moments of a folder's features, from the user's cache where the same pictures gave them before.

  The cache is $XDG_CACHE_HOME/clipflow_jax, by default in ~/.cache; where it cannot be written nothing is kept.
  """
  digest = hashlib.sha256(features.key.encode())
  for file in list_pictures(folder):
    with file.open("rb") as content:
      digest.update(hashlib.file_digest(content, "sha256").digest())
  kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipflow_jax" / f"{digest.hexdigest()}.npz"
  if kept.is_file():
    log.info("the features of %s are known from before, in %s", folder, kept)
    return images.Moments.load(kept)
  made = images.moments(pictures(folder), features)
  # Of this process alone: others may be keeping the same, of which neither knows.
  partial = kept.with_suffix(f".{os.getpid()}.partial.npz")
  try:
    kept.parent.mkdir(parents=True, exist_ok=True)
    made.save(partial)
    os.replace(partial, kept)
  except OSError as error:
    log.warning("the features of %s are not kept: %s", folder, error)
    return made
  return images.Moments.load(kept)  # the same digits the first time as any other


def compare(tasks: Sequence[str], real: Path | None, fake: Path, using: Extractors) -> dict[str, Any]:
  """{metric: value} of the tasks, each picture looked at once by each of the extractors.

  real: a folder, or an .npz of mu and sigma as pytorch-fid writes. For Fréchet distances memory does not grow with the
  number of pictures; the other tasks keep 8 to 12 KB of features for each. using: `extractors` of the tasks.
  """
  check(tasks, real, fake)
  metrics: dict[str, Any] = {"pictures_fake": len(list_pictures(fake))}
  if real is not None and real.is_dir():
    metrics["pictures_real"] = len(list_pictures(real))
  if using.inception is not None:
    metrics |= _by_inception(tasks, real, fake, using.inception)
  if using.dinov2 is not None and real is not None:
    metrics[DINOV2_TASK] = _distance(images.moments(pictures(fake), using.dinov2), reference(real, using.dinov2))
  return metrics


def _by_inception(
  tasks: Sequence[str], real: Path | None, fake: Path, extractor: inception.Extractor
) -> dict[str, float]:
  metrics: dict[str, float] = {}
  pairwise = bool(set(tasks) & {"kid", "precision_recall"})  # what needs every feature
  ours = _Seen(extractor, pairwise or "is" in tasks).add(fake)
  theirs = _Seen(extractor, pairwise)
  if real is not None and real.suffix == ".npz":
    theirs.moments = images.Moments.load(real)
  elif real is not None and pairwise:
    theirs.add(real)
  elif real is not None and "fid" in tasks:
    theirs.moments = reference(real, extractor)
  if "fid" in tasks:
    a, b = ours.moments, theirs.moments
    if a.mean.shape != b.mean.shape:
      raise UserError(f"{real} holds statistics of {b.mean.size} features; Inception has {a.mean.size}")
    metrics["fid"] = _distance(a, b)
  if "kid" in tasks:
    size = min(_SUBSET, ours.moments.count, theirs.moments.count)
    metrics["kid"], metrics["kid_deviation"] = images.kid_of(theirs.all(), ours.all(), size=size)
    metrics["kid_subset"] = size
  if "is" in tasks:
    score = images.inception_score_of(np.concatenate(ours.logits))
    metrics["inception_score"], metrics["inception_score_deviation"] = score
  if "precision_recall" in tasks:
    metrics["precision"], metrics["recall"] = images.precision_recall_of(theirs.all(), ours.all())
  return metrics


def _distance(a: images.Moments, b: images.Moments) -> float:
  return images.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def compare_by_clip(tasks: Sequence[str], real: Path, fake: Path, model: ClipFlow) -> dict[str, float]:
  """{metric: value} of CLIP_TASKS: CMMD, and the Fréchet distance of the embeddings. Comparable for one model only."""
  check(tasks, real, fake)

  def embed(folder: Path) -> np.ndarray:
    return np.concatenate([model.embed_image(fit(batch, model.image_size)) for batch in pictures(folder)])

  a, b = embed(real), embed(fake)
  measures = {"cmmd": images.cmmd_of, "clip_distance": images.frechet_distance_of}
  return {task: measures[task](a, b) for task in tasks}


def fit(batch: np.ndarray, size: int) -> np.ndarray:
  """u8[n,H,W,3] -> u8[n,size,size,3]: the largest central square of each, resampled where its size differs."""
  if batch.shape[1:3] == (size, size):
    return batch
  return np.stack([square(Image.fromarray(image), size) for image in batch])


class _Seen:
  """Moments of a folder's features, and the features themselves where they are kept."""

  def __init__(self, extractor: inception.Extractor, keeps: bool):
    self.extractor, self.keeps = extractor, keeps
    self.moments = images.Moments()
    self.features: list[np.ndarray] = []
    self.logits: list[np.ndarray] = []

  def add(self, folder: Path) -> _Seen:
    for batch in pictures(folder):
      features, logits = self.extractor.both(batch)
      self.moments.add(features)
      if self.keeps:
        self.features.append(features)
        self.logits.append(logits)
    return self

  def all(self) -> np.ndarray:
    return np.concatenate(self.features)
