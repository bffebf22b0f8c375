from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.flow import path
from clipflow_jax.inference.inside import PICTURE, Inside
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.models.clipflow import ClipFlow as Model
from tests import tiny_runs

PROMPTS = ["a red circle", "a blue square on a white background"]
T = 0.6


@pytest.fixture(scope="module")
def model(trained: Path) -> ClipFlow:
  return ClipFlow.from_checkpoint(trained, batch_size=2)


@pytest.fixture(scope="module")
def inside(model: ClipFlow) -> Inside:
  return Inside(model)


@pytest.fixture(scope="module")
def x_t(model: ClipFlow) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(2, *model.model.feature_shape)).astype(np.float32)


def test_the_trajectory_leads_from_noise_to_what_is_drawn(model: ClipFlow, inside: Inside):
  times, way = inside.trajectory(PROMPTS, seed=3)
  assert times.shape == (4,) and times[0] == 1 and times[-1] == 0  # the tiny config takes three steps
  assert way.shape == (4, 2, *model.model.feature_shape)
  assert abs(way[0].std() - 1) < 0.2
  np.testing.assert_allclose(way[-1], model.draw_features(PROMPTS, seed=3), atol=1e-5)


def test_fields_are_of_each_prompt_and_of_none(inside: Inside, x_t: np.ndarray):
  fields = inside.fields(PROMPTS, x_t, T)
  for velocity in (fields.prompted, fields.unprompted, fields.early):
    assert velocity.shape == x_t.shape
  other = inside.fields(PROMPTS[::-1], x_t, T)
  assert not np.allclose(other.prompted, fields.prompted, atol=1e-4)
  np.testing.assert_allclose(other.unprompted, fields.unprompted, atol=1e-5)


def test_the_loss_at_a_time_is_that_of_the_velocity_there(model: ClipFlow, inside: Inside):
  pictures = np.random.default_rng(1).integers(0, 256, (2, model.image_size, model.image_size, 3), np.uint8)
  prompted, unprompted = inside.losses(PROMPTS, pictures, [0.2, T], seed=5)
  assert prompted.shape == unprompted.shape == (2, 2)
  x = model.encode(pictures)
  noise = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
  fields = inside.fields(PROMPTS, np.asarray(path.interpolate(x, noise, np.full(2, T, np.float32))), T)
  expected = [np.square(v - (noise - x)).mean(axis=(1, 2)) for v in (fields.prompted, fields.unprompted)]
  np.testing.assert_allclose([prompted[1], unprompted[1]], expected, rtol=1e-3)


def test_each_token_is_left_out_once(inside: Inside, x_t: np.ndarray):
  words, clean = inside.ablate(PROMPTS[0], x_t[0], T)
  assert "aredcircle" in "".join(words)
  assert clean.shape == (len(words) + 1, *x_t.shape[1:])
  fields = inside.fields(PROMPTS[:1], x_t[:1], T)
  np.testing.assert_allclose(clean[0], path.clean(fields.prompted[0], x_t[0], np.float32(T)), atol=1e-4)
  assert all(np.abs(without - clean[0]).max() > 1e-6 for without in clean[1:])


def test_a_drawing_looks_at_its_words_and_at_itself(inside: Inside, x_t: np.ndarray):
  looks = inside.look_drawing(PROMPTS[0], x_t[0], T)
  words, _ = inside.ablate(PROMPTS[0], x_t[0], T)
  tokens = x_t.shape[1]
  assert looks.queries == [PICTURE] * tokens
  assert looks.keys == [*words, *["t"] * 4, *[PICTURE] * tokens]
  assert looks.weights.shape == (2, 2, tokens, len(looks.keys))
  np.testing.assert_allclose(looks.weights.sum(axis=-1), 1, atol=1e-5)


def test_words_look_back_and_a_picture_at_all_of_itself(model: ClipFlow, inside: Inside):
  picture = np.zeros((model.image_size, model.image_size, 3), np.uint8)
  looks = inside.look_reading(picture, "what is it?", "red")
  assert looks.queries == looks.keys
  assert looks.answer == list(range(looks.answer[0], len(looks.queries)))
  assert "".join(looks.queries[i] for i in looks.answer[:-1]) == "red"
  np.testing.assert_allclose(looks.weights.sum(axis=-1), 1, atol=1e-5)
  own = np.array([word == PICTURE for word in looks.keys])
  assert own.sum() == model.model.feature_shape[0]
  seen = (looks.weights > 0).any(axis=(0, 1))
  expected = np.tri(len(own), dtype=bool) | (own[:, None] & own)
  np.testing.assert_array_equal(seen, expected)


def test_a_model_that_cannot_draw_has_nothing_inside(model: ClipFlow):
  blind = ClipFlow(Model(**tiny_runs.model(transformer=None)), {}, model.tokenizer, model.config)
  with pytest.raises(UserError, match="needs a flow expert"):
    Inside(blind)
