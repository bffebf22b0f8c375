"""CLIP and SigLIP, both towers, and DINOv2: the encoder's rows are shared, the rest is each family's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipflow_jax.interop.family import Config, Family, need
from clipflow_jax.interop.tensors import LED, LED_TWICE, LINEAR, PATCHES, SAME, Row
from clipflow_jax.models.clip import Clip
from clipflow_jax.models.vision import HALF, VisionTower


def encoder(ours: str, theirs: str, names: tuple[str, ...]) -> tuple[Row, ...]:
  """Rows of a stack. names: theirs of norm, query, key, value, out, norm, up, down."""
  here = "attention_norm attention/query attention/key attention/value attention/out mlp_norm up down".split()
  return tuple(
    Row(
      f"{ours}encoder/layers/{mine}/{'scale' if norm else 'kernel'}" if weight else f"{ours}encoder/layers/{mine}/bias",
      f"{theirs}{{}}.{name}.{'weight' if weight else 'bias'}",
      LINEAR if weight and not norm else SAME,
    )
    for mine, name in zip(here, names, strict=True)
    for norm in [mine.endswith("norm")]
    for weight in (True, False)
  )


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
  return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


def linear(ours: str, theirs: str) -> tuple[Row, ...]:
  return Row(f"{ours}/kernel", f"{theirs}.weight", LINEAR), Row(f"{ours}/bias", f"{theirs}.bias")


ATTENTION = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
LAYER = ("layer_norm1", *ATTENTION, "layer_norm2", "mlp.fc1", "mlp.fc2")
BOTH_TOWERS = (
  Row("vision_tower/patches/kernel", "vision_model.embeddings.patch_embedding.weight", PATCHES),
  Row("vision_tower/patches/bias", "vision_model.embeddings.patch_embedding.bias"),
  Row("vision_tower/place_positions", "vision_model.embeddings.position_embedding.weight"),
  *encoder("vision_tower/", "vision_model.encoder.layers.", LAYER),
  *norm("vision_tower/out_norm", "vision_model.post_layernorm"),
  Row("text_tower/embed/embedding", "text_model.embeddings.token_embedding.weight"),
  Row("text_tower/place_positions", "text_model.embeddings.position_embedding.weight"),
  *encoder("text_tower/", "text_model.encoder.layers.", LAYER),
  *norm("text_tower/out_norm", "text_model.final_layer_norm"),
)
CLIP_ROWS = (
  *BOTH_TOWERS,
  Row("logit_scale", "logit_scale"),
  Row("vision_tower/class_token", "vision_model.embeddings.class_embedding"),
  *norm("vision_tower/in_norm", "vision_model.pre_layrnorm"),
  Row("vision_tower/projection/kernel", "visual_projection.weight", LINEAR),
  Row("text_tower/projection/kernel", "text_projection.weight", LINEAR),
)
POOL, HEAD = "vision_tower/pool/", "vision_model.head."
SIGLIP_ROWS = (
  *BOTH_TOWERS,
  Row("logit_scale", "logit_scale", LED),
  Row("logit_bias", "logit_bias", LED),
  Row(POOL + "probe", HEAD + "probe", LED),
  *(
    row
    for part, name in enumerate(("query", "key", "value"))
    for row in (
      Row(f"{POOL}attention/{name}/kernel", HEAD + "attention.in_proj_weight", LINEAR, part, 3),
      Row(f"{POOL}attention/{name}/bias", HEAD + "attention.in_proj_bias", SAME, part, 3),
    )
  ),
  *linear(POOL + "attention/out", HEAD + "attention.out_proj"),
  *norm(POOL + "mlp_norm", HEAD + "layernorm"),
  *linear(POOL + "up", HEAD + "mlp.fc1"),
  *linear(POOL + "down", HEAD + "mlp.fc2"),
  *linear("text_tower/projection", "text_model.head"),
)
DINO = tuple(f"attention.{name}" for name in ("attention.query", "attention.key", "attention.value", "output.dense"))
DINO_ROWS = (
  Row("patches/kernel", "embeddings.patch_embeddings.projection.weight", PATCHES),
  Row("patches/bias", "embeddings.patch_embeddings.projection.bias"),
  Row("class_token", "embeddings.cls_token", LED_TWICE),
  Row("mask_token", "embeddings.mask_token", LED),
  Row("place_positions", "embeddings.position_embeddings", LED),
  *encoder("", "encoder.layer.", ("norm1", *DINO, "norm2", "mlp.fc1", "mlp.fc2")),
  *(
    row
    for part, name in enumerate(("gate", "up"))  # of the giant's SwiGLU
    for row in (
      Row(f"encoder/layers/mlp/{name}/kernel", "encoder.layer.{}.mlp.weights_in.weight", LINEAR, part, 2),
      Row(f"encoder/layers/mlp/{name}/bias", "encoder.layer.{}.mlp.weights_in.bias", SAME, part, 2),
    )
  ),
  *linear("encoder/layers/mlp/down", "encoder.layer.{}.mlp.weights_out"),
  Row("encoder/layers/attention_scale", "encoder.layer.{}.layer_scale1.lambda1"),
  Row("encoder/layers/mlp_scale", "encoder.layer.{}.layer_scale2.lambda1"),
  *norm("out_norm", "layernorm"),
)

# Our activation <-> hidden_act of config.json.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Field of a tower <-> key of its section of config.json.
TOWER = {
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "norm_eps": "layer_norm_eps",
}
PICTURE = {"image_size": "image_size", "patch_size": "patch_size"}
VISION = TOWER | PICTURE | {"mlp": "intermediate_size"}
TEXT = TOWER | {"mlp": "intermediate_size", "vocabulary": "vocab_size", "length": "max_position_embeddings"}
# What each family always is.
CLIP_VISION = dict(has_class=True, patch_bias=False, in_norm=True, pooling="class")
CLIP_TEXT = dict(pooling="end", projection_bias=False)
SIGLIP_VISION = dict(embedding=0, pooling="attention")
SIGLIP_TEXT = dict(pooling="last", projection_bias=True)
DINO_TOWER = dict(embedding=0, has_class=True, layer_scale=True, pooling="class")
UNSAID = ("post_norm", "rope_span")  # fields that no tensor tells of, and no config.json
# Pixels' mean and deviation where no preprocessor_config.json tells.
OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PLAIN = dict(mean=HALF, std=HALF)


def _fields(config: Config, keys: dict[str, str]) -> dict[str, Any]:
  need(config, "hidden_act", *ACTIVATIONS.values())
  need(config, "num_channels", None, 3)
  activation = next(ours for ours, theirs in ACTIVATIONS.items() if theirs == config["hidden_act"])
  return {field: config[key] for field, key in keys.items()} | {"activation": activation}


def _section(fields: Any, keys: dict[str, str]) -> dict[str, Any]:
  """The inverse of `_fields`, of a tower's fields: a mapping, defaults left out."""
  section = {key: fields[field] for field, key in keys.items() if field in fields}
  return section | {"hidden_act": ACTIVATIONS[fields.get("activation", "gelu_tanh")]}


