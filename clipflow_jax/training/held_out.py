"""Does a stage over-fit? Its own losses on the test split of its data, with the same batches and noise each time."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from clipflow_jax.batch import Batch
from clipflow_jax.data import mixture
from clipflow_jax.data.bad_records import BadRecords
from clipflow_jax.data.pipeline import Pipeline
from clipflow_jax.errors import UserError
from clipflow_jax.training.metrics import Meter
from clipflow_jax.training.state import Params
from clipflow_jax.training.step import Metrics

log = logging.getLogger(__name__)

NAME = "held_out"  # of what is due, and before the metrics' own names


def batches(config: ConfigDict, training: Pipeline, shards: Sequence[int]) -> list[Batch]:
  """The first `config.held_out.batches` of the test split, made as those of `training` are; [] where `every` is 0.

  Of each the rows of `shards`, on the host, where they stay. A small split comes again and again. Each source keeps its
  weight: here none ends by `epochs`. A source without a test split, as of few pictures, is told of, and nothing is held
  out. UserError where none of it can be read.
  """
  if not config.held_out.every:
    return []
  try:
    parts = tuple(dataclasses.replace(part, epochs=0) for part in mixture.make(config.data.source, "test"))
    for part in parts:
      if not len(part.source):
        raise UserError(f"the test split of {part.name} is empty: give more data")
  except UserError as error:  # for all that else is wrong with the data the run has ended before
    log.warning("no loss is held out: %s", error)
    return []
  try:
    bad = BadRecords(None, 1.0)
    stream = dataclasses.replace(training, parts=parts).batches(bad, shards)
    made = list(itertools.islice(stream, config.held_out.batches))
  except UserError as error:
    raise UserError(f"held_out.every is {config.held_out.every}: {error}; or set held_out.every=0") from error
  if bad.bad:
    log.warning("of the test split, %s", bad.summary())
  return made


def measure(
  losses: Callable[[Params, Batch, int], Metrics],
  params: Params,
  made: Sequence[Batch],
  put: Callable[[Batch], Batch],
) -> dict[str, float]:
  """{"held_out/loss", ...}: the means of `step.losses`, jitted, over what `batches` made. put: to the devices."""
  meter = Meter()
  for number, batch in enumerate(made):
    meter.update(losses(params, put(batch), number))
  return {f"{NAME}/{name}": value for name, value in meter.compute().items()}
