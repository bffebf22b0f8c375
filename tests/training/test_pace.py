"""Nothing compiles and nothing waits between two logs of a run."""

from __future__ import annotations

import logging

import jax
import pytest

from clipflow_jax.training import loop
from tests import tiny_runs

ARRAY = type(jax.numpy.zeros(()))


@pytest.fixture(scope="module")
def marks(tmp_path_factory) -> dict[int, tuple[int, int]]:
  """Of a run that logs at steps 3 and 6: {step: (programs compiled, arrays read by the host) until its end}."""
  found, compiled, read = {}, [], []

  class Count(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      if "Finished XLA compilation" in record.getMessage():
        compiled.append(record.getMessage())

  value = ARRAY._value  # what every way to read an array goes through; on a CPU no transfer guard sees it

  def sample(model, config, params, chat, step, writer, due):
    found[step] = (len(compiled), len(read))

  logger, handler = logging.getLogger("jax"), Count()
  logger.addHandler(handler)
  try:
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
      patch.setattr(ARRAY, "_value", property(lambda self: (read.append(1), value.fget(self))[1]))
      loop.train(tiny_runs.decoder_stage(steps=6, log_every=3, sample_every=1), tmp_path_factory.mktemp("pace"), sample)
  finally:
    logger.removeHandler(handler)
  return found


def test_nothing_is_compiled_after_the_second_step(marks):
  assert marks[1][0] > 0
  assert [marks[step][0] for step in (3, 4, 5, 6)] == [marks[2][0]] * 4


def test_the_host_reads_nothing_between_logs(marks):
  assert marks[2][1] == marks[1][1] and marks[5][1] == marks[4][1] == marks[3][1]
  assert marks[3][1] > marks[2][1]  # a log does read
