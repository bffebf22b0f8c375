"""Qwen2.5-VL's vision tower against PyTorch, within windows and over the whole of pictures that no window divides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.interop import huggingface

torch = pytest.importorskip("torch", reason="the parity tests compare with PyTorch: pip install clipflow_jax[parity]")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

PATCH, MERGE, ROWS, COLUMNS = 4, 2, 6, 10
VISION = dict(
  depth=3,
  hidden_size=32,
  intermediate_size=48,
  num_heads=2,
  out_hidden_size=40,
  patch_size=PATCH,
  window_size=16,  # two by two merged tokens: the picture ends within a window
  fullatt_block_indexes=[1],
)
TEXT = dict(
  vocab_size=97,
  hidden_size=40,
  intermediate_size=48,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=1,
  rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 3, 3]),
)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, ROWS * PATCH, COLUMNS * PATCH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def theirs() -> Any:
  torch.manual_seed(0)
  config = transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION)
  model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
  with torch.no_grad():
    for value in model.parameters():
      value.add_(torch.randn_like(value) * 0.1)
  return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("saved") / "model"
  theirs.save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def imported(folder) -> tuple[Any, Any]:
  return huggingface.load(folder, family="qwen2_5_vl_vision")


def test_tokens_are_pytorchs(theirs, imported):
  module, params = imported
  found = jax.jit(lambda p: module.apply({"params": p}, IMAGES))(params)
  values = ((IMAGES / 255 - np.array(module.mean)) / np.array(module.std)).astype(np.float32)
  # Patches in the order of their processor: merged ones together, each channel by channel, two equal frames.
  cells = values.reshape(2, ROWS // MERGE, MERGE, PATCH, COLUMNS // MERGE, MERGE, PATCH, 3)
  cells = cells.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3, 1, PATCH, PATCH)
  patches = torch.tensor(np.repeat(cells, 2, axis=2).reshape(len(cells), -1))
  with torch.no_grad():
    out = theirs.model.visual(patches, grid_thw=torch.tensor([[1, ROWS, COLUMNS]] * 2))
  wanted = out.pooler_output.reshape(found.shape)
  np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)
  assert wanted.std() > 0.1


def test_exported_again_its_tensors_are_bitwise_the_same(imported, folder, tmp_path):
  from safetensors.torch import load_file

  huggingface.save(tmp_path / "out", *imported)
  found, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
  assert found.keys() == {name for name in wanted if name.startswith("visual.")}
  assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_another_size_is_refused_with_the_remedy(imported):
  module, params = imported
  with pytest.raises(UserError, match="24 x 41 pixels: this tower takes multiples of 8; resize them"):
    module.apply({"params": params}, np.zeros((1, 24, 41, 3), np.uint8))
