"""What a stage writes while it trains, of the test split: samples, and what its tasks measure."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from clipflow_jax import config_file
from clipflow_jax.data import mixture
from clipflow_jax.data.example import Example
from clipflow_jax.data.sources import Source, readable
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import suite
from clipflow_jax.inference import show
from clipflow_jax.inference.image import Sampling
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.training import loop
from clipflow_jax.training.metrics import Writer

SHOWN = 16  # examples of a sheet


def make(config: ConfigDict) -> loop.Sampler:
  """For `loop.train`, of a stage or of a run. It keeps a stage's compiled functions from one time to the next.

  UserError for settings by which nothing can be drawn or measured, or data without a picture to do so by, now and not
  when it is due.
  """
  sources: dict[str, Source] = {}
  examples: dict[str, list[Example]] = {}
  for stage in config_file.stages(config):
    Sampling(**stage.sampling)
    suite.check({name: _settings(stage, name) for name in stage.evaluate})
    if stage.sample_every or any(task.get("every") for task in stage.evaluate.values()):
      sources[stage.name], examples[stage.name] = _shown(stage)
  models: dict[str, ClipFlow] = {}

  def sample(model, config, params, chat, step, writer, due):
    pipeline = models.setdefault(config.name, ClipFlow(model, params, chat, config))
    pipeline.params = params  # the same compiled functions with today's parameters
    try:
      if loop.SAMPLES in due:
        _write(pipeline, examples[config.name], step, writer)
      if tasks := {name: _settings(config, name) for name in due if name != loop.SAMPLES}:
        writer.scalars(step, suite.measure(pipeline, sources[config.name], tasks))
    finally:
      pipeline.params = {}  # merged with adapters, or taken back beside cached features, they are a model more

  return sample


def _shown(stage: ConfigDict) -> tuple[Source, list[Example]]:
  """The source whose test split a stage is looked at by, and the first few of its examples, or as many as it has."""
  try:
    source = mixture.shown(stage.data.source)
    examples = readable(source, range(len(source)), SHOWN)
    if not examples:
      raise UserError(f"none of the {len(source)} records in the test split of {source!r} can be read: mend them")
  except UserError as error:
    raise UserError(f"sample_every and evaluate look at the test split: {error}; or set every one to 0") from error
  return source, examples


def _settings(config: ConfigDict, task: str) -> dict[str, Any]:
  """A task's own, without when it is due."""
  return {name: value for name, value in config.evaluate[task].to_dict().items() if name != "every"}


def _write(pipeline: ClipFlow, examples: list[Example], step: int, writer: Writer) -> None:
  """Pictures of a few captions and captions of a few pictures, as far as the stage learns to make them."""
  images, prompts = np.stack([e.image for e in examples]), [e.captions[0] for e in examples if e.captions]
  weights = pipeline.config.objective.weights
  if weights.get("flow") and prompts:
    writer.image(step, "drawn", show.grid(pipeline.draw(prompts), 8, prompts))
    writer.text(step, "prompts", prompts)
  if weights.get("pixels"):
    decoded = pipeline.decode(pipeline.encode(images))
    writer.image(step, "reconstructed", show.grid(decoded, 8))
  if weights.get("language"):
    written = pipeline.caption(images)
    writer.image(step, "read", show.grid(images, 8, written))
    writer.text(step, "captions", written)
