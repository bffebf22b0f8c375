"""Measure a whole model, and write what was found as one folder that needs nothing else."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import clipflow_jax
from clipflow_jax.data import shapes_text
from clipflow_jax.data.example import Example
from clipflow_jax.data.mixture import DESCRIBE
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.data.sources import Source, readable
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import bars as bars_
from clipflow_jax.evaluation import captioning, classification, compositional, images, page, vqa
from clipflow_jax.evaluation.page import Artefacts, Drawing, Reading
from clipflow_jax.files import write, write_text
from clipflow_jax.inference import show

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

_SHOWN = 12  # pictures of each kind in a report
_RETRIEVED = 100  # captions to choose from


def evaluate_shapes(
  model: ClipFlow, source: ShapesSource, *, n: int, per_category: int, seed: int
) -> tuple[dict[str, Any], Artefacts]:
  """Everything the bars ask of a model of shapes, on `source`, its test split.

  n: pictures behind every score but the compositional ones, which take `per_category` prompts each.

  feature_distance is the Fréchet distance in CLIP's image embedding between n drawn pictures, decoded and
  embedded anew because that is what a person sees, and n real ones; feature_distance_real is that of n other
  real ones, and feature_distance_decoded that of the same through features and decoder: the decoder's part.
  decoder_reader is the share of true features whose picture shows all that the full description says,
  reader_truth that of the true pictures themselves.
  """
  verdicts = compositional.judge(lambda prompts: model.draw(prompts, seed=seed), per_category, seed)
  by_category = compositional.accuracy(verdicts)
  examples = [source[i] for i in range(n)]
  descriptions = [shapes_text.describe(source.scene(i)) for i in range(n)]
  real = _stack(examples)
  decoded = model.decode(model.encode(real))
  drawn = model.draw([example.captions[0] for example in examples], seed=seed)
  questions, truth = zip(*(example.questions[0] for example in examples), strict=True)
  answers = model.answer(real, list(questions))
  written = model.caption(real)
  texts = [description.text for description in descriptions]
  metrics = {
    **{f"compositional_{name}": by_category[name] for name in ("one", "two", "unseen")},
    "compositional_by_category": by_category,
    **vqa.accuracy(questions, answers, truth),
    "caption_exact": captioning.exact(written, texts),
    "caption_attributes": captioning.attributes(written, texts),
    **classification.zero_shot(model, n=n, seed=seed, size=source.size),
    **_distances(model, real, drawn, decoded, _stack([source[n + i] for i in range(n)])),
    "decoder_psnr": images.psnr(real, decoded),
    "decoder_reader": _read_right(descriptions, decoded),
    "reader_truth": _read_right(descriptions, real),
    "pictures": n,
    "pictures_per_category": per_category,
    "seed": seed,
  }
  readings = [
    Reading(*parts)
    for parts in [
      *zip(real[:_SHOWN], [DESCRIBE] * _SHOWN, written, texts, strict=False),
      *zip(real[:_SHOWN], questions, answers, truth, strict=False),
    ]
  ]
  return metrics, Artefacts("clipflow on shapes", _shown(verdicts), readings, real[:_SHOWN], decoded[:_SHOWN])


def evaluate_folder(model: ClipFlow, source: Source, *, n: int, seed: int = 0) -> tuple[dict[str, Any], Artefacts]:
  """The same for real captioned pictures, which have no reader: distances, PSNR, retrieval, CLIP scores.

  Takes up to 2 n readable pictures of the source at random. The first half is drawn anew from its captions;
  the second is what both are compared with. retrieval_accuracy is the share of pictures whose caption CLIP
  finds among retrieval_candidates distinct ones (100 if there are as many). The CLIP scores are the model's
  own judgement, fit to compare drawn with real and for nothing else.
  """
  examples = readable(source, np.random.default_rng(seed).permutation(len(source)), 2 * n)
  examples = [example for example in examples if example.captions]
  half = len(examples) // 2
  if half < 2:
    raise UserError(f"only {len(examples)} readable pictures in {source!r}: evaluation needs 4 or more")
  ours, others = examples[:half], _stack(examples[half : 2 * half])
  real, captions = _stack(ours), [example.captions[0] for example in ours]
  descriptions = [example.description for example in ours]
  drawn = model.draw(captions, seed=seed)
  decoded = model.decode(model.encode(real))
  written = model.caption(real)
  image_embeddings, text_embeddings = model.embed_image(real), model.embed_text(captions)
  distinct = [captions.index(caption) for caption in dict.fromkeys(captions)][:_RETRIEVED]
  metrics = {
    "retrieval_accuracy": classification.retrieval(image_embeddings[distinct], text_embeddings[distinct]),
    "retrieval_candidates": len(distinct),
    "clip_score_drawn": images.clip_score_of(model.embed_image(drawn), text_embeddings),
    "clip_score_real": images.clip_score_of(image_embeddings, text_embeddings),
    "caption_exact": captioning.exact(written, descriptions),
    **_distances(model, real, drawn, decoded, others),
    "decoder_psnr": images.psnr(real, decoded),
    "pictures": half,
    "seed": seed,
  }
  shown = range(min(4 * _SHOWN, half))
  artefacts = Artefacts(
    title="clipflow on a folder of pictures",
    drawings=[Drawing(drawn[i], captions[i], "captions of the test split") for i in shown],
    readings=[Reading(real[i], DESCRIBE, written[i], descriptions[i]) for i in shown[:_SHOWN]],
    real=real[:_SHOWN],
    decoded=decoded[:_SHOWN],
  )
  return metrics, artefacts


def write_report(
  directory: str | os.PathLike[str],
  metrics: Mapping[str, Any],
  artefacts: Artefacts,
  rows: Iterable[Mapping[str, Any]],
  *,
  bars: tuple[bars_.Bar, ...] = bars_.QUICKSTART,
) -> dict[str, Any]:
  """Write the report and return the metrics as written: those given, with `provenance` for what they lack.

  Leaves index.html, samples.png, reconstructions.png, curves.png (if there are rows of metrics.jsonl),
  captions.txt, pictures/ and metrics.json in the directory. Every file appears whole or not at all,
  metrics.json last.
  """
  directory = Path(directory)
  metrics = {**metrics, **provenance(), **metrics}  # given values win and stay first
  rows = list(rows)
  # What can fail, before the first file of an older report is replaced.
  numbers = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
  text = page.html(metrics, artefacts, bars_.standings(metrics, bars), has_curves=bool(rows))
  (directory / "pictures").mkdir(parents=True, exist_ok=True)
  pictures = {page.drawing_path(i): drawing.image for i, drawing in enumerate(artefacts.drawings)}
  pictures |= {page.reading_path(i): reading.image for i, reading in enumerate(artefacts.readings)}
  for name, image in pictures.items():
    write(directory / name, Image.fromarray(image).save)
  write(directory / "samples.png", _samples(artefacts.drawings).save)
  reconstructions = {"real": artefacts.real, "decoded": artefacts.decoded}
  write(directory / "reconstructions.png", show.side_by_side(reconstructions).save)
  if rows:
    write(directory / "curves.png", show.curves(rows).savefig)
  write_text(directory / "captions.txt", "\n".join(map(_lines, artefacts.readings)))
  write_text(directory / "index.html", text)
  write_text(directory / "metrics.json", numbers)
  return metrics


def of_training(directory: Path) -> dict[str, float | None]:
  """What the report that lies there tells of the run's time and memory; None where it tells nothing."""
  try:
    last = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    last = {}
  return {name: last.get(name) for name in ("minutes_total", "minutes_install", "peak_memory_gib")}


