from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from clipflow_jax.flow import guidance, solvers
from clipflow_jax.inference import image
from clipflow_jax.inference.image import Sampling
from tests import tiny

PROMPTS, EMPTY = (tiny.pack([[tiny.example(np.random.default_rng(0), n, tiny.DRAW)]], pictures=1) for n in (5, 1))
SHARED = {name: value for name, value in tiny.FIELDS["transformer"].items() if not name.startswith(("flow", "early"))}
DRAWER = dict(queries=2, width=16, layers=1, heads=2, mlp=24)


@pytest.mark.parametrize("guide", ["text", "early", "null"])
def test_guidance_goes_on_from_the_weaker_prediction_through_the_stronger(guide: str):
  model = tiny.model(transformer=SHARED, drawer=DRAWER) if guide == "null" else tiny.model()
  init = functools.partial(model.init, method="everything")
  params = tiny.random_params(jax.eval_shape(init, jax.random.key(0), PROMPTS)["params"])
  keys = jax.random.split(jax.random.key(0), 1)

  @jax.jit
  def everything(params):
    def drawn(guidance: float, prompts=PROMPTS) -> jax.Array:
      return image.draw(model, params, prompts, EMPTY, keys, Sampling(1, guidance, eta=0.0, guide=guide))

    return drawn(0.0), drawn(1.0), drawn(3.0), drawn(1.0, EMPTY)

  weak, strong, pushed, empty = everything(params)
  assert np.abs(strong - weak).max() > 1e-2
  np.testing.assert_allclose(pushed, weak + 3 * (strong - weak), rtol=1e-3, atol=1e-3)
  if guide == "text":
    np.testing.assert_allclose(weak, empty, atol=1e-4)


@pytest.mark.parametrize(("guide", "rule"), [("text", "classifier_free"), ("early", "internal")])
def test_how_to_draw_reaches_the_guidance_and_the_solver(monkeypatch: pytest.MonkeyPatch, guide: str, rule: str):
  told = {}
  monkeypatch.setattr(guidance, rule, lambda pair, scale, interval: told.update(scale=scale, interval=interval))
  monkeypatch.setattr(
    solvers, "walk", lambda v, x, times, **how: told.update(how, steps=len(times) - 1) or (x, x[None])
  )
  sampling = Sampling(3, 2.0, 0.25, "heun", (0.2, 0.7), guide)
  keys = jax.random.split(jax.random.key(0), 1)
  jax.eval_shape(lambda params: image.draw(tiny.model(), params, PROMPTS, EMPTY, keys, sampling), tiny.params())
  assert told.pop("keys") is keys
  assert told == dict(scale=2.0, interval=(0.2, 0.7), method="heun", eta=0.25, steps=3)


def test_a_flow_decoder_begins_with_noise_of_its_own(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(solvers, "solve", lambda velocity, noise, times, method: noise / 4)
  model = tiny.model(pixel_decoder=dict(tiny.FIELDS["pixel_decoder"], flow=True))
  keys = jax.random.split(jax.random.key(0), 2)
  size = int(np.prod(model.feature_shape))

  def begun(keys):
    pixels = image.decode(model, {}, np.zeros((2, *model.feature_shape), np.float32), keys)
    return (pixels.reshape(2, -1)[:, :size] / 127.5 - 1) * 4

  def of_features(keys):
    return np.clip(solvers.start(keys, model.feature_shape).reshape(2, -1), -4, 4)

  found = begun(keys)
  np.testing.assert_array_equal(found, begun(keys))
  assert abs(np.corrcoef(found[0], found[1])[0, 1]) < 0.3
  steps = [jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in range(image.DECODER_STEPS)]
  for others in (keys, *steps):
    for row, noise in zip(found, of_features(others), strict=True):
      assert abs(np.corrcoef(row, noise)[0, 1]) < 0.3
