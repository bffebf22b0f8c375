from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.data import shapes
from clipflow_jax.data.example import BadRecord
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import bars, classification, compositional, report

N, PER_CATEGORY, SEED, SIZE = 48, 4, 3, 60
SOURCE = ShapesSource(size=SIZE, split="test", seed=SEED, questions=1)


class Oracle:
  """Draws what the prompt says, and knows every picture of the test split by heart."""

  def __init__(self):
    examples = [SOURCE[i] for i in range(N)]
    self.scenes = {text: SOURCE.scene(i) for i, e in enumerate(examples) for text in e.captions}
    self.descriptions = {e.image.tobytes(): e.description for e in examples}
    self.answers = {(e.image.tobytes(), *e.questions[0][:1]): e.questions[0][1] for e in examples}
    for category in compositional.CATEGORIES:
      asked = compositional.prompts(category, PER_CATEGORY, SEED)
      self.scenes |= {prompt.text: _scene_of(prompt) for prompt in asked}

  def draw(self, prompts, steps=None, guidance=None, seed=0, images=None):
    return np.stack([shapes.render(self.scenes[prompt], SIZE) for prompt in prompts])

  def encode(self, images):
    return images.reshape(len(images), 36, -1).astype(np.float32)

  def decode(self, features):
    return features.astype(np.uint8).reshape(-1, SIZE, SIZE, 3)

  def caption(self, images):
    return [self.descriptions[image.tobytes()] for image in images]

  def answer(self, images, questions):
    return [self.answers[image.tobytes(), question] for image, question in zip(images, questions, strict=True)]

  def embed_image(self, images):
    quarters = images.reshape(-1, 2, SIZE // 2, 2, SIZE // 2, 3).mean((2, 4)).reshape(len(images), -1) - 128
    rough = np.pad(quarters, ((0, 0), (0, 1)), constant_values=128)
    return rough / np.linalg.norm(rough, axis=1, keepdims=True)

  def classify(self, images, names):
    seen = [compositional.read(image).objects[0] for image in images]
    return np.array([classification.PAIRS.index((thing.colour, thing.shape)) for thing in seen], np.int32)


class Blind:
  """Draws nothing, sees nothing, says nothing."""

  def draw(self, prompts, steps=None, guidance=None, seed=0, images=None):
    return np.full((len(prompts), SIZE, SIZE, 3), 128, np.uint8)

  def encode(self, images):
    return np.zeros((len(images), 36, 8), np.float32)

  def decode(self, features):
    return self.draw(features)

  def caption(self, images):
    return [""] * len(images)

  def answer(self, images, questions):
    return [""] * len(images)

  def embed_image(self, images):
    return Oracle.embed_image(self, images)

  def embed_text(self, texts):
    return np.full((len(texts), 13), 13**-0.5)

  def classify(self, images, names):
    return np.zeros(len(images), np.int32)


def _scene_of(prompt):
  """Some scene the prompt is true of: everything it leaves free at random, until it is."""
  rng = np.random.default_rng(0)
  while True:
    free = iter(rng.permutation(9).tolist())
    things = [
      shapes.Object(m.shape, m.colour, m.size or "large", m.outlined, next(free) if m.place is None else m.place)
      for m in prompt.mentions
    ]
    apart = len({thing.place for thing in things}) == len(things)
    if apart and (prompt.relation is None or shapes.related(things[0], prompt.relation, things[1])):
      return shapes.Scene(tuple(sorted(things, key=lambda t: t.place)), prompt.background or "white")


@pytest.fixture(scope="module")
def perfect():
  return report.evaluate_shapes(Oracle(), SOURCE, n=N, per_category=PER_CATEGORY, seed=SEED)


@pytest.fixture(scope="module")
def blind():
  return report.evaluate_shapes(Blind(), SOURCE, n=N, per_category=PER_CATEGORY, seed=SEED)


def test_what_training_took_is_known_from_the_report_before(tmp_path):
  assert set(report.of_training(tmp_path).values()) == {None}
  (tmp_path / "metrics.json").write_text('{"minutes_total": 9.5, "peak_memory_gib": 1.5, "seed": 3}')
  assert report.of_training(tmp_path) == {"minutes_total": 9.5, "minutes_install": None, "peak_memory_gib": 1.5}


def test_a_model_that_does_everything_right_scores_one(perfect):
  metrics, _ = perfect
  assert metrics["compositional_by_category"] == dict.fromkeys(compositional.CATEGORIES, 1.0)
  ones = ["compositional_one", "compositional_two", "compositional_unseen", "question_accuracy"]
  ones += ["caption_exact", "caption_attributes", "zero_shot_accuracy", "decoder_reader", "reader_truth"]
  assert {name: metrics[name] for name in ones} == dict.fromkeys(ones, 1.0)
  assert metrics["decoder_psnr"] > 58
  assert metrics["feature_distance_decoded"] == metrics["feature_distance_real"] > 0
  assert metrics["feature_distance"] < 3 * metrics["feature_distance_real"]


def test_a_blind_model_scores_nothing(blind):
  metrics, _ = blind
  assert metrics["compositional_by_category"] == dict.fromkeys(compositional.CATEGORIES, 0.0)
  zeros = ["question_accuracy", "caption_exact", "caption_attributes", "decoder_reader"]
  assert {name: metrics[name] for name in zeros} == dict.fromkeys(zeros, 0.0)
  assert metrics["zero_shot_accuracy"] < 0.1
  assert metrics["decoder_psnr"] < 22
  assert metrics["feature_distance"] > 3 * metrics["feature_distance_real"]


def test_the_metrics_are_flat_but_for_the_categories(perfect):
  metrics, _ = perfect
  nested = {name for name, value in metrics.items() if not isinstance(value, int | float)}
  assert nested == {"compositional_by_category"}


def test_a_report_has_everything_the_page_shows(perfect, tmp_path):
  metrics, artefacts = perfect
  rows = [{"step": step, "stage": stage, "loss": 1 / step} for stage in ("tower", "flow") for step in (1, 2)]
  run = {"minutes_total": 14.0, "minutes_install": 0.5}
  written = report.write_report(tmp_path, {**run, **metrics}, artefacts, rows)
  assert json.loads((tmp_path / "metrics.json").read_text("utf-8")) == written
  needed = [bar.metric for bar in bars.QUICKSTART]
  needed += ["minutes_install", "feature_distance_real", "compositional_by_category", "seed", "commit"]
  assert set(needed) <= set(written)
  assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "clipflow_jax"} == set(
    written["versions"]
  )
  text = (tmp_path / "index.html").read_text("utf-8")
  shown = re.findall(r'src="([^"]+)"', text)
  assert {"reconstructions.png", "curves.png"} < set(shown)
  assert len(shown) == 2 + len(artefacts.drawings) + len(artefacts.readings)
  for name in [*shown, "samples.png"]:
    Image.open(tmp_path / name).verify()
  assert not re.search(r"https?://|<script", text)
  assert all(drawing.prompt in text for drawing in artefacts.drawings)
  assert "✗ wrong" not in text
  captions = (tmp_path / "captions.txt").read_text("utf-8")
  assert all(reading.truth in captions for reading in artefacts.readings)
  assert not list(tmp_path.rglob(".partial*"))


