"""Model sizes beyond `presets.tiny`: a language model that exists, with tower, flow expert and decoder."""

from __future__ import annotations

from typing import Any

from clipflow_jax.errors import UserError


def _model(
  *,
  text: dict[str, Any],
  flow: tuple[int, int],
  tower: dict[str, Any],
  caption: dict[str, Any],
  decoder: dict[str, Any],
) -> dict[str, Any]:
  """Fields of ClipFlow. flow: width and mlp of the flow expert; caption: the text tower's."""
  picture = dict(image_size=tower["image_size"], patch_size=tower["patch_size"])
  return dict(
    clip=dict(
      vision=dict(tower, remat="full"),
      text=dict(vocabulary=text["vocabulary"], length=64, remat="full", **caption),
    ),
    # A quarter of the way up the flow says what it sees so far: the weak branch of its guidance.
    transformer=dict(text, flow_width=flow[0], flow_mlp=flow[1], early_layer=text["layers"] // 4, remat="full"),
    pixel_decoder=dict(picture, flow=False, remat="full", **decoder),
    prediction="x",
    kernel="xla",
    dtype="bfloat16",
  )


def small() -> dict[str, Any]:
  """100 M: for one GPU, and to find faults before a pod does. 64 tokens a picture of 128 pixels; its own tokenizer."""
  return _model(
    text=dict(vocabulary=0, width=512, layers=12, heads=8, kv_heads=4, head_dim=64, mlp=1536, rope_sections=(16, 8, 8)),
    flow=(512, 1536),
    tower=dict(image_size=128, patch_size=16, width=384, layers=12, heads=6, mlp=1536, embedding=384),
    caption=dict(width=384, layers=6, heads=6, mlp=1536, embedding=384),
    decoder=dict(width=384, layers=12, heads=6, mlp=1024),
  )


# ViT-L/16 at 256 pixels and So400m/14 at 224, as SigLIP 2 has them (Tschannen et al. 2025): 256 tokens a picture each.
LARGE = dict(
  tower=dict(image_size=256, patch_size=16, width=1024, layers=24, heads=16, mlp=4096, embedding=1024),
  caption=dict(width=1024, layers=12, heads=16, mlp=4096, embedding=1024),
  decoder=dict(width=768, layers=12, heads=12, mlp=2048),
)
SO400M = dict(
  tower=dict(image_size=224, patch_size=14, width=1152, layers=27, heads=16, mlp=4304, embedding=1152),
  caption=dict(width=1152, layers=12, heads=16, mlp=4304, embedding=1152),
  decoder=dict(width=1024, layers=24, heads=16, mlp=2816),
)
# What the language models of Qwen share: 64 rotary frequencies for (time, row, column) as in Qwen2.5-VL.
QWEN = dict(vocabulary=151_936, head_dim=128, rope_theta=1e6, rope_sections=(16, 24, 24))


def qwen_0_6b() -> dict[str, Any]:
  """1b: the language model is Qwen3-0.6B's shape."""
  text = dict(QWEN, width=1024, layers=28, heads=16, kv_heads=8, mlp=3072, qk_norm=True)
  return _model(text=text, flow=(1024, 2048), **LARGE)


def qwen_3b() -> dict[str, Any]:
  """4b: the language model is Qwen2.5-VL-3B's shape."""
  text = dict(QWEN, width=2048, layers=36, heads=16, kv_heads=2, mlp=11_008, qk_norm=False, qkv_bias=True)
  return _model(text=text, flow=(1536, 4096), **SO400M)


def qwen_7b() -> dict[str, Any]:
  """8b: the language model is Qwen2.5-VL-7B's shape; the flow expert has 1.4 B, as many as BLIP3-o's drawer."""
  text = dict(QWEN, vocabulary=152_064, width=3584, layers=28, heads=28, kv_heads=4, mlp=18_944)
  return _model(text=dict(text, qk_norm=False, qkv_bias=True, tie_embeddings=False), flow=(2048, 5632), **SO400M)


MODELS = {"small": small, "1b": qwen_0_6b, "4b": qwen_3b, "8b": qwen_7b}


def make(name: str) -> dict[str, Any]:
  """Fields of the ClipFlow of that size. UserError for a size that is not there."""
  if name not in MODELS:
    raise UserError(f"model size {name!r} is unknown; there are {', '.join(MODELS)}, and for single stages tiny")
  return MODELS[name]()


def language_model(name: str) -> dict[str, Any]:
  """Fields of the Transformer of that size without a flow expert."""
  fields = make(name)["transformer"]
  return {key: value for key, value in fields.items() if key not in ("flow_width", "flow_mlp", "early_layer", "remat")}
