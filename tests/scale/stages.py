"""The five stages at a size whose large leaves pass 64 KiB, and one step of any of them on any mesh."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from clipflow_jax.batch import Batch
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.parallel import sharding
from clipflow_jax.training import optimizer, state, step
from configs import presets
from tests import tiny

VOCABULARY, ROWS, LENGTH, WIDTH, MLP = 512, 8, 32, 64, 264
STEPS = 5
ATTENTION = dict(heads=2, kv_heads=2, head_dim=32, qk_norm=True)
PATCHES = dict(image_size=tiny.SIZE, patch_size=tiny.PATCH)

CLIP: dict[str, Any] = dict(
  vision=dict(PATCHES, width=WIDTH, layers=1, heads=2, mlp=MLP, embedding=32),
  text=dict(vocabulary=VOCABULARY, length=LENGTH, width=WIDTH, layers=1, heads=2, mlp=MLP, embedding=32),
  captioner=dict(vocabulary=VOCABULARY, width=WIDTH, layers=1, mlp=MLP, **ATTENTION),
)
TRANSFORMER: dict[str, Any] = dict(
  vocabulary=VOCABULARY,
  width=WIDTH,
  layers=2,
  mlp=MLP,
  flow_width=WIDTH,
  flow_mlp=MLP,
  rope_sections=(8, 4, 4),
  **ATTENTION,
)
DECODER: dict[str, Any] = dict(PATCHES, width=WIDTH, layers=2, heads=2, mlp=MLP)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage: what it minimises, what learns (`presets.trains`), and the parts of the model that it has."""

  objective: dict[str, Any]
  trains: dict[str, float]
  parts: dict[str, Any]


STAGES = {
  "contrastive": Stage(dict(weights=dict(contrastive=1.0, caption=1.0, readout=1.0)), dict(clip=1.0), {}),
  "understanding": Stage(dict(weights=dict(language=1.0)), dict(text=1.0), dict(transformer=TRANSFORMER)),
  "generation": Stage(
    dict(weights=dict(flow=1.0), levels=2, stop_text=True), dict(flow=1.0), dict(transformer=TRANSFORMER)
  ),
  "decoder": Stage(dict(weights=dict(pixels=1.0)), dict(decoder=1.0), dict(pixel_decoder=DECODER)),
  "joint": Stage(
    dict(weights=dict(language=0.1, flow=1.0), levels=2), dict(text=1.0, flow=1.0), dict(transformer=TRANSFORMER)
  ),
}


def model(name: str, **fields: Any) -> ClipFlow:
  """The model of a stage, with `fields` over its own."""
  return ClipFlow(**(dict(clip=CLIP, shift_scale=20.0) | STAGES[name].parts | fields))


def batch(name: str) -> Batch:
  """Rows of captions with one picture each for the towers, else of packed examples of all kinds."""
  rng = np.random.default_rng(0)
  if name == "contrastive":
    rows = [[tiny.example(rng, 6 + i)] for i in range(ROWS)]
    pictures = rng.integers(0, 256, (ROWS, 1, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    return tiny.pack(rows, LENGTH, pictures=1).replace(images=pictures)
  parts = [(4, tiny.READ, 3), (2 + 1, tiny.DRAW), (1, tiny.READ_AND_DRAW)]
  rows = [[tiny.example(rng, i % 3 + 1, *one) for one in parts] for i in range(ROWS)]
  return tiny.pack(rows, LENGTH)


@dataclasses.dataclass(frozen=True)
class Run:
  """What STEPS steps of a stage on one mesh gave."""

  losses: list[float]
  end: state.TrainState
  places: state.TrainState | None  # the shardings that the state was asked to have
  lowered: str  # the program as traced
  compiled: str  # and as partitioned, of one device


def run(name: str, sizes: dict[str, int] | None, frozen_dtype: str = "float32", **fields: Any) -> Run:
  """Trains a stage on a mesh of all devices, or with None on the first device alone."""
  whole, rows, stage = model(name, **fields), batch(name), STAGES[name]
  params = tiny.random_params(
    jax.eval_shape(lambda: whole.init(jax.random.key(0), rows, method="everything"))["params"]
  )
  scales = state.multipliers(params, presets.trains(**stage.trains))
  # A small rate: what a sum in another order does to the last bit must not grow over the steps.
  tx = optimizer.Optimizer(steps=STEPS, name="adamw", learning_rate=1e-3, warmup=1).make(scales)
  pure = step.make(whole, Objective(**stage.objective), tx, seed=0, ema=0.9)
  now, places, scope = state.create(params, scales, tx, ema=True), None, contextlib.nullcontext()
  if sizes is None:
    jitted = jax.jit(pure)
  else:
    mesh = meshes.make(sizes)
    places, scope = state.shardings(now, mesh), jax.set_mesh(mesh)
    of_rows = sharding.of_batch(rows, mesh)
    jitted = jax.jit(pure, in_shardings=(places, of_rows), out_shardings=(places, None))
    now, rows = jax.device_put(now, places), jax.device_put(rows, of_rows)
  losses = []
  with scope:
    lowered = jitted.lower(now, rows)
    compiled = lowered.compile()
    for _ in range(STEPS):
      now, metrics = compiled(now, rows)
      losses.append(float(metrics["loss"]))
  return Run(losses, now, places, lowered.as_text(), compiled.as_text())
