"""Any number of items through programs of few shapes: in padded batches, cut over the devices, each compiled once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import distributed, sharding
from clipflow_jax.training.state import Params

# On a CPU jaxlib 0.10 gives YNNPACK whatever stands beside a product, and convolutions, which it makes on less than all
# cores. Given products alone, a separate drawer takes 0.8 of the time, Inception 0.6, and nothing takes longer.
OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}}


def options() -> dict[str, str] | None:
  """The compiler's, of what a trained model computes on the devices here."""
  return OPTIONS.get(jax.default_backend())


def jitted(run: Callable, **how: Any) -> Callable:
  """`jax.jit` with these options."""
  return jax.jit(run, compiler_options=options(), **how)


class Programs:
  """Functions of a model's parameters, jitted by name: each is compiled once for every shape that it meets."""

  def __init__(self) -> None:
    self._jitted: dict[tuple, Callable] = {}

  def jitted(self, name: tuple, run: Callable, **how: Any) -> Callable:
    """`run`, or what came first by that name, which must compute the same. how: of `jax.jit`."""
    return self._jitted.setdefault(name, jitted(run, **how))

  def over(self, name: tuple, run: Callable, params: Params, items: tuple, *constant: Any, size: int) -> np.ndarray:
    """run(params, *items, *constant) over the items' first axis, in padded batches of at most about `size`.

    Whole, on every process. UserError where there are no items.
    """
    program = self.jitted(name, run)
    rows, parts = rows_lie(params)
    n = jax.tree.leaves(items)[0].shape[0]
    size = -(-min(size, len(padded(n))) // parts) * parts
    outputs = []
    for start in range(0, n, size):
      part = np.minimum(np.arange(start, start + size), n - 1)  # the last batch is filled with its last item
      batch = jax.tree.map(lambda x, part=part: x[part], items)
      if rows is not None:
        batch = jax.tree.map(lambda x: distributed.place(x, rows), batch)
      made = program(params, *batch, *constant)
      outputs.append(multihost_utils.process_allgather(made, tiled=True)[: n - start])
    if not outputs:
      raise UserError("nothing to do: the list is empty")
    return np.concatenate(outputs)


def rows_lie(params: Params) -> tuple[NamedSharding | None, int]:
  """Where a batch's rows lie, if the parameters are on a mesh, and into how many parts its devices cut them."""
  place = getattr(jax.tree.leaves(params)[0], "sharding", None)
  if not isinstance(place, NamedSharding):
    return None, 1
  parts = math.prod(place.mesh.shape[axis] for axis in sharding.LOGICAL["batch"])
  return NamedSharding(place.mesh, sharding.spec("batch")), parts


def bucket(length: int, least: int = 16) -> int:
  """The length that is compiled for: one of few, twice as long each, so that few programs are."""
  return least << (-(-length // least) - 1).bit_length()


def padded(n: int) -> np.ndarray:
  """Indices of n items with the last repeated up to a power of two, so that programs are compiled for few sizes."""
  return np.minimum(np.arange(1 << (n - 1).bit_length()), n - 1)


def seeds_of(n: int, seed: int | Sequence[int]) -> np.ndarray:
  """The seed and the place that are the noise of each of n items, u32[n,2]. UserError for what are no n seeds.

  seed: one for all, which then have their own places; one for each; or u32[n,2] itself.
  """
  seeds, places = ([seed] * n, range(n)) if isinstance(seed, int | np.integer) else (seed, [0] * n)
  if len(seeds) != n:
    raise UserError(f"{len(seeds)} seeds for {n} items; give one for all, or one for each")
  if np.ndim(seeds) == 2:
    return np.asarray(seeds)
  if wrong := [one for one in seeds if not 0 <= one < 2**32]:
    raise UserError(f"{wrong[0]} is no seed; choose one of 0 to {2**32 - 1}")
  return np.stack([np.asarray(seeds, np.int64), np.asarray(places)], axis=1).astype(np.uint32)


def keys_of(seeds: jax.Array) -> jax.Array:
  """key[N] of seeds and places u32[N,2]."""
  return jax.vmap(lambda one: jax.random.fold_in(jax.random.key(one[0]), one[1]))(seeds)


def listed(what: str, texts: Sequence[str], n: int | None = None) -> list[str]:
  """The texts as a list. UserError for one text in the place of a list, for none, or for others than n."""
  if isinstance(texts, str):
    raise UserError(f"{what} are the one text {texts[:40]!r}: give a list of them")
  if not len(texts):
    raise UserError(f"nothing to do: there are no {what}")
  if n is not None and len(texts) != n:
    raise UserError(f"{len(texts)} {what} for {n}: give one for each")
  return list(texts)