def provenance() -> dict[str, Any]:
  """Where the numbers come from: peak memory of this process, and the software."""
  unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
  return {"peak_memory_gib": peak, **software()}


def software() -> dict[str, Any]:
  """Versions, and the commit of the source if any."""
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
  versions = {"clipflow_jax": clipflow_jax.__version__, "python": platform.python_version()}
  versions |= {name: metadata.version(name) for name in names}
  return {"versions": versions, "commit": _commit()}


def _shown(verdicts: Sequence[compositional.Verdict]) -> list[Drawing]:
  """The first of every category."""
  seen: Counter[str] = Counter()
  drawings = []
  for verdict in verdicts:
    if seen[verdict.category] < _SHOWN:
      drawings.append(Drawing(verdict.image, verdict.caption.text, verdict.category, verdict.right))
    seen[verdict.category] += 1
  return drawings


def _distances(
  model: ClipFlow, real: np.ndarray, drawn: np.ndarray, decoded: np.ndarray, others: np.ndarray
) -> dict[str, float]:
  reference = model.embed_image(others)
  sets = {"feature_distance": drawn, "feature_distance_real": real, "feature_distance_decoded": decoded}
  return {name: images.frechet_distance_of(model.embed_image(s), reference) for name, s in sets.items()}


def _read_right(descriptions: Sequence[shapes_text.Caption], pictures: np.ndarray) -> float:
  pairs = zip(descriptions, pictures, strict=True)
  return float(np.mean([compositional.matches(text, compositional.read(image)) for text, image in pairs]))


def _stack(examples: Sequence[Example]) -> np.ndarray:
  return np.stack([example.image for example in examples])


def _samples(drawings: Sequence[Drawing]) -> Image.Image:
  marks = {True: "RIGHT: ", False: "WRONG: ", None: ""}
  texts = [marks[drawing.right] + drawing.prompt for drawing in drawings]
  return show.grid(np.stack([drawing.image for drawing in drawings]), _SHOWN // 2, texts)


def _lines(reading: Reading) -> str:
  mark = "right" if reading.right else "wrong"
  return f"{reading.question}\n  wrote ({mark}): {reading.written}\n  truth: {reading.truth}\n"


def _commit() -> str:
  """What CLIPFLOW_COMMIT says, else HEAD of the repository this package belongs to, else "unknown"."""
  if told := os.environ.get("CLIPFLOW_COMMIT"):  # launch/quickstart.sh installs a copy and tells whose
    return told
  here = Path(clipflow_jax.__file__).parent
  command = ["git", "-C", str(here), "rev-parse", "--show-toplevel", "HEAD"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return "unknown"
  top, _, commit = done.stdout.partition("\n")
  # An environment inside somebody else's repository would report theirs.
  ours = done.returncode == 0 and Path(top, "clipflow_jax", "__init__.py").is_file()
  return commit.strip() if ours else "unknown"
