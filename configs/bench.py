"""What `clipflow bench SUBJECT --size=SIZE` times: the ways of each subject, as configs."""

from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from configs import blip3o, hardware, models, presets

# How each size computes. Stacks are unrolled: in a loop what their layers keep is stacked, which costs as much as they
# do.
SIZES: dict[str, dict[str, Any]] = {
  "cpu": dict(dtype="float32", kernel="xla"),
  "h100": dict(dtype="bfloat16", kernel="flash"),
}
ADAMW = dict(name="adamw", learning_rate=1e-4, warmup=10, clip=1.0)

GENERATION: dict[str, dict[str, Any]] = {
  # BLIP3-o with its 3 B language model, an eighth as wide and deep: a tower of 1024 patches that are pooled to 64
  # features, 64 queries, captions of some 110 words. The vocabulary is smaller still: logits stay as small a part.
  "cpu": dict(
    tower=dict(image_size=128, patch_size=4, feature_pool=4, width=224, layers=8, heads=4, mlp=1920, embedding=0),
    text=dict(
      vocabulary=2048,
      width=256,
      layers=4,
      heads=2,
      kv_heads=1,
      head_dim=128,
      mlp=1376,
      rope_sections=(32, 16, 16),
      qk_norm=False,
      qkv_bias=True,
    ),
    drawer=dict(queries=64, width=224, layers=3, heads=4, mlp=608, unroll=True),
    rows=2,
  ),
  # The same whole, with as many pictures on a GPU as its authors had.
  "h100": dict(
    tower=blip3o.TOWER,
    text=models.language_model("4b"),
    drawer=blip3o.DRAWER | dict(remat="none", unroll=True),
    rows=4,
  ),
}
# A language model of Qwen3's form, all of it trained, that reads a picture in each row.
UNDERSTANDING: dict[str, dict[str, Any]] = {
  "cpu": dict(
    tower=dict(image_size=128, patch_size=16, width=256, heads=4, mlp=512),
    text=dict(
      vocabulary=8192,
      width=512,
      layers=8,
      heads=8,
      kv_heads=4,
      head_dim=64,
      mlp=1536,
      rope_sections=(16, 8, 8),
      qk_norm=True,
    ),
    rows=4,
    length=512,
    chunk=0,
  ),
  "h100": dict(  # Qwen3-0.6B
    tower=dict(image_size=256, patch_size=16, width=1024, heads=16, mlp=4096),
    text=models.language_model("1b"),
    rows=8,
    length=1024,
    chunk=256,
  ),
}
# CLIP's two towers by their contrast alone.
CONTRASTIVE: dict[str, dict[str, Any]] = {
  "cpu": dict(  # in the proportions of ViT-B/16
    tower=dict(image_size=112, patch_size=16, width=384, layers=6, heads=6, mlp=1536, embedding=256),
    text=dict(vocabulary=8192, length=32, width=256, layers=6, heads=4, mlp=1024, embedding=256),
    rows=32,
  ),
  "h100": dict(  # ViT-L/14
    tower=dict(image_size=224, patch_size=14, width=1024, layers=24, heads=16, mlp=4096, embedding=768),
    text=dict(vocabulary=49_408, length=77, width=768, layers=12, heads=12, mlp=3072, embedding=768),
    rows=64,
  ),
}

# What writes: a language model of Qwen2.5's form.
DECODE: dict[str, dict[str, Any]] = {
  "cpu": dict(  # in the proportions of the one of 0.5 B
    text=dict(vocabulary=16_384, width=512, layers=12, heads=8, kv_heads=2, head_dim=64, mlp=1408),
    prompt=64,
    new=64,
    weights=("",),
  ),
  "h100": dict(  # the one of 1.5 B
    text=dict(vocabulary=151_936, width=1536, layers=28, heads=12, kv_heads=2, head_dim=128, mlp=8960),
    prompt=128,
    new=128,
    weights=("", "int8"),
  ),
}
EVALUATE = {"cpu": 8, "h100": 128}  # pictures at once


def get_config(arg: str = "generation") -> ConfigDict:
  """arg: SUBJECT or SUBJECT,size=SIZE -> ways, each a config. size: cpu (for a CPU of few cores) or h100."""
  subject, _, rest = arg.partition(",")
  size = presets.arguments(rest, size="cpu").size
  ways = {"generation": _generation, "understanding": _understanding, "contrastive": _contrastive}
  ways |= {"data": _data, "decode": _decode, "draw": _draw, "evaluate": _evaluate}
  if subject not in ways:
    raise UserError(f"there is nothing to time by the name {subject!r}; there are {', '.join(ways)}")
  if size not in SIZES:
    raise UserError(
      f"bench size {size!r} is unknown; there are {', '.join(SIZES)}, or give a stage's config with --config"
    )
  return ConfigDict(dict(ways=ways[subject](size)))


