"""What a config would train, in words and tables."""

from __future__ import annotations

import collections
import functools
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from clipflow_jax import config_file
from clipflow_jax.batch import Batch
from clipflow_jax.data.text import with_vocabulary
from clipflow_jax.errors import UserError
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.training import settings, state
from clipflow_jax.training.adapters import Adapters

VOCABULARY = 512  # stands for one that only the tokenizer will tell
WIDTH = 100  # of a terminal


def describe_config(config: ConfigDict) -> str:
  """The stages of a config, and for each part of the model how many parameters it trains. Nothing is allocated.

  Raises UserError when the config describes no stage, or its settings or its train table make no run.
  """
  every = config_file.stages(config)
  if not every or not all("model" in stage for stage in every):
    raise UserError("the config has neither a model nor stages that have one; see configs/ for examples")
  for stage in every:
    settings.check(stage)
  plan = [
    (
      stage.name,
      str(stage.steps),
      f"{stage.data.batch_size} x {stage.data.length} words, {stage.data.images_per_row} pictures",
      ", ".join(f"{name} {weight:g}" for name, weight in stage.objective.weights.items() if weight),
    )
    for stage in every
  ]
  parameters = {stage.name: _parameters(stage) for stage in every}
  parts = list(dict.fromkeys(part for of_stage in parameters.values() for part in of_stage))
  counts = [(part, *(_share(parameters[stage.name].get(part)) for stage in every)) for part in parts]
  totals = [tuple(map(sum, zip(*parameters[stage.name].values(), strict=True))) for stage in every]
  text = table(("stage", "steps", "batch", "objective"), plan)
  text += "\nMillions of parameters, trained / all:\n"
  text += table(("part", *parameters), [*counts, ("total", *map(_share, totals))])
  if any(_has_open_vocabulary(stage.model.to_dict()) for stage in every):
    text += f"\nThe vocabulary is open until a tokenizer is trained or taken over; {VOCABULARY} words are counted.\n"
  return text


def _parameters(stage: ConfigDict) -> dict[str, tuple[int, int]]:
  fit = functools.partial(Adapters(**stage.adapters).fit, seed=0)
  params = jax.eval_shape(fit, _shapes(stage.model.to_json_best_effort(sort_keys=True)))
  scales = state.multipliers(params, stage.train)
  return by_part((name, math.prod(leaf.shape), scales[name] > 0) for name, leaf in state.flatten(params).items())


def by_part(leaves: Iterable[tuple[str, int, bool]]) -> dict[str, tuple[int, int]]:
  """{top-level module: (trained, all)} in numbers of parameters. leaves: (path, size, whether it is trained)."""
  counts: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
  for path, size, trains in leaves:
    part = path.split("/")[0]
    trained, whole = counts[part]
    counts[part] = (trained + size * trains, whole + size)
  return dict(counts)


@functools.cache
def _shapes(fields: str) -> state.Params:
  """The parameters, by shape alone, of a model whose fields are given as JSON."""
  model = ClipFlow(**with_vocabulary(json.loads(fields), VOCABULARY))
  side = model.clip["vision"]["image_size"]

  def init():
    # Parameters depend on neither the length of a row nor its pictures.
    shapes = dict(tokens=(8,), segments=(8,), order=(8,), positions=(8, 3), image_index=(8,))
    shapes |= dict.fromkeys(("image_roles", "image_segments", "image_order", "image_positions"), (1,))
    batch = Batch(
      **{name: jnp.zeros((1, *shape), jnp.int32) for name, shape in shapes.items()},
      loss_weights=jnp.zeros((1, 8)),
      images=jnp.zeros((1, 1, side, side, 3), jnp.uint8),
    )
    return model.init(jax.random.key(0), batch, method="everything")["params"]

  return jax.eval_shape(init)


def _has_open_vocabulary(fields: dict[str, Any]) -> bool:
  return with_vocabulary(fields, VOCABULARY) != fields


def _share(counts: tuple[int, ...] | None) -> str:
  return " / ".join(f"{count / 1e6:.3f}" for count in counts) if counts else "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table for the terminal; without a header where that is empty."""
  from rich.console import Console
  from rich.table import Table

  rows = list(rows)
  table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
  for i in range(len(header) or len(rows[0])):
    table.add_column(header[i] if header else "", overflow="fold", no_wrap=i == 0)
  for row in rows:
    table.add_row(*row)
  out = io.StringIO()
  Console(file=out, width=WIDTH, highlight=False, markup=False, emoji=False).print(table)
  return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
