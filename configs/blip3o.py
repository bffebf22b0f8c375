"""BLIP3-o as it was released (Chen et al. 2025): a frozen Qwen2.5-VL, queries, and a drawer of EVA-CLIP's features."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.interop.blip3o import PICTURE
from configs import models, presets, warm

PROMPT = "Please generate image based on the following caption: {caption}"
TOWER = PICTURE | dict(width=1792, remat="full")
DRAWER = dict(queries=64, width=1792, layers=24, heads=28, mlp=4864, time_steps=1000, remat="full")


def get_config(arg: str = "") -> ConfigDict:
  """arg: model=4b or 8b, the language model's size; from=DIR, an imported checkpoint to train further.

  tower=DIR: the imported EVA-CLIP E/14-plus whose features it draws, which its own checkpoints leave out.
  """
  options = presets.arguments(arg, model="8b", tower="", **{"from": ""})
  train = tuple(row for row in presets.trains(flow=1.0) if row[0] != presets.DECODER)  # there is none
  config = presets.stage("blip3o", steps=10_000, train=train, frozen_dtype="bfloat16", keep=presets.KEEP)
  config.model = _model(options.model)
  # Its sampler: 30 even steps, away from a condition of zeros, to features as the tower gives them.
  config.sampling = dict(steps=30, guidance=3.0, eta=0.0, method="euler", interval=(0.0, 1.0), guide="null")
  config.data.update(presets.ROWS["generation"], tasks=dict(draw=1.0), drop_text=0.0)
  config.data.source.update(size=PICTURE["image_size"], draw=(PROMPT,))
  config.objective.update(weights=dict(flow=1.0), drop_condition=0.1)
  config.optimizer.update(name="adamw", learning_rate=1e-4, warmup=30)
  if options["from"]:
    fields = warm.imported(options["from"])
    config.model.update(transformer=fields["transformer"], drawer=fields["drawer"])
    warm.begin_from(config, options["from"])
  if options.tower:
    warm.begin_from(config, options.tower)
  return config


def _model(size: str) -> dict[str, Any]:
  """Fields of ClipFlow with the language model of that size."""
  own = dict(drawer=dict(DRAWER), prediction="v", shift_scale=0.0, dtype="bfloat16")  # no shift of time
  return dict(clip=dict(vision=dict(TOWER)), transformer=dict(models.language_model(size), remat="full"), **own)
