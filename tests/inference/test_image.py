from __future__ import annotations

import jax
import numpy as np
import pytest

from clipflow_jax.flow import solvers
from clipflow_jax.inference import image
from tests import tiny


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
