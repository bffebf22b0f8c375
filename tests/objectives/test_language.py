from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_jax.objectives import language
from clipflow_jax.objectives.joint import Objective
from tests import tiny

ROWS, LENGTH, VOCABULARY = 2, 6, 5


def by_loop(logits, tokens, segments, weights) -> tuple[float, float, float]:
  """(loss, right, weight), token by token."""
  loss = right = total = 0.0
  for row in range(ROWS):
    for slot in range(1, LENGTH):
      if segments[row, slot] == segments[row, slot - 1]:
        scores = logits[row, slot - 1].astype(np.float64)
        wanted, weight = tokens[row, slot], weights[row, slot]
        loss += weight * (np.log(np.exp(scores).sum()) - scores[wanted])
        right += weight * (scores.argmax() == wanted)
        total += weight
  return loss, right, total


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
  lengths=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=ROWS, max_size=ROWS),
  seed=st.integers(0, 1000),
)
def test_each_token_is_predicted_from_the_slot_before_it_in_its_example(lengths: list[list[int]], seed: int):
  rng = np.random.default_rng(seed)
  rows = [np.repeat(np.arange(len(row)) + 1, row)[:LENGTH] for row in lengths]
  segments = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows])
  logits = rng.normal(size=(ROWS, LENGTH, VOCABULARY)).astype(np.float32)
  tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH))
  weights = (rng.random((ROWS, LENGTH)) * (segments > 0)).astype(np.float32)
  expected = by_loop(logits, tokens, segments, weights)
  found = (
    *language.predict_next(logits, tokens, segments, weights),
    language.weight(segments, weights),
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


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