def pixels(processor: Config, usual: dict[str, Any]) -> dict[str, Any]:
  """Mean and deviation of pixels by preprocessor_config.json, or the family's usual ones."""
  names = {"mean": "image_mean", "std": "image_std"}
  return {ours: tuple(processor.get(theirs) or usual[ours]) for ours, theirs in names.items()}


def fits(fields: Any, always: dict[str, Any], unsaid: tuple[str, ...] = UNSAID) -> bool:
  """Whether a tower's fields are what its family always is, in what neither tensors nor config.json say too."""
  alike = bool(fields) and all(fields.get(name) == value for name, value in always.items())
  return alike and all((fields.get(name) or 0) == always.get(name, 0) for name in unsaid)


def _clip(config: Config, processor: Config) -> Clip:
  vision, text = config["vision_config"], config["text_config"]
  size = config["projection_dim"]
  # Before its configurations were mended, 2 stood for "the highest id".
  end = None if text["eos_token_id"] == 2 else text["eos_token_id"]
  return Clip(
    vision=_fields(vision, VISION) | CLIP_VISION | pixels(processor, OPENAI) | {"embedding": size},
    text=_fields(text, TEXT) | CLIP_TEXT | {"embedding": size, "end": end},
  )


def _clip_config(module: Clip) -> dict[str, Any] | None:
  if not fits(module.vision, CLIP_VISION) or not fits(module.text, CLIP_TEXT):
    return None
  end = module.text.get("end")
  size = {"projection_dim": module.vision["embedding"]}  # of each tower too, which may be read alone
  return size | {
    "vision_config": _section(module.vision, VISION) | size,
    "text_config": _section(module.text, TEXT) | size | {"eos_token_id": 2 if end is None else end},
  }


