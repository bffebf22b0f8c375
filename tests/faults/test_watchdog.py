from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

from clipflow_jax.training.faults import HUNG, Watchdog

ROOT = Path(__file__).parents[2]
PROGRAM = """
import time
from clipflow_jax.training.faults import Watchdog

def wait_for_godot(seconds):
  time.sleep(seconds)

with Watchdog(0.2) as dog:
  dog.beat("act one")
  wait_for_godot(1)
print("went on", flush=True)
with Watchdog(0.2, ends=True) as dog:
  dog.beat("act two")
  wait_for_godot(600)
"""


def test_a_step_that_hangs_is_shown_with_all_stacks_and_ends_the_process_only_if_asked():
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", PROGRAM]
  done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
  assert done.returncode == HUNG and done.stdout == "went on\n"
  first, second = done.stderr.split("clipflow: act two")
  assert "clipflow: act one has taken more than 0.2 s; the stacks of all threads:" in first
  assert "wait_for_godot" in first and first.count("the stacks of all threads") == 1  # once for one silence
  assert "wait_for_godot" in second and "clipflow: ended: act two has taken more than 0.2 s" in second


def test_a_watchdog_that_hears_of_every_step_says_nothing_and_leaves_no_thread(capfd):
  with Watchdog(3600) as dog:
    dog.beat("step 1")
  with Watchdog(0.05) as patient:
    patient.beat("an evaluation", math.inf)
    time.sleep(0.3)
  assert not dog._thread.is_alive()
  with Watchdog(0) as asleep:
    asleep.beat("step 1")
  assert capfd.readouterr().err == ""
