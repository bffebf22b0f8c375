"""One step of a stage, as `training.loop` compiles it, on a batch whose numbers mean nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from clipflow_jax.batch import INPUT, TARGET, Batch
from clipflow_jax.bench.frame import Work
from clipflow_jax.data import sequence
from clipflow_jax.data.text import with_vocabulary
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training import flops, optimizer, state
from clipflow_jax.training import step as steps
from clipflow_jax.training.program import with_values

UNEVEN = 0.4  # captions packed in a row are so much longer and shorter than their mean, evenly between


def step(told: dict[str, Any]) -> Work:
  """told: the config of a stage whose loss is contrastive, language or flow; for the last two features are cached.

  Every row is full: data.images_per_row examples of one picture each, captions of uneven lengths where it is drawn.
  """
  config = ConfigDict(told)
  model = ClipFlow(**with_vocabulary(config.model.to_dict(), config.tokenizer.vocabulary))
  lengths = example_lengths(config)
  batch = make_batch(config, model, lengths)
  objective = Objective(**config.objective)
  abstract = jax.eval_shape(functools.partial(_init, model, config), batch)
  scales = state.multipliers(abstract, config.train)
  tx = optimizer.Optimizer(steps=max(config.steps, 1), **config.optimizer).make(scales)
  create = functools.partial(state.create, scales=scales, tx=tx, ema=config.ema > 0, frozen_dtype=config.frozen_dtype)
  shapes = jax.eval_shape(create, abstract)
  if batch.features is not None:
    shapes, _ = state.set_aside(shapes, ("clip_model",))
  now = _fill(shapes)
  pure = steps.make(model, objective, tx, seed=0, ema=config.ema, accumulate=config.accumulate)
  advance, compile_seconds = compiled(pure, now, batch, donate_argnums=0)
  moved = sum(leaf.nbytes for leaf in jax.tree.leaves((now, now.trained, now.ema, now.opt_state, batch)))

  def run() -> Callable[[], Any]:
    nonlocal now
    now, metrics = advance(now, batch)
    return functools.partial(jax.block_until_ready, metrics)

  rows, words = np.shape(batch.tokens)
  count = sum(leaf.size for leaf in jax.tree.leaves(now.trained))
  return Work(
    run,
    {"images": float(rows * config.data.images_per_row), "tokens": float(rows * words)},
    f"{rows} rows of {words} tokens and {config.data.images_per_row} pictures, {count / 1e6:.4g} M parameters "
    f"trained, {jnp.dtype(model.dtype)}, {config.optimizer.name}",
    flops=float(flops.count(_plain(config, model, objective), now, batch)),
    bytes=float(moved),
    compile_seconds=compile_seconds,
    dtype=str(jnp.dtype(model.dtype)),
    peer=_for_peer(config, model, lengths),
    memory=peak_memory(),
  )


def compiled(function: Callable, *arguments: Any, **how: Any) -> tuple[Callable, float]:
  """The function compiled for arguments of such shapes, and the seconds that took. how: of `jax.jit`."""
  before = time.perf_counter()
  made = jax.jit(function, **how).lower(*arguments).compile()
  return made, time.perf_counter() - before


def peak_memory() -> Callable[[], float] | None:
  """What tells the peak bytes of the device, if it keeps count."""
  device = jax.local_devices()[0]
  return (lambda: float(device.memory_stats()["peak_bytes_in_use"])) if device.memory_stats() else None


def example_lengths(config: ConfigDict) -> list[int]:
  """The words of each example of a row: even, or of captions to draw `UNEVEN`. They fill the row."""
  n = config.data.images_per_row
  uneven = UNEVEN if config.objective.weights.get("flow") and n > 1 else 0.0
  ends = np.cumsum(1 + np.linspace(-uneven, uneven, n)) * config.data.length / n
  return np.diff(np.round(ends).astype(int), prepend=0).tolist()


def make_batch(config: ConfigDict, model: ClipFlow, lengths: list[int]) -> Batch:
  """data.batch_size rows, the examples of each of those lengths."""
  weights = config.objective.weights
  rng = np.random.default_rng(0)
  layout = sequence.Layout(config.data.length, config.data.images_per_row, model.grid)
  rows = []
  for _ in range(config.data.batch_size):
    examples = [_example(rng, config, model, length, bool(weights.get("language"))) for length in lengths]
    rows.append(sequence.pack(examples, layout))
  return sequence.stack(rows)


def _example(rng: np.random.Generator, config: ConfigDict, model: ClipFlow, length: int, reads: bool) -> dict:
  """As `sequence.encode` makes it: a picture that is read behind one word, or drawn behind the last."""
  grid, per_image = model.grid, model.grid**2 if reads else 0
  order = np.concatenate([[0], np.full(per_image, 1), np.arange(length - 1 - per_image) + (2 if reads else 1)])
  time_of = np.concatenate([[0], np.full(per_image, 1), np.arange(length - 1 - per_image) + 1 + grid * reads])
  positions = np.repeat(time_of[:, None], 3, axis=1)
  index = np.full(length, -1)
  if reads:
    row, column = np.divmod(np.arange(per_image), grid)
    positions[1 : 1 + per_image] += np.stack([0 * row, row, column], axis=1)
    index[1 : 1 + per_image] = np.arange(per_image)
  drawn_at = 0 if reads else length - 1
  side = model.clip["vision"]["image_size"]
  sees = config.objective.weights.get("contrastive")
  features = rng.normal(size=(1, *model.feature_shape)).astype(jnp.bfloat16)
  return {
    "tokens": rng.integers(1, config.tokenizer.vocabulary, length).astype(np.int32),
    "loss_weights": (index < 0).astype(np.float32),
    "order": order.astype(np.int32),
    "positions": positions.astype(np.int32),
    "image_index": index.astype(np.int32),
    "images": rng.integers(0, 256, (1, side, side, 3), np.uint8) if sees else features,
    "image_roles": np.array([INPUT if reads or sees else TARGET], np.int32),
    "image_order": np.array([drawn_at], np.int32),
    "image_positions": np.array([drawn_at + 1], np.int32),
  }


def _init(model: ClipFlow, config: ConfigDict, batch: Batch) -> state.Params:
  side = model.clip["vision"]["image_size"]
  images = jnp.zeros((*batch.image_roles.shape, side, side, 3), jnp.uint8)
  whole = dataclasses.replace(batch, images=images, features=None)
  return model.init(jax.random.key(0), whole, method="everything")["params"]


def parameters(shapes: state.Params) -> state.Params:
  """Numbers as large as real ones, the same few over and over: to draw each would take longer than what is timed."""
  few = jnp.asarray(np.random.default_rng(0).normal(size=2**16 - 1), jnp.float32)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def repeated(few: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    size = math.prod(shape)
    times = -(-size // few.size)
    return jnp.broadcast_to(few, (times, few.size)).reshape(-1)[:size].reshape(shape).astype(dtype)

  def of(path: str, leaf: Any) -> jax.Array:
    if path.endswith(("scale", "std", "var")):
      return jnp.ones(leaf.shape, leaf.dtype)
    inputs = math.prod(leaf.shape[1 if len(leaf.shape) == 3 else 0 : -1]) if len(leaf.shape) > 1 else 1e4
    return repeated(few / math.sqrt(inputs), leaf.shape, leaf.dtype)

  return state.nest({path: of(path, leaf) for path, leaf in state.flatten(shapes).items()})


def _fill(shapes: state.TrainState) -> state.TrainState:
  made = {name: parameters(getattr(shapes, name)) for name in ("trained", "frozen")}
  made["ema"] = None if shapes.ema is None else parameters(shapes.ema)
  rest = dataclasses.replace(shapes, trained={}, frozen={}, ema=None)
  return dataclasses.replace(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest), **made)


def _plain(config: ConfigDict, model: ClipFlow, objective: Objective) -> Any:
  """Forward and backward with nothing done twice, and without the optimizer: what model FLOPs are of."""

  fields = with_vocabulary(config.model.to_dict(), config.tokenizer.vocabulary)
  plain = ClipFlow(**with_values(fields, remat="none", kernel="xla"))
  at_once = dataclasses.replace(objective, vocabulary_chunk=0, contrastive_chunk=0)

  def gradient(now: state.TrainState, batch: Batch) -> Any:
    def loss(trained: state.Params) -> jax.Array:
      keys = jax.random.split(jax.random.key(0), batch.tokens.shape[0])
      sums = plain.apply({"params": state.merge(trained, now.frozen)}, batch, keys, method=at_once.sums)
      return at_once.loss(sums, at_once.counts(batch))[0]

    return jax.grad(loss)(now.trained)

  return gradient


def _for_peer(config: ConfigDict, model: ClipFlow, lengths: list[int]) -> dict[str, Any] | None:
  """What another program needs to know to do the same: shapes of the model, and of the data."""
  fields = with_vocabulary(config.model.to_dict(), config.tokenizer.vocabulary)
  told = {"rows": config.data.batch_size, "lengths": lengths, "dtype": str(jnp.dtype(model.dtype))}
  if config.objective.weights.get("contrastive"):
    return told | {"vision": fields["clip"]["vision"], "text": fields["clip"]["text"]}
  told["transformer"] = _shape(fields["transformer"])
  if config.objective.weights.get("language"):
    return told
  drawer = fields.get("drawer") or config.get("rival")
  return told | {"drawer": _shape(drawer), "vision": fields["clip"]["vision"]} if drawer else None


def _shape(fields: dict[str, Any]) -> dict[str, Any]:
  """What others have too: neither the flow expert nor how we compute."""
  ours = ("flow_width", "flow_mlp", "early_layer", "out_scale", "unroll", "remat")
  return {name: value for name, value in dict(fields).items() if name not in ours}
