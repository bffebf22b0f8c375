"""Every level of the Inception network against torch-fidelity's, on weights drawn by a recipe."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation.inception import bilinear
from clipflow_jax.interop import inception
from tests.parity import inception_sets

LEVELS = {"f64": "f64", "f192": "f192", "f768": "f768", "f2048": "f2048", "logits": "logits_unbiased"}


@pytest.mark.slow
def test_every_level_of_features_is_torch_fidelitys(shared_data, tmp_path):
  folder = shared_data / "inception_seeded"
  inception_sets.write_weights(folder, tmp_path)
  module, params = inception.load(tmp_path)
  wanted = np.load(folder / "golden_features_first8.npz")
  pictures = wanted["images_u8"][:2].transpose(0, 2, 3, 1)
  found = module.apply({"params": params}, bilinear(pictures))
  for ours, theirs in LEVELS.items():
    deviation = np.std(wanted[theirs])
    np.testing.assert_allclose(getattr(found, ours), wanted[theirs][:2], rtol=1e-3, atol=1e-3 * deviation)


def test_a_file_of_another_network_is_refused(tmp_path):
  save_file({"conv1.weight": np.zeros((3, 3), np.float32)}, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=r"missing: Conv2d_1a_3x3.bn.bias, .* not expected: conv1.weight"):
    inception.load(tmp_path)
