from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipflow_jax.models.clip import Clip
from clipflow_jax.models.text import TextTower
from tests import tiny

MODEL = Clip(**tiny.FIELDS["clip"])
LENGTH = 8


@jax.jit
def run(params, tokens, mask, seen, segments):
  """(text embedding, caption logits, read pixels)."""

  def of(clip: Clip):
    return (
      clip.embed_text(tokens, mask),
      clip.caption_model.logits(clip.caption(tokens, seen, segments)),
      clip.read_pixels(seen),
    )

  return MODEL.apply({"params": params}, method=of)


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.params()["clip_model"]


@pytest.fixture
def arguments() -> dict[str, np.ndarray]:
  """Two captions of 5 and 8 words, and the tokens of their pictures."""
  rng = np.random.default_rng(0)
  mask = np.arange(LENGTH) < np.array([[5], [8]])
  seen = rng.normal(size=(2, tiny.TOKENS, tiny.CHANNELS)).astype(np.float32)
  tokens = rng.integers(1, tiny.VOCABULARY, (2, LENGTH), dtype=np.int32)
  return dict(tokens=tokens, mask=mask, seen=seen, segments=mask.astype(np.int32))


def test_shapes_and_types(params, arguments):
  embedding, logits, pixels = run(params, **arguments)
  assert embedding.shape == (2, 16) and logits.shape == (2, LENGTH, tiny.VOCABULARY)
  assert pixels.shape == (2, tiny.TOKENS, tiny.PATCH**2 * 3)
  assert embedding.dtype == logits.dtype == pixels.dtype == jnp.float32
  np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, atol=1e-5)


def test_padding_says_nothing(params, arguments):
  before = run(params, **arguments)
  arguments["tokens"] = np.where(arguments["mask"], arguments["tokens"], 7)
  after = run(params, **arguments)
  np.testing.assert_array_equal(after[0], before[0])
  np.testing.assert_array_equal(after[1][0, :5], before[1][0, :5])


def test_a_caption_is_predicted_from_the_picture_and_the_words_before(params, arguments):
  _, before, _ = run(params, **arguments)
  fifth = np.arange(LENGTH) == 4
  arguments["tokens"] = arguments["tokens"] ^ (fifth & [[False], [True]])
  _, after, _ = run(params, **arguments)
  np.testing.assert_array_equal(after[1, :4], before[1, :4])
  assert not np.isclose(after[1, 4:], before[1, 4:]).all(axis=-1).any()
  arguments["seen"] = arguments["seen"] * np.float32([[[1]], [[-1]]])
  _, other, _ = run(params, **arguments)
  assert not np.isclose(other[1], after[1]).all(axis=-1).any()
  np.testing.assert_array_equal(other[0], after[0])


@pytest.mark.parametrize("end", [40, None])
def test_a_text_that_is_read_at_its_end_is_what_stands_before_it(end: int | None):
  """As CLIP's: without its number the end is the highest one."""
  tower = TextTower(**tiny.FIELDS["clip"]["text"], pooling="end", end=end)
  plain = np.array([[5, 7, 40, 1, 1, 1]])
  params = tiny.random_params(jax.eval_shape(tower.init, jax.random.key(0), plain, plain > 0)["params"])
  embed = jax.jit(lambda tokens: tower.apply({"params": params}, tokens, tokens > 0))
  np.testing.assert_allclose(embed(np.array([[5, 7, 40, 2, 3, 2]])), embed(plain), atol=1e-6)
  assert np.abs(embed(np.array([[6, 7, 40, 1, 1, 1]])) - embed(plain)).max() > 1e-3


def test_the_temperature_is_learned_and_capped_at_a_hundred_from_where_it_can_come_back(params):
  @jax.value_and_grad
  def at(logit_scale: jax.Array) -> jax.Array:
    return MODEL.apply({"params": params | {"logit_scale": logit_scale}}, method="temperature")

  for logit_scale, wanted in ((np.log(10.0), 10.0), (np.log(99.0), 99.0), (4.65, 100.0), (50.0, 100.0)):
    value, gradient = at(jnp.float32(logit_scale))
    assert value == gradient == pytest.approx(wanted, rel=1e-5)


def test_without_a_captioner_there_is_neither_it_nor_the_read_out():
  plain = Clip(**(tiny.FIELDS["clip"] | dict(captioner=None)))
  seen, words = tiny.batch().images[:, 0], jnp.ones((2, 4), jnp.int32)

  def both(clip: Clip):
    return clip.see(seen), clip.embed_text(words, words > 0), clip.temperature()

  params = jax.eval_shape(lambda: plain.init(jax.random.key(0), method=both))["params"]
  assert params.keys() == {"vision_tower", "text_tower", "logit_scale"}
