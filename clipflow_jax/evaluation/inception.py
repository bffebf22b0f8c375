"""Inception features of pictures of any size, resized as one of the two programs that published numbers come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding
from PIL import Image

from clipflow_jax.errors import UserError
from clipflow_jax.inference.batching import jitted
from clipflow_jax.interop import inception
from clipflow_jax.interop.family import described
from clipflow_jax.models.inception import SIZE, InceptionV3
from clipflow_jax.parallel import mesh as meshes
from clipflow_jax.parallel import sharding
from clipflow_jax.training.state import Params, flatten


def bilinear(images: np.ndarray | jax.Array) -> jax.Array:
  """[n,H,W,3] -> f32[n,299,299,3] as TensorFlow 1 did it, and torch-fidelity does: no half pixels, no antialiasing.

  Enlarging is what it is for; what it makes smaller has aliases (Parmar et al. 2022).
  """
  x = jnp.asarray(images).astype(jnp.float32)
  for axis in (1, 2):
    size = x.shape[axis]
    if size == SIZE:
      continue
    place = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = np.minimum(np.floor(place).astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = (place - low.astype(np.float32)).reshape([-1 if i == axis else 1 for i in range(4)])
    x = jnp.take(x, low, axis) * (1 - weight) + jnp.take(x, high, axis) * weight
  return x


def bicubic(images: np.ndarray, size: int = SIZE) -> np.ndarray:
  """u8[n,H,W,3] -> f32[n,size,size,3] as clean-fid does: Pillow's antialiased filter on each channel as floats."""

  def one(channel: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(channel.astype(np.float32))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)

  return np.stack([np.stack([one(image[..., c]) for c in range(3)], axis=-1) for image in images])


RESIZES: dict[str, Callable[[np.ndarray], Any]] = {"torch-fidelity": bilinear, "clean-fid": bicubic}


class Extractor:
  """u8[n,H,W,3] -> f32[n,2048], what FID is made of; `both` gives what the Inception Score is made of, too.

  One program runs in batches of one size, cut over all devices; what fills the last one is not returned.

  weights: the folder of a safetensors file, see `interop.inception`. resize: "torch-fidelity" (also the original's,
  and pytorch-fid's but for half a pixel) or "clean-fid". key: changes with whatever changes a feature.
  """

  def __init__(self, weights: Path | str, *, resize: str = "torch-fidelity", batch_size: int = 32):
    if resize not in RESIZES:
      raise UserError(f"the resize {resize!r} is unknown; choose one of {', '.join(RESIZES)}")
    self.resize = RESIZES[resize]
    module, params = inception.load(weights)
    self.key = f"{key_of(module, params)} {resize}"
    self._run = Sharded(features(module), params, batch_size, before=bilinear)

  def __call__(self, images: np.ndarray) -> np.ndarray:
    return self.both(images)[0]

  def both(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features f32[n,2048], logits f32[n,1008])."""
    made, logits = self._run(images if self.resize is bilinear else self.resize(images))  # done on the devices
    return made, logits


def key_of(module: nn.Module, params: Params) -> str:
  """A hash of all that a feature is a function of but the picture: the module's fields, every digit and dtype."""
  digest = hashlib.sha256(json.dumps(described(module), sort_keys=True).encode())
  for path, leaf in sorted(flatten(params).items()):
    array = np.asarray(leaf)
    digest.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
  return digest.hexdigest()


def features(module: InceptionV3) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]:
  """(params, pictures f32[B,299,299,3] in 0..255) -> (features f32[B,2048], logits f32[B,1008])."""

  def run(params: Params, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = module.apply({"params": params}, pictures)
    return found.f2048, found.logits

  return run


class Sharded:
  """A function (params, x[B,...]) -> (arrays [B,...], ...) on any number of items, each batch cut over all devices.

  before: makes x of the items, and alone is compiled for each shape that they come in.
  """

  def __init__(
    self,
    function: Callable[[Any, jax.Array], tuple[jax.Array, ...]],
    params: Any,
    batch_size: int,
    before: Callable[[jax.Array], jax.Array] = lambda items: items,
  ):
    mesh = meshes.make(dict(data=-1))
    self.batch_size = -(-batch_size // mesh.size) * mesh.size
    self._rows = NamedSharding(mesh, sharding.spec("batch"))
    self._params = jax.device_put(params, NamedSharding(mesh, sharding.spec()))
    self._before, self._function = jitted(before), jitted(function)

  def __call__(self, items: np.ndarray) -> tuple[np.ndarray, ...]:
    parts = []
    for start in range(0, len(items), self.batch_size):
      part = items[start : start + self.batch_size]
      filled = np.concatenate([part, np.repeat(part[-1:], self.batch_size - len(part), axis=0)])
      made = jax.device_get(self._function(self._params, self._before(jax.device_put(filled, self._rows))))
      parts.append([x[: len(part)] for x in made])
    return tuple(map(np.concatenate, zip(*parts, strict=True)))
