"""Pictures on their way to Inception. The network itself: tests/parity/test_inception.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import inception

PICTURE = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
PLACES = [0, 100, 298], [298, 7, 150]


def test_clean_fids_resize_makes_smaller():
  found = inception.bicubic(PICTURE[None], 4)[0, :, :, 0]
  wanted = [  # by clean-fid 0.1.35
    [89.4522, 147.25642, 135.6697, 92.19778],
    [87.88059, 164.27702, 134.96233, 135.20119],
    [101.7482, 153.84962, 190.99577, 132.62543],
    [158.50899, 69.61099, 187.48013, 165.30484],
  ]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_clean_fids_resize_makes_larger_and_clips():
  found = inception.RESIZES["clean-fid"](np.stack([PICTURE, PICTURE]))
  assert found.shape == (2, 299, 299, 3) and found.dtype == np.float32
  wanted = [[12.226418, 255, 68.48057], [63.40482, 171.71498, 48.995903], [236.02905, 29.716436, 158.92764]]
  np.testing.assert_allclose(found[1][PLACES], wanted, rtol=1e-5)  # by clean-fid 0.1.35


def test_torch_fidelitys_resize_is_tensorflow_1s():
  found = np.asarray(inception.RESIZES["torch-fidelity"](PICTURE[None]))
  assert found.shape == (1, 299, 299, 3) and found.dtype == np.float32
  wanted = [[29, 240, 66], [81.24571, 112.95694, 105.16976], [222.3913, 30.484951, 82.50171]]
  np.testing.assert_allclose(found[0][PLACES], wanted, rtol=1e-5)  # by torch-fidelity 0.4.0


@pytest.mark.parametrize("resize", inception.RESIZES.values())
def test_a_picture_of_the_networks_size_stays_as_it_is(resize):
  picture = np.random.default_rng(1).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
  np.testing.assert_array_equal(resize(picture), picture)


def test_an_unknown_resize_and_a_folder_without_weights_are_told(tmp_path):
  with pytest.raises(UserError, match="'nearest' is unknown; choose one of torch-fidelity, clean-fid"):
    inception.Extractor(tmp_path, resize="nearest")
  with pytest.raises(UserError, match="has no safetensors file"):
    inception.Extractor(tmp_path)


def test_what_fills_the_last_batch_is_not_returned():
  seen = []
  run = inception.Sharded(lambda params, x: (seen.append(x.shape), (x * params, x))[1], np.float32(2), batch_size=4)
  for n in (1, 3, 4, 9):
    items = np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)
    for found, factor in zip(run(items), (2, 1), strict=True):
      np.testing.assert_array_equal(found, factor * items)
  assert seen == [(4, 2)]  # traced once


def test_pictures_of_many_sizes_are_looked_at_by_one_program():
  made, looked = [], []
  before = lambda x: (made.append(x.shape), x[:, :2])[1]  # noqa: E731
  run = inception.Sharded(lambda w, x: (looked.append(x.shape), (w * x,))[1], np.float32(2), 4, before=before)
  for length in (3, 5, 3):
    np.testing.assert_array_equal(run(np.ones((2, length), np.float32))[0], np.full((2, 2), 2))
  assert made == [(4, 3), (4, 5)] and looked == [(4, 2)]


ON_FOUR = """
import numpy as np, jax, jax.numpy as jnp
from clipflow_jax.evaluation import images, inception
assert jax.device_count() == 4
weights = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
run = inception.Sharded(lambda w, x: (jnp.tanh(x.reshape(len(x), -1) @ w / 500),), weights, batch_size=5)
assert run.batch_size == 8
sets = [np.random.default_rng(s).integers(0, 200 + s, (n, 2, 2, 3), dtype=np.uint8) for s, n in ((1, 19), (9, 30))]
print(repr(images.frechet_distance_of(*[run(x.astype(np.float32))[0] for x in sets])))
"""


def test_fid_on_four_devices_is_that_of_one():
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  root = Path(__file__).parents[2]
  command = [sys.executable, "-c", ON_FOUR]
  done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
  lines = [line for line in ON_FOUR.splitlines() if not line.startswith("assert")]
  found: list[float] = []
  exec("\n".join(lines), {"print": lambda text: found.append(float(text))})
  assert float(done.stdout) == pytest.approx(found[0], rel=1e-6)
  assert found[0] > 0.01
