"""EVA-CLIP's towers (Sun et al. 2023; Fang et al. 2023, EVA-02) under timm's names: E/14 and E/14-plus, and L/14."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from clipflow_jax.errors import UserError
from clipflow_jax.interop.family import Config, Family, described
from clipflow_jax.interop.tensors import LED, LED_TWICE, LINEAR, PATCHES, Files, Row
from clipflow_jax.interop.vision import OPENAI, UNSAID, fits, linear, norm, parameters
from clipflow_jax.models.vision import VisionTower

BLOCK, LAYER = "blocks.{}.", "encoder/layers/"
BOTH = (
  Row("patches/kernel", "patch_embed.proj.weight", PATCHES),
  Row("patches/bias", "patch_embed.proj.bias"),
  Row("class_token", "cls_token", LED_TWICE),
  Row("place_positions", "pos_embed", LED),
  *norm(LAYER + "attention_norm", BLOCK + "norm1"),
  *linear(LAYER + "attention/out", BLOCK + "attn.proj"),
  *norm(LAYER + "mlp_norm", BLOCK + "norm2"),
  *norm("out_norm", "norm"),
  *linear("projection", "head"),
)
ENORMOUS_ROWS = (
  *BOTH,
  *(
    Row(f"{LAYER}attention/{name}/kernel", BLOCK + "attn.qkv.weight", LINEAR, part, 3)
    for part, name in enumerate(("query", "key", "value"))
  ),
  Row(LAYER + "attention/query/bias", BLOCK + "attn.q_bias"),
  Row(LAYER + "attention/value/bias", BLOCK + "attn.v_bias"),
  *linear(LAYER + "up", BLOCK + "mlp.fc1"),
  *linear(LAYER + "down", BLOCK + "mlp.fc2"),
)
LARGE_ROWS = (
  *BOTH,
  *linear(LAYER + "attention/query", BLOCK + "attn.q_proj"),
  Row(LAYER + "attention/key/kernel", BLOCK + "attn.k_proj.weight", LINEAR),
  *linear(LAYER + "attention/value", BLOCK + "attn.v_proj"),
  *norm(LAYER + "attention/inner_norm", BLOCK + "attn.norm"),
  *linear(LAYER + "mlp/gate", BLOCK + "mlp.fc1_g"),
  *linear(LAYER + "mlp/up", BLOCK + "mlp.fc1_x"),
  *norm(LAYER + "mlp/inner_norm", BLOCK + "mlp.norm"),
  *linear(LAYER + "mlp/down", BLOCK + "mlp.fc2"),
)

# What each always is. The positions of L were trained on a grid of 16.
EVA = dict(heads=16, has_class=True, pooling="class", projection_bias=True, key_bias=False, activation="gelu")
ENORMOUS = EVA | dict(post_norm=True)
LARGE = EVA | dict(gated=True, sub_norm=True, rope_span=16)
EVA_E_PLUS = ENORMOUS | dict(patch_size=14, layers=64, mlp=15_360, embedding=1024)


def _unsaid(files: Files) -> dict[str, Any]:
  """The tower's shape, of which config.json tells only a name."""

  def shape(name: str) -> list[int]:
    if name not in files.where:
      raise UserError(f"the checkpoint has no {name}: it is not an EVA tower under timm's names")
    return files[name].get_shape()

  width, _, patch, _ = shape("patch_embed.proj.weight")
  return {
    "shape": {
      "image_size": patch * math.isqrt(shape("pos_embed")[1] - 1),
      "patch_size": patch,
      "width": width,
      "layers": sum(name.endswith(".norm1.weight") for name in files.where),
      "mlp": shape(BLOCK.format(0) + "mlp.fc2.weight")[1],
      "embedding": shape("head.weight")[0],
    }
  }


def _module(always: dict[str, Any]) -> Callable[[Config, Config], VisionTower]:
  def module(config: Config, _: Config) -> VisionTower:
    given = config.get("pretrained_cfg") or {}
    pixels = {name: tuple(given.get(name) or OPENAI[name]) for name in ("mean", "std")}
    return VisionTower(**config["shape"], **pixels, **always)

  return module


def _config(always: dict[str, Any], size: str) -> Callable[[VisionTower], dict[str, Any] | None]:
  def config(module: VisionTower) -> dict[str, Any] | None:
    if not fits(described(module), always, (*UNSAID, "norm_eps")):
      return None
    shape = [3, module.image_size, module.image_size]
    return {
      "architecture": f"eva02_{size}_patch{module.patch_size}_clip_{module.image_size}",
      "num_classes": module.embedding,
      "num_features": module.width,
      "global_pool": "token",
      "pretrained_cfg": {"input_size": shape, "mean": list(module.mean), "std": list(module.std)},
    }

  return config


FAMILIES = tuple(
  Family(
    f"eva02_{size}",
    "",
    VisionTower,
    rows,
    _module(always),
    _config(always, size),
    parameters,
    base=None,
    unsaid=_unsaid,
  )
  for size, rows, always in (("enormous", ENORMOUS_ROWS, ENORMOUS), ("large", LARGE_ROWS, LARGE))
)
