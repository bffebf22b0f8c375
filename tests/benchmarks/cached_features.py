"""What cached features save of a step: python tests/benchmarks/cached_features.py CONFIG [STEPS].

CONFIG: a stage whose tower is frozen, such as configs/generation.py:model=small. The same step is compiled for pictures
and for features, and both run in turn; its FLOPs are counted by shape (`flops.count`), and with STEPS 0 only these.
Seconds are medians; core-seconds are processor time of all threads, which on a machine that others use tells more.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from clipflow_jax import config_file
from clipflow_jax.batch import TARGET, Batch
from clipflow_jax.data.text import with_vocabulary
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import flops, optimizer, state, step

VOCABULARY = 512


def batches(config: ConfigDict, model: ClipFlow) -> tuple[Batch, Batch]:
  """A batch of pictures, and the same with features: zeros, every slot a word and every picture a target."""
  b, s, n = config.data.batch_size, config.data.length, config.data.images_per_row
  side = model.clip["vision"]["image_size"]
  order = np.broadcast_to(np.arange(s, dtype=np.int32), (b, s))
  ones, last = np.ones((b, n), np.int32), np.full((b, n), s - 1, np.int32)
  words = Batch(
    tokens=np.zeros((b, s), np.int32),
    segments=np.ones((b, s), np.int32),
    order=order,
    positions=np.repeat(order[..., None], 3, axis=2),
    loss_weights=np.ones((b, s), np.float32),
    image_index=np.full((b, s), -1, np.int32),
    image_roles=TARGET * ones,
    image_segments=ones,
    image_order=last,
    image_positions=last,
  )
  pictures = dataclasses.replace(words, images=np.zeros((b, n, side, side, 3), np.uint8))
  features = np.zeros((b, n, *model.feature_shape), jnp.bfloat16)
  return pictures, dataclasses.replace(words, features=features)


def main(path: str, steps: int) -> dict[str, Any]:
  config = config_file.load(path, [])
  model = ClipFlow(**with_vocabulary(config.model.to_dict(), VOCABULARY))
  ways = dict(zip(("pictures", "features"), batches(config, model), strict=True))
  init = functools.partial(model.init, method="everything")
  abstract = jax.eval_shape(init, jax.random.key(0), ways["pictures"])["params"]
  scales = state.multipliers(abstract, config.train)
  tx = optimizer.Optimizer(steps=100, **config.optimizer).make(scales)
  create = functools.partial(state.create, scales=scales, tx=tx, ema=False)
  pure = step.make(model, Objective(**config.objective), tx, seed=0)
  found: dict[str, Any] = {"config": path}
  for name, batch in ways.items():
    found[f"{name}_tflops"] = flops.count(pure, jax.eval_shape(create, abstract), batch) / 1e12
  if steps:
    running = {}
    for name, batch in ways.items():
      # What the numbers are makes no difference, and to draw them at random takes longer to compile than the step.
      now = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), jax.eval_shape(create, abstract))
      if name == "features":
        now, _ = state.set_aside(now, ("clip_model",))
      running[name] = jax.jit(pure).lower(now, batch).compile(), now, batch
    for name, times in _measure(running, steps).items():
      found[f"{name}_seconds"], found[f"{name}_core_seconds"] = map(statistics.median, zip(*times, strict=True))
  for unit in ("tflops", "seconds", "core_seconds")[: 3 if steps else 1]:
    found[f"{unit}_ratio"] = found[f"features_{unit}"] / found[f"pictures_{unit}"]
  return found


def _measure(running: dict[str, Any], steps: int) -> dict[str, list[tuple[float, float]]]:
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
  for number in range(steps + 1):
    for name, (compiled, now, batch) in running.items():
      clock, processor = time.perf_counter(), time.process_time()
      jax.block_until_ready(compiled(now, batch))
      if number:  # the first warms up
        times[name].append((time.perf_counter() - clock, time.process_time() - processor))
  return times


if __name__ == "__main__":
  print(json.dumps(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10), indent=2))