def test_the_page_marks_what_is_wrong_and_says_what_would_be_right(blind, tmp_path):
  metrics, artefacts = blind
  written = report.write_report(tmp_path, metrics, artefacts, rows=[])
  text = (tmp_path / "index.html").read_text("utf-8")
  wrong = len(artefacts.drawings) + len(artefacts.readings)
  missed = sum(standing.reached is False for standing in bars.standings(written))
  assert text.count("✗ wrong") == wrong
  assert text.count("✗ missed") == missed > 0
  assert "not measured" in text  # the minutes
  assert "curves.png" not in text
  assert all(reading.truth in text for reading in artefacts.readings)


def test_numbers_that_cannot_be_written_leave_the_former_report(perfect, tmp_path):
  metrics, artefacts = perfect
  report.write_report(tmp_path, metrics, artefacts, rows=[])
  before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
  with pytest.raises(ValueError, match="nan"):
    report.write_report(tmp_path, {**metrics, "decoder_psnr": float("nan")}, artefacts, rows=[])
  assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_words_of_others_cannot_break_the_page(perfect, tmp_path):
  _, artefacts = perfect
  drawing = report.Drawing(artefacts.real[0], "<script>alert('1')</script>", "a & b")
  reading = report.Reading(artefacts.real[0], "<b>?", "<img src=x>", "\"'>")
  report.write_report(tmp_path, {}, report.Artefacts("<t>", [drawing], [reading], *[artefacts.real] * 2), [])
  text = (tmp_path / "index.html").read_text("utf-8")
  assert not re.search(r"<script|<img src=x|<b>\?|<t>", text)