def _siglip(config: Config, processor: Config) -> Clip:
  vision, text = config["vision_config"], config["text_config"]
  need(vision, "vision_use_head", None, True)
  return Clip(
    vision=_fields(vision, VISION) | SIGLIP_VISION | pixels(processor, PLAIN),
    text=_fields(text, TEXT) | SIGLIP_TEXT | {"embedding": text["projection_size"]},
    pairwise=True,
  )


def _siglip_config(module: Clip) -> dict[str, Any] | None:
  if not fits(module.vision, SIGLIP_VISION) or not fits(module.text, SIGLIP_TEXT):
    return None
  return {
    "vision_config": _section(module.vision, VISION),
    "text_config": _section(module.text, TEXT) | {"projection_size": module.text["embedding"]},
  }


def _dinov2(config: Config, processor: Config) -> VisionTower:
  need(config, "qkv_bias", None, True)
  gated = bool(config["use_swiglu_ffn"])
  mlp = _dino_mlp(int(config["hidden_size"] * config["mlp_ratio"]), gated)
  own = dict(mlp=mlp, gated=gated, has_mask=bool(config["use_mask_token"]))
  return VisionTower(**_fields(config, TOWER | PICTURE), **pixels(processor, IMAGENET), **DINO_TOWER, **own)


def _dinov2_config(module: VisionTower) -> dict[str, Any] | None:
  if not fits(vars(module), DINO_TOWER):
    return None
  ratios = [ratio for ratio in range(1, 17) if _dino_mlp(ratio * module.width, module.gated) == module.mlp]
  own = {"use_mask_token": module.has_mask, "use_swiglu_ffn": module.gated}
  return _section(vars(module), TOWER | PICTURE) | own | {"mlp_ratio": ratios[0]} if ratios else None


def _dino_mlp(hidden: int, gated: bool) -> int:
  """A third is taken off where a gate comes in, and eights are made whole."""
  return (hidden * 2 // 3 + 7) // 8 * 8 if gated else hidden


def _both(module: Clip) -> Any:
  """Shapes of the parameters of both towers."""

  def touch(bound: Clip, images: jax.Array, tokens: jax.Array, mask: jax.Array) -> None:
    bound.see(images, "embedding")
    bound.embed_text(tokens, mask)

  size, length = module.vision["image_size"], module.text["length"]
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
  words = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length), bool)
  return _shapes(lambda key, *x: module.init(key, *x, method=touch), images, *words)


def parameters(module: VisionTower) -> Any:
  """Shapes of the parameters of a tower alone."""
  images = jax.ShapeDtypeStruct((1, module.image_size, module.image_size, 3), jnp.uint8)
  return _shapes(module.init, images)


def _shapes(init: Callable, *inputs: Any) -> Any:
  return jax.eval_shape(init, jax.random.key(0), *inputs)["params"]


def _processor(kind: str, resample: int) -> Callable[[Any], dict[str, Any]]:
  """preprocessor_config.json of a tower that takes squares: the central one of a picture, or all of it squeezed."""

  def settings(module: Any) -> dict[str, Any]:
    tower = module.vision if isinstance(module, Clip) else vars(module)
    size = tower["image_size"]
    square = {"height": size, "width": size}
    crops = kind != "SiglipImageProcessor"
    return {
      "image_processor_type": kind,
      "do_resize": True,
      "size": {"shortest_edge": size} if crops else square,
      "resample": resample,
      "do_rescale": True,
      "rescale_factor": 1 / 255,
      "do_normalize": True,
      "image_mean": list(tower.get("mean", HALF)),
      "image_std": list(tower.get("std", HALF)),
      "do_convert_rgb": True,
      **({"do_center_crop": True, "crop_size": square} if crops else {}),
    }

  return settings


BICUBIC = 3
POSITION_IDS = r"(text|vision)_model\.embeddings\.position_ids"  # counted, not learned: old files hold them
FAMILIES = (
  Family(
    "clip",
    "CLIPModel",
    Clip,
    CLIP_ROWS,
    _clip,
    _clip_config,
    _both,
    POSITION_IDS,
    _processor("CLIPImageProcessor", BICUBIC),
  ),
  Family(
    "siglip",
    "SiglipModel",
    Clip,
    SIGLIP_ROWS,
    _siglip,
    _siglip_config,
    _both,
    POSITION_IDS,
    _processor("SiglipImageProcessor", BICUBIC),
  ),
  Family(
    "dinov2",
    "Dinov2Model",
    VisionTower,
    DINO_ROWS,
    _dinov2,
    _dinov2_config,
    parameters,
    processor=_processor("BitImageProcessor", BICUBIC),
  ),
)
