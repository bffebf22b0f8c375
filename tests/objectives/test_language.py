from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.errors import UserError
from clipflow_jax.objectives import language
from clipflow_jax.objectives.joint import Objective
from tests import tiny

ROWS, LENGTH, VOCABULARY = 2, 6, 5


def by_loop(logits, tokens, segments, weights) -> tuple[float, float, float, float]:
  """(loss, right, z, weight), token by token."""
  loss = right = z = total = 0.0
  for row in range(ROWS):
    for slot in range(1, LENGTH):
      if segments[row, slot] == segments[row, slot - 1]:
        scores = logits[row, slot - 1].astype(np.float64)
        wanted, weight = tokens[row, slot], weights[row, slot]
        log_sum = np.log(np.exp(scores).sum())
        loss += weight * (log_sum - scores[wanted])
        z += weight * log_sum**2
        right += weight * (scores.argmax() == wanted)
        total += weight
  return loss, right, z, total


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
  lengths=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=ROWS, max_size=ROWS),
  seed=st.integers(0, 1000),
  chunk=st.sampled_from([0, 1, 2, 3, 6]),
)
def test_each_token_is_predicted_from_the_slot_before_it_in_its_example(
  lengths: list[list[int]], seed: int, chunk: int
):
  rng = np.random.default_rng(seed)
  rows = [np.repeat(np.arange(len(row)) + 1, row)[:LENGTH] for row in lengths]
  segments = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows])
  logits = rng.normal(size=(ROWS, LENGTH, VOCABULARY)).astype(np.float32)
  tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH))
  weights = (rng.random((ROWS, LENGTH)) * (segments > 0)).astype(np.float32)
  expected = by_loop(logits, tokens, segments, weights)
  sums = language.predict_next(logits, np.eye(VOCABULARY), tokens, segments, weights, chunk=chunk)
  found = (sums.loss, sums.right, sums.z, language.weight(segments, weights))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_in_chunks_the_gradients_are_the_same_and_no_logits_of_all_slots_exist():
  rng = np.random.default_rng(0)
  hidden, matrix = (rng.normal(size=size).astype(np.float32) for size in ((2, 12, 8), (8, 160)))
  tokens = rng.integers(0, 160, (2, 12))
  segments, weights = np.repeat([[1, 2]], 6, axis=1).repeat(2, axis=0), rng.random((2, 12)).astype(np.float32)

  def gradient(chunk: int):
    def loss(hidden, matrix):
      return 3 * language.predict_next(hidden, matrix, tokens, segments, weights, z_loss=0.1, chunk=chunk).loss

    return jax.grad(loss, argnums=(0, 1))

  def plainly(hidden, matrix):
    scores = jax.nn.log_softmax(hidden @ matrix)
    log_sum = jax.nn.logsumexp(hidden @ matrix, axis=-1)
    of_next = jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    known = weights[:, 1:] * (segments[:, 1:] == segments[:, :-1])
    return 3 * (known * (0.1 * log_sum[:, :-1] ** 2 - of_next)).sum()

  expected = jax.grad(plainly, argnums=(0, 1))(hidden, matrix)
  for found in (jax.jit(gradient(0))(hidden, matrix), jax.jit(gradient(4))(hidden, matrix)):
    for a, b in zip(expected, found):
      np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
  assert "2,12,160" in str(jax.make_jaxpr(gradient(0))(hidden, matrix))
  program = str(jax.make_jaxpr(gradient(4))(hidden, matrix))
  assert "2,4,160" in program and "12,160" not in program and "24,160" not in program


def test_of_bfloat16_neither_logits_nor_the_gradient_of_the_matrix_are_rounded_to_it():
  rng = np.random.default_rng(0)
  hidden, matrix = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((2, 64, 8), (8, 30)))
  tokens, ones = rng.integers(0, 30, (2, 64)), np.ones((2, 64), np.int32)

  def loss(matrix):
    return language.predict_next(hidden, matrix, tokens, ones, ones).loss

  scores = (np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64))[:, :-1]
  taken = np.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
  found, gradient = jax.value_and_grad(loss)(matrix.astype(jnp.float32))
  assert found == pytest.approx((np.log(np.exp(scores).sum(axis=-1)) - taken).sum(), rel=1e-5)
  assert gradient.dtype == jnp.float32 and np.mean(gradient == gradient.astype(jnp.bfloat16)) < 0.1
  assert jax.grad(loss)(matrix).dtype == jnp.bfloat16  # as the parameter is


def test_a_chunk_that_does_not_divide_the_row_is_refused():
  with pytest.raises(UserError, match="vocabulary_chunk 4 does not divide the 6 slots"):
    zeros = np.zeros((ROWS, LENGTH), np.int32)
    language.predict_next(np.zeros((ROWS, LENGTH, 3)), np.zeros((3, 5)), zeros, zeros, zeros, chunk=4)


def test_z_is_a_metric_and_in_the_loss_by_its_weight(params):
  def sums(**fields: float):
    objective = Objective({"language": 1.0}, **fields)
    keys = jax.random.split(jax.random.key(0), 2)
    return tiny.model().apply({"params": params}, tiny.batch(), keys, method=objective.sums)

  plain, with_z = jax.device_get(jax.jit(lambda: (sums(), sums(z_loss=0.01, vocabulary_chunk=8)))())
  assert with_z.keys() - plain.keys() == {"language_z"} and with_z["language_z"] > 0
  assert with_z["language"] == pytest.approx(plain["language"] + 0.01 * with_z["language_z"], rel=1e-5)
  assert with_z["language_accuracy"] == plain["language_accuracy"]


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.params()


def test_conversations_packed_in_one_row_have_the_loss_of_each_in_its_own(params):
  rng = np.random.default_rng(0)
  examples = [tiny.example(rng, 3, tiny.READ, 4), tiny.example(rng, 5), tiny.example(rng, 2, tiny.READ)]
  objective, model = Objective({"language": 1.0}), tiny.model()
  keys = jax.random.split(jax.random.key(0), 3)

  @jax.jit
  def evaluate(batch):
    sums = model.apply({"params": params}, batch, keys, method=objective.sums)
    return sums, objective.counts(batch)["language"]

  packed, packed_count = jax.device_get(evaluate(tiny.pack([examples, [], []])))
  separate, count = jax.device_get(evaluate(tiny.pack([[one] for one in examples])))
  assert count == packed_count == sum(one["loss_weights"][1:].sum() for one in examples) > 3
  assert packed.keys() == {"language", "language_accuracy"}
  for name in packed:
    assert packed[name] == pytest.approx(separate[name], rel=1e-5)
