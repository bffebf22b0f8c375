from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import kills

ROOT = Path(__file__).parents[2]
LIVES = 21


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_random_points_goes_on_each_time_from_its_last_whole_save(tmp_path):
  command = [sys.executable, "-m", "tests.faults.kills", str(tmp_path), str(LIVES)]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  lives = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lives) == LIVES and lives[0]["restored"] == 0
  for before, after in itertools.pairwise(lives):
    begun = before["saving"] or before["restored"]  # the newest save that had begun
    # Lost are the steps since then and, if it was still being written or has been damaged, one interval more.
    lost_saves = 1 + before["damaged"]
    assert begun - lost_saves * kills.EVERY <= after["restored"] <= begun + kills.EVERY, (before, after)
    assert after["restored"] % kills.EVERY == 0
  assert lives[-1]["restored"] > 0
  damaged = [(before, after) for before, after in itertools.pairwise(lives) if before["damaged"]]
  assert len(damaged) >= 2
  assert len(list((tmp_path / "checkpoints").glob("*.damaged"))) > 0
  assert done.stderr.count("is damaged and passed over") == len(damaged)
