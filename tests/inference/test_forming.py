from __future__ import annotations

import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.inference.forming import Forming
from clipflow_jax.inference.pipeline import ClipFlow
from tests import tiny_runs

PROMPTS = ["red", "a star", "blue"]


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  return tiny_runs.lively(ClipFlow.from_checkpoint(trained))


@pytest.fixture(scope="module")
def forming(model) -> Forming:
  return Forming(model)


def test_it_ends_with_what_is_drawn_when_nobody_looks(model, forming):
  looks = list(forming.draw(PROMPTS, steps=5, guidance=2.0, seed=3, looks=2))
  assert [look.step for look in looks] == [3, 5]
  drawn = model.draw_features(PROMPTS, steps=5, guidance=2.0, seed=3)
  np.testing.assert_allclose(looks[-1].features, drawn, atol=1e-4)
  assert np.abs(looks[0].features - drawn).max() > 0.01


def test_other_steps_and_guidance_are_the_same_program(forming):
  assert [look.step for look in forming.draw(PROMPTS, steps=1, guidance=3.0)] == [1]
  assert [look.step for look in forming.draw(PROMPTS, steps=9, guidance=4.0, looks=20)] == [*range(1, 10)]
  assert forming._begin._cache_size() == forming._go_on._cache_size() == 1


def test_nothing_is_refused(forming):
  with pytest.raises(UserError, match="there are no prompts"):
    next(forming.draw([]))
