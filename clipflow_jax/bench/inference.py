"""Writing, drawing and Inception's features, as the pipeline compiles them, on numbers that mean nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.batch import TARGET, Batch
from clipflow_jax.bench import training
from clipflow_jax.bench.frame import Work
from clipflow_jax.evaluation import inception
from clipflow_jax.inference import image, text
from clipflow_jax.inference.batching import keys_of, options
from clipflow_jax.inference.weights import int8
from clipflow_jax.models.clipflow import ClipFlow, Place
from clipflow_jax.models.inception import SIZE, InceptionV3
from clipflow_jax.training import flops
from clipflow_jax.training.state import Params, flatten, nest


def decode(told: dict[str, Any]) -> Work:
  """told: model, fields of a ClipFlow; rows, prompt, new: so many words are written behind so many, greedily.

  weights: of `pipeline.ClipFlow.from_checkpoint`.
  """
  model, rows, new = ClipFlow(**told["model"]), told["rows"], told["new"]
  prompts = _words(model, rows, told["prompt"])
  params = _parameters(model, prompts, lambda m, batch: m.logits(m.read(batch, None)[0]))
  if told["weights"]:
    params = int8(params)

  def begin(params: Params, prompts: Batch) -> text.Writing:
    return text.begin(model, params, prompts, None, room=new)

  def write(params: Params, prompts: Batch) -> jax.Array:
    return text.generate(model, params, prompts, None, new=new, ends=(-1,))

  read = flops.count(begin, params, prompts)
  word = flops.count(write, params, prompts) - read  # a loop's body counts once
  context = jax.eval_shape(begin, params, prompts).context
  of_a_word = _bytes(params) + _bytes((context.keys, context.values))
  return _work(
    write,
    (params, prompts),
    {"tokens": float(rows * new)},
    f"{new} words written behind each of {rows} prompts of {told['prompt']}"
    + (f", layers in {told['weights']}" if told["weights"] else ""),
    model.dtype,
    flops=float(read + new * word),
    bytes=float((1 + new) * of_a_word),
    peer={name: told[name] for name in ("rows", "prompt", "new")}
    | {"transformer": told["model"]["transformer"], "dtype": str(jnp.dtype(model.dtype))},
  )


def draw(told: dict[str, Any]) -> Work:
  """told: model; rows, prompt, steps, guidance: features of so many prompts, away from a condition of zeros."""
  model, rows = ClipFlow(**told["model"]), told["rows"]
  prompts = _words(model, rows, told["prompt"], drawn=1)
  sampling = image.Sampling(steps=told["steps"], guidance=told["guidance"], eta=0.0, guide="null")

  def once(bound: ClipFlow, batch: Batch) -> jax.Array:
    _, context = bound.read(batch, None)
    place = Place(batch.image_segments, batch.image_order, batch.image_positions)
    x, t = jnp.zeros((rows, 1, *model.feature_shape)), jnp.ones((rows, 1))
    return bound.velocity(x, t, bound.conditioning(context, place))

  params = _parameters(model, prompts, once)

  def run(params: Params, prompts: Batch) -> jax.Array:
    keys = keys_of(jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1))
    return image.draw(model, params, prompts, prompts, keys, sampling)

  tokens, channels = model.feature_shape
  return _work(
    run,
    (params, prompts),
    {"images": float(rows)},
    f"{rows} pictures of {tokens} x {channels} features drawn, {told['steps']} guided Euler steps",
    model.dtype,
    flops=float(flops.count(run, params, prompts)),
    bytes=float(told["steps"] * _bytes(params["separate_drawer"])),
    peer={name: told[name] for name in ("rows", "steps", "guidance")}
    | {"drawer": told["model"]["drawer"], "condition": told["model"]["transformer"]["width"]}
    | {"features": [tokens, channels], "dtype": str(jnp.dtype(model.dtype))},
  )


def evaluate(told: dict[str, Any]) -> Work:
  """told: rows, side: what FID is made of, of so many pictures of so many pixels, which are resized first."""
  rows, side = told["rows"], told["side"]
  module = InceptionV3()
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
  params = jax.device_put(training.parameters(shapes))
  pictures = np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), np.uint8)
  look = inception.features(module)

  def run(params: Params, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
    return look(params, inception.bilinear(pictures))

  return _work(
    run,
    (params, jnp.asarray(pictures)),
    {"images": float(rows)},
    f"2048 features of {rows} pictures of {side} pixels by Inception-v3",
    jnp.float32,
    flops=float(flops.count(run, params, pictures)),
    bytes=float(_bytes(params)),
    peer=dict(told),
  )


def _words(model: ClipFlow, rows: int, length: int, drawn: int = 0) -> Batch:
  """Rows of one text each, behind which so many pictures are drawn."""
  order = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  ones, last = np.ones((rows, drawn), np.int32), np.full((rows, drawn), length - 1, np.int32)
  batch = Batch(
    tokens=np.random.default_rng(0).integers(1, model.transformer["vocabulary"], (rows, length)).astype(np.int32),
    segments=np.ones((rows, length), np.int32),
    order=order,
    positions=np.repeat(order[..., None], 3, axis=2),
    loss_weights=np.ones((rows, length), np.float32),
    image_index=np.full((rows, length), -1, np.int32),
    image_roles=TARGET * ones,
    image_segments=ones,
    image_order=last,
    image_positions=last + 1,
  )
  return jax.device_put(batch)


def _parameters(model: ClipFlow, batch: Batch, method: Callable) -> Params:
  """Those that a method of the model needs; matrices in what it computes in, as an import keeps them."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method=method)["params"])

  def kept(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return leaf.update(dtype=jnp.dtype(model.dtype)) if path.endswith(("kernel", "embedding")) else leaf

  return training.parameters(nest({path: kept(path, leaf) for path, leaf in flatten(shapes).items()}))


def _work(
  function: Callable,
  arguments: tuple[Any, ...],
  counts: dict[str, float],
  about: str,
  dtype: Any,
  **facts: Any,
) -> Work:
  """Calls of the compiled function. The first of its arguments is the parameters."""
  compiled, seconds = training.compiled(function, *arguments, compiler_options=options())
  count = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
  name = str(jnp.dtype(dtype))
  return Work(
    lambda: functools.partial(jax.block_until_ready, compiled(*arguments)),
    counts,
    f"{about}, {count / 1e6:.4g} M parameters, {name}",
    compile_seconds=seconds,
    dtype=name,
    memory=training.peak_memory(),
    **facts,
  )


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
