"""Classification, captions and questions."""

from __future__ import annotations

import numpy as np
import pytest

from clipflow_jax.data import shapes
from clipflow_jax.data.shapes_source import ShapesSource
from clipflow_jax.data.shapes_text import describe
from clipflow_jax.evaluation import bars, captioning, classification, compositional, vqa


class _Classifier:
  """Right about every pair but those in `wrong`."""

  def __init__(self, wrong=()):
    self.wrong = wrong

  def classify(self, images, names):
    assert names == list(classification.NAMES)
    pairs = [(thing.colour, thing.shape) for image in images for thing in compositional.read(image).objects]
    return np.array([(classification.PAIRS.index(pair) + (pair in self.wrong)) % 48 for pair in pairs])


def test_the_classes_are_48_names_in_plain_words():
  assert len(set(classification.NAMES)) == 48
  assert {"a red circle", "an orange star"} < set(classification.NAMES)


def test_zero_shot_tells_seen_pairs_from_unseen_ones():
  found = classification.zero_shot(_Classifier(wrong=shapes.UNSEEN), n=96, seed=0, size=60)
  assert found == {"zero_shot_accuracy": 42 / 48, "zero_shot_seen": 1.0, "zero_shot_unseen": 0.0}


def test_zero_shot_shows_every_pair_equally_often_and_the_same_pictures_again():
  class Keeper(_Classifier):
    def classify(self, images, names):
      self.images = images
      return super().classify(images, names)

  first, second = Keeper(), Keeper()
  assert [classification.zero_shot(k, n=96, seed=5, size=60) for k in (first, second)]
  np.testing.assert_array_equal(first.images, second.images)
  seen = [compositional.read(image).objects for image in first.images]
  pairs = [(thing.colour, thing.shape) for (thing,) in seen]
  assert all(pairs.count(pair) == 2 for pair in classification.PAIRS)


def test_retrieval_is_the_share_of_pictures_nearest_to_their_own_text():
  texts = np.eye(4)
  assert classification.retrieval(texts, texts) == 1
  assert classification.retrieval(texts[[0, 1, 3, 2]], texts) == 0.5
  pictures = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0.6, 0.8]])  # to each text its own is nearest, but not to each
  assert classification.retrieval(pictures, np.eye(3)) == pytest.approx(2 / 3)


def test_captions_are_exact_or_not():
  assert captioning.exact(["a red circle ", "a red star"], ["a red circle", "a blue star"]) == 0.5


def test_one_wrong_word_costs_one_attribute_and_silence_all():
  source = ShapesSource(split="test")
  truth = [describe(source.scene(i)).text for i in range(20)]
  assert captioning.attributes(truth, truth) == 1
  assert captioning.attributes([""] * 20, truth) == 0
  text = "a small red circle at the top on a white background"
  assert captioning.attributes([text.replace("red", "blue")], [text]) == pytest.approx(4 / 5)
  assert captioning.attributes(["a red circle"], ["an outlined red circle"]) == pytest.approx(4 / 5)


def test_questions_count_by_their_kind():
  asked = [
    ("how many shapes are there?", "two"),
    ("how many red stars are there?", "one"),
    ("is there a", "no"),
  ]
  found = vqa.accuracy([question for question, _ in asked], ["two", "two", "no"], [answer for _, answer in asked])
  assert found == {
    "question_accuracy": pytest.approx(2 / 3),
    "question_how_many": 0.5,
    "question_is_there": 1.0,
  }
  assert vqa.accuracy(["is there a"], [""], ["no"])["question_accuracy"] == 0


def test_every_question_of_the_data_is_of_one_of_six_kinds():
  source = ShapesSource(split="test", questions=8)
  kinds = {vqa.kind(question) for i in range(50) for question, _ in source[i].questions}
  assert kinds == {"what colour", "what is", "which shape", "where is", "how many", "is there"}


def test_a_bar_is_reached_at_its_limit_and_unknown_without_a_measurement():
  metrics = {
    "decoder_psnr": 22.0,
    "minutes_total": 15.1,
    "feature_distance": 0.3,
    "feature_distance_real": 0.1,
  }
  found = {standing.bar.metric: standing for standing in bars.standings(metrics)}
  assert found["decoder_psnr"].reached is True
  assert found["minutes_total"].reached is False
  assert found["feature_distance"].limit == pytest.approx(0.3)
  assert found["caption_exact"].reached is None
