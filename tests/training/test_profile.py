"""A trace of some steps of a run, which it leaves as they are."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.training import loop, settings
from clipflow_jax.training.profile import Profile
from tests import tiny_runs
from tests.training.test_loop import assert_identical, metrics


def traced(folder: Path) -> list[int]:
  """The steps that a trace tells of."""
  (file,) = folder.rglob("*.trace.json.gz")
  events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train")


def walk(profile: Profile, steps: range) -> None:
  for number in steps:
    with profile.step(number, jax.numpy.zeros(())):
      pass


def test_the_steps_asked_for_are_traced_and_the_run_is_bit_for_bit_what_it_is_without(tmp_path):
  """Counted from where this process began, here from step 2."""
  loop.train(tiny_runs.decoder_stage(steps=2), tmp_path / "plain")
  shutil.copytree(tmp_path / "plain", tmp_path / "traced")
  plain = loop.train(tiny_runs.decoder_stage(steps=5), tmp_path / "plain")
  asked = dict(profile=dict(first=1, steps=1))
  assert_identical(loop.train(tiny_runs.decoder_stage(steps=5, **asked), tmp_path / "traced"), plain)
  assert traced(tmp_path / "traced" / "profile") == [4]
  assert not (tmp_path / "plain" / "profile").exists()
  assert metrics(tmp_path / "traced") == metrics(tmp_path / "plain")


def test_whatever_ends_the_run_ends_the_trace_and_writes_it(tmp_path):
  with pytest.raises(KeyboardInterrupt), Profile(tmp_path, 1, 10) as profile:
    walk(profile, range(5, 8))
    raise KeyboardInterrupt
  assert traced(tmp_path) == [6, 7]
  with Profile(tmp_path / "next", 0, 1) as profile:  # jax refuses a second trace beside one that goes on
    walk(profile, range(2))
  assert traced(tmp_path / "next") == [0]


def test_a_run_that_ends_before_the_first_step_to_trace_says_so(tmp_path, caplog):
  with Profile(tmp_path / "profile", 3, 1) as profile:
    walk(profile, range(3))
  assert "the run has ended after 3 steps, before the first to be traced" in caplog.text
  assert not (tmp_path / "profile").exists()


def test_only_the_first_process_traces(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with Profile(tmp_path / "profile", 0, 1) as profile:
    walk(profile, range(2))
  assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("fields", [dict(first=-1, steps=1), dict(first=0, steps=-1)])
def test_what_cannot_be_counted_is_refused(fields: dict[str, Any]):
  with pytest.raises(UserError, match=r"profile\.(first|steps) is -1: give 0 or more"):
    settings.check(tiny_runs.decoder_stage(profile=fields))
