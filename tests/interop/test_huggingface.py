"""Folders of weights that are right, and what is said of those that are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clipflow_jax.errors import UserError
from clipflow_jax.interop import eva, huggingface, language, tensors
from clipflow_jax.interop.tensors import LINEAR, PATCHES, SAME, Row
from clipflow_jax.models.clip import Clip
from clipflow_jax.models.transformer import Transformer
from clipflow_jax.models.vision import VisionTower
from clipflow_jax.training.state import flatten
from tests import tiny

FIELDS = dict(vocabulary=20, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
MODULE = Transformer(**FIELDS, qk_norm=False, qkv_bias=True, tie_embeddings=False)


@pytest.fixture(scope="module")
def params() -> Any:
  return tiny.random_params(huggingface.FAMILIES["qwen2"].parameters(MODULE))


@pytest.fixture
def folder(params, tmp_path) -> Path:
  assert huggingface.save(tmp_path / "model", MODULE, params) == "qwen2"
  return tmp_path / "model"


def change(folder: Path, change: Any) -> None:
  file = folder / "model.safetensors"
  held = dict(load_file(file))
  change(held)
  save_file(held, file)


def same(a: Any, b: Any) -> bool:
  a, b = flatten(a), flatten(b)
  return a.keys() == b.keys() and all(np.array_equal(leaf, b[path]) for path, leaf in a.items())


def test_what_is_saved_is_loaded(folder, params):
  module, loaded = huggingface.load(folder)
  assert module == MODULE
  assert same(loaded, params)


def test_a_dtype_asked_for_is_that_of_weights_and_module_and_is_written_so(folder, params, tmp_path):
  module, loaded = huggingface.load(folder, dtype=jnp.bfloat16)
  assert module.dtype == jnp.bfloat16
  assert same(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
  huggingface.save(tmp_path / "half", module, loaded)
  assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
  assert same(huggingface.load(tmp_path / "half")[1], loaded)


def test_shards_have_an_index_and_are_read_by_it(params, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface, "SHARD", "4KB")
  huggingface.save(tmp_path / "out", MODULE, params)
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert len(set(index["weight_map"].values())) > 2
  assert same(huggingface.load(tmp_path / "out")[1], params)
  next((tmp_path / "out").glob("*-00002-*")).unlink()
  with pytest.raises(UserError, match=r"lacks model-00002-of-\d+.safetensors, which .*index.json names"):
    huggingface.load(tmp_path / "out")


def test_a_single_file_is_read_whatever_index_of_earlier_shards_is_left_beside_it(folder, params):
  index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  assert same(huggingface.load(folder)[1], params)


def test_tensors_that_do_not_fit_are_all_named(folder):
  def spoil(held):
    held["model.surprise.weight"] = np.zeros(3, np.float32)
    del held["model.layers.1.mlp.up_proj.weight"], held["lm_head.weight"]
    held["model.norm.weight"] = np.zeros(5, np.float32)
    held["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.int32)

  change(folder, spoil)
  with pytest.raises(UserError) as error:
    huggingface.load(folder)
  text = str(error.value)
  assert "missing: lm_head.weight, model.layers.1.mlp.up_proj.weight;" in text
  assert "misshapen: model.layers.0.self_attn.q_proj.bias is I32, not one of" in text
  assert "model.norm.weight is [5], not [16]" in text
  assert "not expected: model.surprise.weight" in text


def test_a_head_of_its_own_is_kept_whatever_the_config_says(folder, params, monkeypatch):
  monkeypatch.setattr(language, "BLOCK", 8)
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
  module, loaded = huggingface.load(folder)
  assert module == MODULE and same(loaded, params)
  change(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"]}))
  module, loaded = huggingface.load(folder)
  assert module.tie_embeddings and "head" not in loaded
  change(folder, lambda held: held.update({"lm_head.weight": np.zeros((3, 16), np.float32)}))
  with pytest.raises(UserError, match=r"lm_head.weight is \[3, 16\], not \[20, 16\]"):
    huggingface.load(folder)


def test_pickled_files_are_refused_with_the_remedy(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(UserError, match=r"only pytorch_model.bin: pickled files .* never opened .* save_pretrained"):
    huggingface.load(folder)


def test_a_file_cut_short_is_named(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file .* download it again"):
    huggingface.load(folder)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("model_type", "mamba", "is of the family 'mamba'; there are .*llama"),
    ("hidden_act", "gelu", "says hidden_act 'gelu'; this package computes only 'silu'"),
    ("use_sliding_window", True, "says use_sliding_window True"),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "says rope_type 'dynamic'"),
    ("num_key_value_heads", 3, "says 2 heads of queries for 3 of keys, which do not divide them"),
    ("quantization_config", {"quant_method": "gptq"}, "quantised"),
  ],
)
def test_what_cannot_be_computed_is_refused(folder, key, value, message):
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
  with pytest.raises(UserError, match=message):
    huggingface.load(folder)


@pytest.mark.parametrize(
  ("name", "written", "message"),
  [
    ("config.json", "[]", r"no readable config.json \(it holds no object\)"),
    ("preprocessor_config.json", "{", "no readable preprocessor_config.json"),
    ("model.safetensors.index.json", "{", "model.safetensors.index.json is no index of tensors"),
    ("model.safetensors.index.json", "{}", "model.safetensors.index.json is no index of tensors"),
    ("model.safetensors.index.json", "[]", "model.safetensors.index.json is no index of tensors"),
  ],
)
def test_a_file_that_is_not_what_its_name_says_is_told(folder, name, written, message):
  (folder / name).write_text(written)
  if name.startswith("model."):
    (folder / "model.safetensors").unlink()
  with pytest.raises(UserError, match=message):
    huggingface.load(folder)


def test_neither_a_folder_nor_a_repository_is_one_clear_error(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(UserError, match="neither a folder nor the name of a hub repository"):
    huggingface.load("a/b/c")
  with pytest.raises(UserError, match="no readable config.json"):
    huggingface.load(tmp_path)


def test_nothing_is_written_where_something_is(folder, params):
  before = (folder / "model.safetensors").read_bytes()
  with pytest.raises(UserError, match="is there already"):
    huggingface.save(folder, MODULE, params)
  assert (folder / "model.safetensors").read_bytes() == before


def test_a_save_that_fails_leaves_nothing(params, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface, "_write_tensors", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    huggingface.save(tmp_path / "out", MODULE, params)
  assert list(tmp_path.iterdir()) == []


def test_a_family_that_cannot_say_it_is_refused(params, tmp_path):
  with pytest.raises(UserError, match="a qwen3 checkpoint cannot say what this Transformer is"):
    huggingface.save(tmp_path / "out", MODULE, params, family="qwen3")
  with pytest.raises(UserError, match="the family 'gpt' is unknown; there are"):
    huggingface.save(tmp_path / "out", MODULE, params, family="gpt")
  with pytest.raises(UserError, match="cannot hold this model: no row for the parameters flow_norm/scale"):
    huggingface.save(tmp_path / "out", MODULE, {**params, "flow_norm": {"scale": np.ones(3)}})


def test_keys_that_no_tensor_tells_are_kept(params, tmp_path):
  huggingface.save(tmp_path / "out", MODULE, params, config={"max_position_embeddings": 777, "vocab_size": 3})
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (config["max_position_embeddings"], config["vocab_size"]) == (777, 20)


@pytest.mark.parametrize("layout", [SAME, LINEAR])
@pytest.mark.parametrize("part", [0, 2])
def test_a_slice_of_a_part_is_that_of_the_whole(layout, part, tmp_path):
  joined = np.arange(3 * 4 * 6, dtype=np.float32).reshape(12, 6)
  save_file({"qkv": joined}, tmp_path / "model.safetensors")
  row = Row("x", "qkv", layout, part, 3)
  ours = layout.ours(joined[4 * part : 4 * part + 4])
  assert row.shape(ours.shape) == joined.shape
  index = (slice(1, 3), slice(2, 4))
  np.testing.assert_array_equal(tensors._piece(tensors.Files(tmp_path)["qkv"], row, index), ours[index])


def test_patches_lie_as_the_tower_cuts_them():
  weight = np.random.default_rng(0).normal(size=(5, 3, 2, 2))
  kernel = PATCHES.ours(weight)
  picture = np.random.default_rng(1).normal(size=(2, 2, 3))
  np.testing.assert_allclose(picture.ravel() @ kernel, np.einsum("ocij,ijc->o", weight, picture))
  np.testing.assert_array_equal(PATCHES.theirs(kernel), weight)


SHARDED = """
import sys, functools, jax, numpy as np
from clipflow_jax.interop import huggingface
from clipflow_jax.parallel import mesh, sharding
made = mesh.make({"fsdp": 2, "tensor": 2})
_, params = huggingface.load(sys.argv[1], shardings=functools.partial(sharding.of_parameters, mesh=made))
_, whole = huggingface.load(sys.argv[1])
split = params["text"]["layers"]["mlp"]["gate"]["kernel"]
assert split.addressable_shards[0].data.shape == (2, 8, 12), split.sharding
assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True))
print("same")
"""


def test_each_device_reads_its_own_part(folder):
  env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4")
  done = subprocess.run([sys.executable, "-c", SHARDED, folder], capture_output=True, text=True, env=env)
  assert done.stdout == "same\n", done.stderr


# Towers.

SEES = dict(image_size=8, patch_size=4, width=32, layers=1, heads=2, mlp=128)
DINO = dict(SEES, embedding=0, has_class=True, has_mask=True, layer_scale=True, pooling="class", activation="gelu")
BOTH = dict(
  vision=dict(SEES, embedding=20, has_class=True, patch_bias=False, in_norm=True, pooling="class"),
  text=dict(vocabulary=20, length=8, width=16, layers=1, heads=2, mlp=32, embedding=20, pooling="end"),
)
CLIP = dict(BOTH, text=dict(BOTH["text"], projection_bias=False))


def saved(path: Path, module: Any, family: str) -> Path:
  huggingface.save(path, module, tiny.random_params(huggingface.family(family).parameters(module)), family=family)
  return path


@pytest.mark.parametrize("beyond", [dict(rope_span=2), dict(post_norm=True)])
def test_a_tower_that_is_told_apart_by_no_tensor_is_not_saved_as_another(beyond, tmp_path):
  assert saved(tmp_path / "plain", VisionTower(**DINO), "dinov2")
  with pytest.raises(UserError, match="a dinov2 checkpoint cannot say what this VisionTower is"):
    saved(tmp_path / "other", VisionTower(**DINO | beyond), "dinov2")
  clip = Clip(**CLIP | dict(vision=CLIP["vision"] | beyond))
  with pytest.raises(UserError, match="a clip checkpoint cannot say what this Clip is"):
    saved(tmp_path / "other", clip, "clip")


def test_another_epsilon_is_nothing_that_timms_towers_can_say(tmp_path):
  fields = SEES | eva.LARGE | dict(width=64, embedding=8)
  assert saved(tmp_path / "usual", VisionTower(**fields), "eva02_large")
  with pytest.raises(UserError, match="a eva02_large checkpoint cannot say what this VisionTower is"):
    saved(tmp_path / "other", VisionTower(**fields, norm_eps=1e-5), "eva02_large")


def test_a_clip_says_the_size_of_its_embeddings_in_both_towers_and_needs_no_end(tmp_path):
  config = json.loads((saved(tmp_path / "model", Clip(**CLIP), "clip") / "config.json").read_text())
  sizes = (config, config["vision_config"], config["text_config"])
  assert [one["projection_dim"] for one in sizes] == [20] * 3
  assert huggingface.load(tmp_path / "model")[0].text["end"] is None


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_vision_tower_alone_is_no_model_of_two_towers(family, tmp_path):
  vision = CLIP["vision"] if family == "clip" else dict(SEES, embedding=0, pooling="attention")
  with pytest.raises(UserError, match=f"a {family} checkpoint cannot say what this Clip is"):
    huggingface.save(tmp_path / "model", Clip(vision=vision), {}, family=family)


def test_pixels_are_as_a_processor_of_words_and_pictures_says(tmp_path):
  file = saved(tmp_path / "model", Clip(**CLIP), "clip") / "preprocessor_config.json"
  said = json.loads(file.read_text()) | dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
  file.unlink()
  (tmp_path / "model" / "processor_config.json").write_text(json.dumps({"image_processor": said}))
  vision = huggingface.load(tmp_path / "model")[0].vision
  assert (vision["mean"], vision["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
