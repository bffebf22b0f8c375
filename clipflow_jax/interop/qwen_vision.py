"""Qwen2.5-VL's vision tower, beside its language model in the same checkpoint (asked for by this family's name)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.interop.family import Config, Family, need
from clipflow_jax.interop.tensors import LINEAR, SAME, Layout, Row
from clipflow_jax.interop.vision import OPENAI, linear, pixels
from clipflow_jax.models.qwen_vision import FRAMES, QwenVision


def _to_film(kernel: np.ndarray) -> np.ndarray:
  patch = round((kernel.shape[0] / 3 / FRAMES) ** 0.5)
  return kernel.reshape(FRAMES, patch, patch, 3, -1).transpose(4, 3, 0, 1, 2)


FILM = Layout(lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]), _to_film)  # [(2 p p 3),out]; [out,3,2,p,p]
BLOCK = "visual.blocks.{}."
ROWS = (
  Row("patches/kernel", "visual.patch_embed.proj.weight", FILM),
  Row("layers/attention_norm/scale", BLOCK + "norm1.weight"),
  *(
    row
    for part, name in enumerate(("query", "key", "value"))
    for row in (
      Row(f"layers/attention/{name}/kernel", BLOCK + "attn.qkv.weight", LINEAR, part, 3),
      Row(f"layers/attention/{name}/bias", BLOCK + "attn.qkv.bias", SAME, part, 3),
    )
  ),
  *linear("layers/attention/out", BLOCK + "attn.proj"),
  Row("layers/mlp_norm/scale", BLOCK + "norm2.weight"),
  *linear("layers/mlp/gate", BLOCK + "mlp.gate_proj"),
  *linear("layers/mlp/up", BLOCK + "mlp.up_proj"),
  *linear("layers/mlp/down", BLOCK + "mlp.down_proj"),
  Row("out_norm/scale", "visual.merger.ln_q.weight"),
  *linear("merger/up", "visual.merger.mlp.0"),
  *linear("merger/down", "visual.merger.mlp.2"),
)
KEYS = {
  "width": "hidden_size",
  "layers": "depth",
  "heads": "num_heads",
  "mlp": "intermediate_size",
  "out_width": "out_hidden_size",
  "patch_size": "patch_size",
  "merge": "spatial_merge_size",
  "window": "window_size",
}


def _module(config: Config, processor: Config) -> QwenVision:
  vision = config["vision_config"]
  need(vision, "hidden_act", "silu")
  need(vision, "temporal_patch_size", FRAMES)
  fields = {field: vision[key] for field, key in KEYS.items()}
  return QwenVision(**fields, whole=tuple(vision["fullatt_block_indexes"]), **pixels(processor, OPENAI))


def _config(module: QwenVision) -> dict[str, Any]:
  section = {key: getattr(module, field) for field, key in KEYS.items()}
  return {"vision_config": section | {"fullatt_block_indexes": list(module.whole)}}


def _parameters(module: QwenVision) -> Any:
  side = module.patch_size * module.merge
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
  return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


FAMILIES = (
  Family(
    "qwen2_5_vl_vision",
    "Qwen2_5_VLForConditionalGeneration",
    QwenVision,
    ROWS,
    _module,
    _config,
    _parameters,
    r"model\..*|lm_head\..*",
    base="qwen2_5_vl",
  ),
)
