"""What `clipflow bench SUBJECT --size=SIZE` times: the ways of each subject, as configs."""

from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError
from configs import presets

# BLIP3-o with its 3 B language model, an eighth as wide and deep: a tower of 1024 patches that are pooled to 64
# features, 64 queries, captions of some 110 words. The vocabulary is smaller still: logits stay as small a part.
TOWER = dict(image_size=128, patch_size=4, feature_pool=4, width=224, layers=8, heads=4, mlp=1920, embedding=0)
TEXT = dict(
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
)
DRAWER = dict(queries=64, width=224, layers=3, heads=4, mlp=608)
ADAMW = dict(name="adamw", learning_rate=1e-4, warmup=10, clip=1.0)


def get_config(arg: str = "generation") -> ConfigDict:
  """arg: SUBJECT or SUBJECT,size=SIZE -> ways, each a config. size: cpu (for a CPU of few cores)."""
  subject, _, rest = arg.partition(",")
  size = presets.arguments(rest, size="cpu").size
  ways = {"generation": _generation, "understanding": _understanding, "contrastive": _contrastive}
  ways |= {"data": _data}
  if subject not in ways:
    raise UserError(f"there is nothing to time by the name {subject!r}; there are {', '.join(ways)}")
  if size != "cpu":
    raise UserError(f"bench size {size!r} is unknown; there is cpu, or give a stage's config with --config")
  return ConfigDict(dict(ways=ways[subject]()))


def _stage(name: str, model: dict[str, Any], weights: dict[str, float], **fields: Any) -> ConfigDict:
  config = presets.stage(name, model=model, optimizer=dict(ADAMW), steps=1000, **fields)
  config.objective.weights = weights
  config.tokenizer.vocabulary = 2048
  return config


def _generation() -> dict[str, ConfigDict]:
  """The separate drawer, as BLIP3-o trains it, and the shared way with a flow expert of the same width."""
  ways = {}
  shared = dict(flow_width=DRAWER["width"], flow_mlp=DRAWER["mlp"])
  for way, text, drawer in (("dit", {}, DRAWER), ("shared", shared, None)):
    model = dict(clip=dict(vision=TOWER), transformer=TEXT | dict(unroll=True) | text, prediction="v")
    if drawer:
      model["drawer"] = drawer | dict(unroll=True)
    train = tuple(row for row in presets.trains(flow=1.0) if row[0] != presets.DECODER)
    config = _stage("generation", model, dict(flow=1.0), train=train)
    config.objective.stop_text = True
    config.data.update(batch_size=2, length=448, images_per_row=4)
    config.rival = dict(DRAWER)
    ways[way] = config
  return ways


def _understanding() -> dict[str, ConfigDict]:
  """A language model of Qwen3's form, all of it trained, that reads a picture in each row."""
  text = dict(width=512, layers=8, heads=8, kv_heads=4, head_dim=64, mlp=1536, rope_sections=(16, 8, 8))
  vision = dict(image_size=128, patch_size=16, width=256, layers=1, heads=4, mlp=512, embedding=0)
  model = dict(clip=dict(vision=vision), transformer=dict(text, vocabulary=8192, qk_norm=True, unroll=True))
  config = _stage("understanding", model, dict(language=1.0), train=presets.trains(text=1.0))
  config.tokenizer.vocabulary = 8192
  config.data.update(batch_size=4, length=512, images_per_row=1)
  return {"step": config}


def _contrastive() -> dict[str, ConfigDict]:
  """CLIP's two towers by their contrast alone, in the proportions of ViT-B/16."""
  each = dict(embedding=256, activation="quick_gelu", unroll=True)
  vision = dict(each, image_size=112, patch_size=16, width=384, layers=6, heads=6, mlp=1536)
  vision |= dict(has_class=True, patch_bias=False, in_norm=True, pooling="class")
  text = dict(each, vocabulary=8192, length=32, width=256, layers=6, heads=4, mlp=1024, pooling="end")
  config = _stage("contrastive", dict(clip=dict(vision=vision, text=text)), dict(contrastive=1.0))
  config.train = presets.trains(clip=1.0)
  config.tokenizer.vocabulary = 8192
  config.data.update(batch_size=32, length=32, images_per_row=1)
  return {"step": config}


def _data() -> dict[str, dict[str, Any]]:
  """Pictures decoded and resized, features read, and beside each the most that the machine could."""
  sizes = dict(pictures=512, mebibytes=512)
  return {way: dict(sizes, way=way) for way in ("pipeline", "pillow", "features", "raw_read")}
