"""Configs of stages that train in no time: shapes of 24 pixels, the model of `tests.tiny` on them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from clipflow_jax.data import sequence
from clipflow_jax.inference.pipeline import ClipFlow
from configs import presets
from tests import tiny

SIZE = 24  # the smallest that shapes can be told apart at
PATCH = 12


def model(**fields: Any) -> dict[str, Any]:
  """Fields of the tiny ClipFlow for shapes, `fields` in place of its own."""
  clip = tiny.FIELDS["clip"]
  whole = dict(
    tiny.FIELDS,
    clip=dict(
      vision=dict(clip["vision"], image_size=SIZE, patch_size=PATCH),
      text=dict(clip["text"], vocabulary=0, length=64),
      captioner=dict(clip["captioner"], vocabulary=0),
    ),
    transformer=dict(tiny.FIELDS["transformer"], vocabulary=0),
    pixel_decoder=dict(tiny.FIELDS["pixel_decoder"], image_size=SIZE, patch_size=PATCH),
  )
  return whole | fields


def decoder_stage(**fields: Any) -> ConfigDict:
  """Four steps of a tower and a pixel decoder: little to compile, and with randomness in the data and in the loss."""
  config = presets.stage(
    "decoder",
    model=model(transformer=None),
    tokenizer=dict(vocabulary=300, examples=20),
    train=presets.trains(decoder=1.0),
    steps=4,
    ema=0.9,
    log_every=1,
    checkpoint_every=100,
    measure_features=16,
    frozen_at_random=True,
  )
  config.data.source = dict(kind="shapes", size=SIZE, counts=(1.0,), questions=1)
  config.data.update(tasks=dict(caption=1.0), length=64, batch_size=4)
  config.objective.weights = dict(pixels=1.0)
  config.optimizer.update(name="adamw", learning_rate=0.01, warmup=1)
  config.sampling.update(steps=3)
  config.update(fields)
  return config


def taught_edits(loaded: ClipFlow) -> ClipFlow:
  """Itself, as if a source of edits had been among its data."""
  loaded.wording = loaded.wording._replace(edit=sequence.EDIT)
  return loaded


def lively(loaded: ClipFlow) -> ClipFlow:
  """With parameters at random: two steps of training leave heads and gains too tame to tell anything apart."""
  params = jax.device_put(tiny.random_params(loaded.params, seed=2))
  # Embeddings are tied: were all gains before them positive, each word would be followed by itself.
  gains = params["language_model"]["text_norm"]
  gains["scale"] *= np.where(np.arange(len(gains["scale"])) % 2, 1, -1)
  return ClipFlow(loaded.model, params, loaded.tokenizer, loaded.config)