def test_provenance_takes_the_commit_it_is_told(monkeypatch):
  monkeypatch.setenv("CLIPFLOW_COMMIT", "f" * 40 + "-dirty")
  assert report.provenance()["commit"] == "f" * 40 + "-dirty"


def test_provenance_names_the_memory_in_gib_and_a_whole_commit():
  found = report.provenance()
  assert 0.01 < found["peak_memory_gib"] < 1000
  assert re.fullmatch(r"[0-9a-f]{40}|unknown", found["commit"])
  assert re.match(r"\d+\.\d+", found["versions"]["jax"])


class Folder(list):
  """Pictures of shapes as a folder hands them out, every fifth broken, with so many distinct captions."""

  def __init__(self, n, distinct=1000):
    source = ShapesSource(size=SIZE, split="test", seed=SEED)
    super().__init__(dataclasses.replace(source[i], captions=(f"number {i % distinct}",)) for i in range(n))
    self.reads = []

  def __repr__(self):
    return "Folder()"

  def __getitem__(self, i):
    self.reads.append(i)
    if i % 5 == 4:
      raise BadRecord(f"{i}.png", "truncated")
    return super().__getitem__(i)


class Retriever(Blind):
  """Draws the picture whose caption it was given, and embeds a caption like its picture."""

  def __init__(self, folder):
    self.known = {example.captions[0]: example.image for example in folder}

  def draw(self, prompts, steps=None, guidance=None, seed=0, images=None):
    return np.stack([self.known[prompt] for prompt in prompts])

  def encode(self, images):
    return images

  def decode(self, features):
    return features

  def embed_text(self, texts):
    return self.embed_image(self.draw(texts))


def test_a_folder_is_drawn_read_and_compared_without_its_bad_records():
  folder = Folder(50)
  metrics, artefacts = report.evaluate_folder(Retriever(list.__iter__(folder)), folder, n=30, seed=SEED)
  assert metrics["pictures"] == 20
  assert len(set(folder.reads)) == len(folder.reads) == 50
  assert metrics["retrieval_accuracy"] == 1
  assert metrics["retrieval_candidates"] == 20
  assert metrics["clip_score_real"] == pytest.approx(100)
  assert metrics["clip_score_drawn"] == pytest.approx(100)
  assert metrics["feature_distance_decoded"] == metrics["feature_distance_real"] > 0
  assert metrics["caption_exact"] == 0
  assert all(drawing.right is None for drawing in artefacts.drawings)


def test_captions_that_repeat_count_once_and_a_blind_model_finds_one_of_them():
  metrics, _ = report.evaluate_folder(Blind(), Folder(100, distinct=7), n=40, seed=SEED)
  assert metrics["pictures"] == 40
  assert metrics["retrieval_candidates"] == 7
  assert metrics["retrieval_accuracy"] == 1 / 7
  assert metrics["feature_distance"] > metrics["feature_distance_real"]


def test_too_small_a_folder_is_one_clear_line():
  with pytest.raises(UserError, match=r"only 2 readable pictures in Folder\(\): .* needs 4"):
    report.evaluate_folder(Blind(), Folder(2), n=10)
