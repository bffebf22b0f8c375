"""The shards of `clipflow prepare` on Apache Beam, where one machine is not enough."""

from __future__ import annotations

from collections.abc import Sequence

from clipflow_jax.data.shard import Job
from clipflow_jax.errors import UserError


def write(job: Job, options: Sequence[str]) -> None:
  """Writes every shard that is not complete, wherever Beam's runner puts it; job.folder is one that all workers see.

  options: Beam's own, such as ["--runner=DirectRunner", "--direct_num_workers=4"]. Needs the [prepare] extra.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError("a Beam runner needs apache-beam: pip install 'clipflow_jax[prepare]'") from error
  missing = [number for number in range(len(job)) if job.part(number) is None]
  with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
    numbers = pipeline | beam.Create(missing) | beam.Reshuffle()  # or one worker would write all
    _ = numbers | beam.Map(lambda number: job.write(number)["seen"])
