"""Adapters out to peft's format and back, and peft itself with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.interop import huggingface, language, peft, tensors
from clipflow_jax.models.transformer import Transformer
from clipflow_jax.training.adapters import Adapters
from tests import tiny

MODULE = Transformer(vocabulary=61, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, qk_norm=True)
WHERE = r"text/layers/(attention/(query|key|value|out)|mlp/(gate|up|down))"
OURS = Adapters(rank=3, alpha=12.0, where=WHERE)


def adapted() -> dict:
  """Parameters with adapters of which neither half is zero."""
  params = OURS.fit(tiny.random_params(language._parameters(MODULE)), seed=0)
  rng = np.random.default_rng(1)
  flat = tensors.flatten(params)
  learned = {path: rng.normal(size=leaf.shape).astype(np.float32) * 0.3 for path, leaf in OURS.alone(params).items()}
  return tensors.nest(flat | learned)


def test_adapters_come_back_bit_for_bit_under_pefts_names(tmp_path: Path):
  alone = OURS.alone(adapted())
  peft.save(tmp_path / "adapter", alone, alpha=OURS.alpha)
  back, alpha = peft.load(tmp_path / "adapter")
  assert alpha == OURS.alpha and back.keys() == alone.keys() and len(back) == 2 * 7
  for path, leaf in alone.items():
    np.testing.assert_array_equal(back[path], leaf, err_msg=path)
  names = tensors.Files(tmp_path / "adapter").where
  assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in names and len(names) == 2 * 7 * 2
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert config["r"] == 3 and set(config["target_modules"]) >= {"q_proj", "o_proj", "down_proj"}


def test_what_is_no_plain_adapter_is_refused_by_name(tmp_path: Path):
  with pytest.raises(UserError, match="flow/layers"):
    peft.save(tmp_path / "flow", {"flow/layers/mlp/up/kernel_lora_a": np.zeros((1, 4, 2))}, alpha=1.0)
  with pytest.raises(UserError, match="no readable adapter_config.json"):
    peft.load(tmp_path)
  peft.save(tmp_path / "adapter", OURS.alone(adapted()), alpha=1.0)
  file = tmp_path / "adapter" / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
  with pytest.raises(UserError, match="use_dora True"):
    peft.load(tmp_path / "adapter")
  with pytest.raises(UserError, match="is there already"):
    peft.save(tmp_path / "adapter", OURS.alone(adapted()), alpha=1.0)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("init_lora_weights", "pissa"),  # what is learned is beside a base without its first components
    ("init_lora_weights", "olora"),
    ("alora_invocation_tokens", [3, 4]),  # only from these words on
    ("layer_replication", [[0, 2], [1, 2]]),
  ],
)
def test_adapters_that_are_not_beside_the_plain_base_are_refused(key, value, tmp_path):
  peft.save(tmp_path / "adapter", OURS.alone(adapted()), alpha=1.0)
  file = tmp_path / "adapter" / "adapter_config.json"
  plain = json.loads(file.read_text())
  file.write_text(json.dumps(plain | {key: value}))
  with pytest.raises(UserError, match=f"says {key}"):
    peft.load(tmp_path / "adapter")
  file.write_text(json.dumps(plain | {"init_lora_weights": "gaussian", key: None}))
  peft.load(tmp_path / "adapter")


def test_peft_computes_with_them_what_ours_merged_do(tmp_path: Path):
  """peft on transformers' Qwen3 of the exported base, logits within 1e-4."""
  torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install clipflow_jax[parity]")
  theirs = pytest.importorskip("peft", reason="compares with peft: pip install clipflow_jax[parity]")
  transformers = pytest.importorskip("transformers")
  params = adapted()
  plain = {path: leaf for path, leaf in tensors.flatten(params).items() if "_lora_" not in path}
  assert huggingface.save(tmp_path / "base", MODULE, tensors.nest(plain), family="qwen3") == "qwen3"
  peft.save(tmp_path / "adapter", OURS.alone(params), alpha=OURS.alpha)
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
  model = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
  tokens = np.random.default_rng(0).integers(0, 61, (2, 12), dtype=np.int32)
  with torch.no_grad():
    expected = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

  def logits(bound: Transformer, tokens):
    order = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    hidden, _ = bound.read(bound.embed(tokens), np.ones_like(tokens), order, np.repeat(order[..., None], 3, axis=-1))
    return bound.logits(hidden)

  found = MODULE.apply({"params": OURS.merged(params)}, tokens, method=logits)
  np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4)
  without = MODULE.apply({"params": tensors.nest(plain)}, tokens, method=logits)
  assert np.abs(np.asarray(without) - expected).max() > 0.1