def _stage(name: str, size: str, model: dict[str, Any], weights: dict[str, float], **fields: Any) -> ConfigDict:
  config = presets.stage(name, model=model | SIZES[size], optimizer=presets.OPTIMIZER | ADAMW, steps=1000, **fields)
  config.objective.weights = weights
  config.tokenizer.vocabulary = model.get("transformer", model["clip"].get("text"))["vocabulary"]
  config.frozen_dtype = SIZES[size]["dtype"]
  if size != "cpu":
    config.environment = hardware.make(f"{size}x1").environment
  return config


def _generation(size: str) -> dict[str, ConfigDict]:
  """The separate drawer, as BLIP3-o trains it, and the shared way with a flow expert of the same width."""
  shape = GENERATION[size]
  drawer = shape["drawer"]
  ways = {}
  shared = dict(flow_width=drawer["width"], flow_mlp=drawer["mlp"])
  for way, more, own in (("dit", {}, drawer), ("shared", shared, None)):
    model = dict(clip=dict(vision=shape["tower"]), transformer=shape["text"] | dict(unroll=True) | more)
    model["prediction"] = "v"
    if own:
      model["drawer"] = own
    train = tuple(row for row in presets.trains(flow=1.0) if row[0] != presets.DECODER)
    config = _stage("generation", size, model, dict(flow=1.0), train=train)
    config.objective.stop_text = True
    config.data.update(batch_size=shape["rows"], length=448, images_per_row=4)
    config.rival = dict(drawer)
    ways[way] = config
  return ways


def _understanding(size: str) -> dict[str, ConfigDict]:
  shape = UNDERSTANDING[size]
  tower = shape["tower"] | dict(layers=1, embedding=0)  # its features are cached
  model = dict(clip=dict(vision=tower), transformer=shape["text"] | dict(unroll=True))
  config = _stage("understanding", size, model, dict(language=1.0), train=presets.trains(text=1.0))
  config.objective.vocabulary_chunk = shape["chunk"]
  config.data.update(batch_size=shape["rows"], length=shape["length"], images_per_row=1)
  return {"step": config}


def _contrastive(size: str) -> dict[str, ConfigDict]:
  shape = CONTRASTIVE[size]
  each = dict(activation="quick_gelu", unroll=True)
  vision = shape["tower"] | each | dict(has_class=True, patch_bias=False, in_norm=True, pooling="class")
  text = shape["text"] | each | dict(pooling="end")
  config = _stage("contrastive", size, dict(clip=dict(vision=vision, text=text)), dict(contrastive=1.0))
  config.train = presets.trains(clip=1.0)
  config.data.update(batch_size=shape["rows"], length=shape["text"]["length"], images_per_row=1)
  return {"step": config}


def _data(size: str) -> dict[str, dict[str, Any]]:
  """Pictures decoded and resized, features read, and beside each the most that the machine could."""
  sizes = dict(pictures=512, mebibytes=512)
  return {way: dict(sizes, way=way) for way in ("pipeline", "pillow", "features", "raw_read")}


def _decode(size: str) -> dict[str, dict[str, Any]]:
  """Words written behind one prompt, and behind sixteen at once."""
  shape = DECODE[size]
  vision = dict(image_size=32, patch_size=16, width=32, layers=1, heads=2, mlp=32, embedding=0)  # looks at nothing
  text = shape["text"] | dict(rope_theta=1e6, qk_norm=False, qkv_bias=True)
  model = dict(clip=dict(vision=vision), transformer=text, dtype=SIZES[size]["dtype"])
  told = dict(model=model, prompt=shape["prompt"], new=shape["new"])
  pairs = [(rows, weights) for weights in shape["weights"] for rows in (1, 16)]
  return {
    f"batch_{rows}{weights and '_' + weights}": told | dict(rows=rows, weights=weights) for rows, weights in pairs
  }


def _draw(size: str) -> dict[str, dict[str, Any]]:
  """Features of 64 pictures by BLIP3-o's drawer. Of its language model two layers stay: they are not what is timed."""
  shape = GENERATION[size]
  text = shape["text"] | dict(vocabulary=2048, layers=2)
  model = dict(clip=dict(vision=shape["tower"]), transformer=text, drawer=shape["drawer"])
  model |= dict(prediction="v", shift_scale=0.0, dtype=SIZES[size]["dtype"])
  return {"dit": dict(model=model, rows=64, prompt=64, steps=30, guidance=3.0)}


def _evaluate(size: str) -> dict[str, dict[str, Any]]:
  """The features of FID, of pictures that have yet to be brought to Inception's size."""
  return {"inception": dict(rows=EVALUATE[size], side=256)}
