from __future__ import annotations

import jax
import numpy as np
import pytest

from clipflow_jax.data import sequence
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import classification
from clipflow_jax.inference.pipeline import ClipFlow
from tests import tiny
from tests.tiny_runs import SIZE

QUESTIONS = ["what colour is it?", "how many circles are there?", "what colour is it?"]
ANSWERS = ["red", "two circles", "a large purple hexagon"]


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  loaded = ClipFlow.from_checkpoint(trained)
  return ClipFlow(
    loaded.model, jax.device_put(tiny.random_params(loaded.params, seed=2)), loaded.tokenizer, loaded.config
  )


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def found(model, pictures):
  return model.likelihood(QUESTIONS, ANSWERS, pictures)


def test_each_answer_counts_its_tokens_and_its_end(model, found):
  assert found.tokens.tolist() == [len(model.tokenizer.encode(answer)) + 1 for answer in ANSWERS]
  assert np.all(found.log_p < 0) and np.all(np.isfinite(found.log_p))
  without = model.likelihood(QUESTIONS[:1] * 3, ANSWERS, np.zeros((3, SIZE, SIZE, 3), np.uint8), end=False)
  assert without.tokens.tolist() == [count - 1 for count in found.tokens]


def test_features_of_a_picture_are_worth_the_picture(model, pictures, found):
  seen = model.likelihood(QUESTIONS, ANSWERS, features=model.encode(pictures))
  np.testing.assert_allclose(seen.log_p, found.log_p, rtol=1e-4)
  other = model.likelihood(QUESTIONS, ANSWERS, features=-model.encode(pictures))
  assert np.abs(other.log_p - found.log_p).min() > 1e-3


def test_where_features_are_given_no_pixels_are_made(model, pictures, monkeypatch):
  made = []
  rows = model.rows
  monkeypatch.setattr(model, "rows", lambda asked: made.append(rows(asked)) or made[-1])
  model.likelihood(QUESTIONS, ANSWERS, features=model.encode(pictures))
  assert [one.images.nbytes for one in made] == [0]


def test_class_names_are_ranked_as_they_are_of_the_pictures_themselves(model, pictures):
  seen = classification.by_words(model, ANSWERS, QUESTIONS[0]).similar(pictures)
  looked = [model.likelihood(QUESTIONS[:1] * 3, ANSWERS, np.stack([picture] * 3)).log_p for picture in pictures]
  np.testing.assert_allclose(seen, looked, rtol=1e-4)


def test_a_likelihood_is_the_sum_over_the_answers_tokens_of_what_the_slots_before_them_predict(model, pictures, found):
  rows = model.rows([sequence.read(pictures[1], ((QUESTIONS[1], ANSWERS[1]),))])

  def logits(bound):
    return bound.logits(bound.read(rows, bound.features(rows))[0])

  log_p = jax.nn.log_softmax(jax.jit(lambda params: model.model.apply({"params": params}, method=logits))(model.params))
  tokens = [*model.tokenizer.encode(ANSWERS[1]), model.tokenizer.end]
  first = int((rows.segments[0] > 0).sum()) - len(tokens)
  assert rows.tokens[0, first : first + len(tokens)].tolist() == tokens
  expected = sum(float(log_p[0, first + i - 1, token]) for i, token in enumerate(tokens))
  assert found.log_p[1] == pytest.approx(expected, rel=1e-4)
  assert found.greedy[1] == all(int(log_p[0, first + i - 1].argmax()) == token for i, token in enumerate(tokens))


def test_words_alone_have_a_likelihood_too(model):
  alone = model.likelihood(QUESTIONS, ANSWERS)
  assert np.all(alone.log_p < 0) and alone.log_p[0] != alone.log_p[2]


def test_an_empty_list_is_told(model):
  with pytest.raises(UserError, match="no questions"):
    model.likelihood([], [])
