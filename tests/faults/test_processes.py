"""One run, on changing numbers of real processes, stopped and killed on its way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipflow_jax.training import loop
from tests.faults import run

ROOT = Path(__file__).parents[2]


def processes(count: int, workdir: Path, *asked: str) -> subprocess.CompletedProcess:
  script = ["bash", ROOT / "launch" / "local_processes.sh", str(count)]
  command = [*script, sys.executable, "-m", "tests.faults.run", str(workdir), *asked]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "CLIPFLOW_TIMEOUT": "60", "GRACE": "60"}
  return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def metrics(workdir: Path) -> dict[int, dict[str, float]]:
  return {row["step"]: row for row in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())}


def take_rows(workdir: Path, begin: int) -> dict[tuple[int, int], str]:
  """{(step, row): digest} of a run that began after `begin`, of all its processes; their files go."""
  found: dict[tuple[int, int], str] = {}
  for file in workdir.glob("rows.*.jsonl"):
    for i, line in enumerate(file.read_text().splitlines()):
      for row, digest in json.loads(line).items():
        assert found.setdefault((begin + 1 + i, int(row)), digest) == digest
    file.unlink()
  return found


def steps(workdir: Path) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_a_run_is_the_same_on_one_two_or_four_processes_whatever_happens_to_them(tmp_path, monkeypatch):
  # As one process would.
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  whole.mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(run.distributed, "assemble", run.recorded(whole))
    loop.train(run.config(), whole)
  expected, batches = metrics(whole), take_rows(whole, 0)
  assert len(batches) == 8 * run.STEPS

  # Two processes of four devices: one gets SIGTERM, both stop at the same step and save it.
  done = processes(2, parts, "devices=4", "1=stop1")
  assert done.returncode == 0, done.stderr
  stopped = max(steps(parts))
  assert 2 <= stopped < run.STEPS
  assert f"stopped by SIGTERM at step {stopped}" in done.stderr
  assert max(metrics(parts)) == stopped
  seen = take_rows(parts, 0)
  assert seen == {place: digest for place, digest in batches.items() if place[0] <= stopped}

  # Four of one device go on; one is killed, the others say which and end.
  done = processes(4, parts, f"{stopped + 1}=kill2")
  assert done.returncode == 128 + signal.SIGKILL, done.stderr
  assert re.search(r"process 2 of 4 \(pid \d+\) was killed by signal 9", done.stderr)
  assert re.search(r"\[[013]\] clipflow: .*no answer from process 2 of 4 \(host \S+, pid \d+\)", done.stderr)
  assert "has not ended" not in done.stderr
  for (step, row), digest in take_rows(parts, stopped).items():
    assert batches[step, row] == digest

  # One goes on to the end, also from a copy that lies at another place.
  moved = shutil.move(parts, tmp_path / "moved")
  begin = max(steps(moved))
  assert begin >= stopped
  with monkeypatch.context() as patch:
    patch.setattr(run.distributed, "assemble", run.recorded(moved))
    loop.train(run.config(), moved)
  assert take_rows(moved, begin) == {place: digest for place, digest in batches.items() if place[0] > begin}
  found = metrics(moved)
  assert found.keys() == expected.keys()
  for step, row in expected.items():
    np.testing.assert_allclose(found[step]["loss"], row["loss"], rtol=1e-6, atol=0, err_msg=f"step {step}")
