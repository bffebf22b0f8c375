"""EVA-CLIP's towers against PyTorch: small random ones, written from their papers under timm's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from clipflow_jax.interop import huggingface
from clipflow_jax.interop.eva import OPENAI

torch = pytest.importorskip("torch", reason="the parity tests compare with PyTorch: pip install clipflow_jax[parity]")
functional = torch.nn.functional
torch.set_num_threads(1)

HEADS, WIDTH, MLP, LAYERS, PATCH, SIZE, EMBEDDING = 16, 128, 72, 2, 7, 28, 24
SIDE = SIZE // PATCH
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def tensors(large: bool) -> dict[str, Any]:
  """Random weights in float32, none of them special. large: EVA-02-CLIP-L's, else E's."""
  shapes = {
    "patch_embed.proj": (WIDTH, 3, PATCH, PATCH),
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, SIDE**2 + 1, WIDTH),
    "head": (EMBEDDING, WIDTH),
    "norm": (WIDTH,),
  }
  for layer in range(LAYERS):
    block = {"norm1": (WIDTH,), "norm2": (WIDTH,), "attn.proj": (WIDTH, WIDTH), "mlp.fc2": (WIDTH, MLP)}
    if large:
      block |= {f"attn.{name}_proj": (WIDTH, WIDTH) for name in "qkv"} | {"attn.norm": (WIDTH,), "mlp.norm": (MLP,)}
      block |= {"mlp.fc1_g": (MLP, WIDTH), "mlp.fc1_x": (MLP, WIDTH)}
    else:
      block |= {"attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,)}
      block |= {"mlp.fc1": (MLP, WIDTH)}
    shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
  made = {}
  for name, shape in shapes.items():
    if name.endswith(("weight", "bias", "_token", "_embed")):
      made[name] = shape
    else:
      made |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
      if name.endswith("k_proj"):
        del made[f"{name}.bias"]
  torch.manual_seed(0)
  return {
    name: 1 + torch.randn(shape) * 0.2 if "norm" in name else torch.randn(shape) * shape[-1] ** -0.5
    for name, shape in made.items()
  }


def turned(x: Any) -> Any:
  """x f[B,h,1+T,k]: patches' neighbouring channels turned as a complex number, by row and by column on a grid of 16."""
  k = x.shape[-1]
  speeds = 10_000.0 ** (-torch.arange(k // 4) / (k // 4))
  at = torch.arange(SIDE) * 16 / SIDE
  row, column = at.repeat_interleave(SIDE), at.repeat(SIDE)
  angles = torch.cat([row[:, None] * speeds, column[:, None] * speeds], dim=1)
  patches = torch.view_as_complex(x[:, :, 1:].unflatten(-1, (-1, 2)).contiguous())
  return torch.cat([x[:, :, :1], torch.view_as_real(patches * torch.polar(torch.ones(()), angles)).flatten(-2)], dim=2)


def see(held: dict[str, Any], large: bool) -> tuple[Any, Any]:
  """(the last layer's patches f[B,T,D], embeddings f[B,E])."""

  def linear(name, x):
    return functional.linear(x, held[f"{name}.weight"], held.get(f"{name}.bias"))

  def norm(name, x):
    return functional.layer_norm(x, x.shape[-1:], held[f"{name}.weight"], held[f"{name}.bias"], 1e-6)

  def attention(block, x):
    if large:
      q, k, v = (linear(f"{block}.attn.{name}_proj", x) for name in "qkv")
    else:
      bias = torch.cat([held[f"{block}.attn.q_bias"], torch.zeros(WIDTH), held[f"{block}.attn.v_bias"]])
      q, k, v = functional.linear(x, held[f"{block}.attn.qkv.weight"], bias).chunk(3, dim=-1)
    q, k, v = (a.unflatten(-1, (HEADS, -1)).transpose(1, 2) for a in (q, k, v))
    if large:
      q, k = turned(q), turned(k)
    out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return linear(f"{block}.attn.proj", norm(f"{block}.attn.norm", out) if large else out)

  def network(block, x):
    if large:
      x = functional.silu(linear(f"{block}.mlp.fc1_g", x)) * linear(f"{block}.mlp.fc1_x", x)
      return linear(f"{block}.mlp.fc2", norm(f"{block}.mlp.norm", x))
    return linear(f"{block}.mlp.fc2", functional.gelu(linear(f"{block}.mlp.fc1", x)))

  pixels = (IMAGES / 255 - np.array(OPENAI["mean"])) / np.array(OPENAI["std"])
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  x = functional.conv2d(pixels, held["patch_embed.proj.weight"], held["patch_embed.proj.bias"], stride=PATCH)
  x = torch.cat([held["cls_token"].expand(2, -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + held["pos_embed"]
  for layer in range(LAYERS):
    for which, of in (("norm1", attention), ("norm2", network)):
      block, name = f"blocks.{layer}", f"blocks.{layer}.{which}"
      x = x + (of(block, norm(name, x)) if large else norm(name, of(block, x)))
  return x[:, 1:], linear("head", norm("norm", x)[:, 0])


@pytest.fixture(scope="module", params=["large", "enormous"])
def size(request) -> str:
  return request.param


@pytest.fixture(scope="module")
def folder(size, tmp_path_factory) -> Path:
  from safetensors.torch import save_file

  path = tmp_path_factory.mktemp(size)
  save_file(tensors(size == "large"), path / "model.safetensors")
  (path / "config.json").write_text(json.dumps({"architecture": f"eva02_{size}_patch14_clip_224"}))
  return path


def test_tokens_and_embeddings_are_pytorchs(size, folder):
  module, params = huggingface.load(folder)
  seen = jax.jit(lambda p: module.apply({"params": p}, IMAGES))(params)
  tokens, embedding = see(tensors(size == "large"), size == "large")
  np.testing.assert_allclose(seen.tokens, tokens, atol=2e-5, rtol=0)
  np.testing.assert_allclose(seen.embedding, embedding / embedding.norm(dim=-1, keepdim=True), atol=2e-5, rtol=0)
  assert np.abs(seen.embedding[0] - seen.embedding[1]).max() > 1e-2


def test_exported_again_its_tensors_are_bitwise_the_same(size, folder, tmp_path):
  from safetensors.torch import load_file

  module, params = huggingface.load(folder)
  huggingface.save(tmp_path / "out", module, params)
  wanted, found = tensors(size == "large"), load_file(tmp_path / "out" / "model.safetensors")
  assert wanted.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in wanted.items())
  assert huggingface.load(tmp_path / "out")[0] == module


def test_timms_own_towers_see_the_same(size, tmp_path):
  try:
    import timm
  except Exception as error:  # without a torchvision that fits PyTorch its import fails in many ways
    pytest.skip(f"needs timm and the torchvision of the installed PyTorch: {error}")
  from safetensors.torch import save_file

  name = f"eva02_{size}_patch14_clip_224"
  shape = dict(depth=LAYERS, embed_dim=WIDTH, num_heads=HEADS, img_size=SIZE, patch_size=PATCH, mlp_ratio=MLP / WIDTH)
  model = timm.create_model(name, pretrained=False, num_classes=EMBEDDING, **shape).eval()
  held = tensors(size == "large")
  model.load_state_dict(held)  # all of them, and no other
  save_file(held, tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
  module, params = huggingface.load(tmp_path)
  seen = jax.jit(lambda p: module.apply({"params": p}, IMAGES))(params)
  last = {}
  model.blocks[-1].register_forward_hook(lambda block, given, made: last.update(tokens=made))
  pixels = torch.tensor((IMAGES / 255 - np.array(OPENAI["mean"])) / np.array(OPENAI["std"]), dtype=torch.float32)
  with torch.no_grad():
    embedding = model(pixels.permute(0, 3, 1, 2))
  np.testing.assert_allclose(seen.tokens, last["tokens"][:, 1:], atol=2e-5, rtol=0)
  np.testing.assert_allclose(seen.embedding, embedding / embedding.norm(dim=-1, keepdim=True), atol=2e-5, rtol=0)
