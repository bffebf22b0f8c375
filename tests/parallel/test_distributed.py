from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import distributed

ROOT = Path(__file__).parents[2]


# Who there is.


def plain(coordinator: str = "10.0.0.1:8476", processes: str = "4", process: str = "3") -> dict[str, str]:
  return dict(zip(distributed.PLAIN, (coordinator, processes, process)))


def test_plain_variables_say_who_this_is():
  assert distributed.environment(plain()) == dict(
    coordinator_address="10.0.0.1:8476", num_processes=4, process_id=3, cluster_detection_method="deactivate"
  )


def test_one_process_needs_no_others():
  assert distributed.environment({"JAX_PLATFORMS": "cpu"}) is None
  assert distributed.environment(plain(processes="1", process="0")) is None
  assert distributed.environment({"JAX_PLATFORMS": "cpu", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}) is None


def test_a_task_of_slurm_asks_slurm_and_the_shell_of_an_allocation_does_not():
  task = {"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "n[1-2]", "JAX_PLATFORMS": "cpu"}
  assert distributed.environment(task) == {"cluster_detection_method": "slurm"}
  assert distributed.environment({"SLURM_NTASKS": "16", "JAX_PLATFORMS": "cpu"}) is None


def test_plain_variables_come_before_those_of_a_cluster():
  found = distributed.environment(plain() | {"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "n[1-2]"})
  assert found["num_processes"] == 4


def test_half_an_address_is_refused():
  given = plain()
  del given["CLIPFLOW_PROCESS"]
  with pytest.raises(UserError, match="CLIPFLOW_COORDINATOR, CLIPFLOW_PROCESSES is set but CLIPFLOW_PROCESS is not"):
    distributed.environment(given)


@pytest.mark.parametrize(
  "wrong",
  [
    dict(coordinator="host"),
    dict(coordinator="host:port"),
    dict(processes="all"),
    dict(process="4"),
    dict(process="-1"),
  ],
)
def test_an_address_that_is_none_is_refused_with_what_it_should_be(wrong):
  with pytest.raises(UserError, match="give HOST:PORT, a number of processes and this one's number from 0"):
    distributed.environment(plain(**wrong))


@pytest.mark.parametrize("value", ["soon", "4", "-1"])
def test_a_timeout_that_is_none_is_refused(value):
  with pytest.raises(UserError, match=f"CLIPFLOW_TIMEOUT={value}: give whole seconds, at least 5"):
    distributed._timeout({"CLIPFLOW_TIMEOUT": value})


# One process: the plain thing.


def test_on_one_process_nothing_is_waited_for_and_errors_are_the_callers(monkeypatch):
  for name in distributed.PLAIN:
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ZeroDivisionError), distributed.joined():
    distributed.barrier("here")
    distributed.agree("mind", "one")
    distributed.share(Path("nowhere"))
    assert distributed.gather({"a": 1}) == {"a": 1}
    1 / 0  # noqa: B018


def test_sigterm_is_remembered_and_the_handler_before_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with distributed.termination() as stop:
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop() and stop()
  assert signal.getsignal(signal.SIGTERM) is before


COMPILES = """
import ctypes, signal
from clipflow_jax.parallel import distributed
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with distributed.termination():
  print("compiles", flush=True)
  for _ in range(2):
    libc.pthread_mutex_lock(lock)  # the second time for ever, and without a look at what Python has heard
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_before_the_first_step_ends_the_process_at_once_and_says_so(number: signal.Signals, code: int):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  with subprocess.Popen([sys.executable, "-c", COMPILES], env=environment, **pipes) as process:
    try:
      assert process.stdout.readline() == "compiles\n", process.stderr.read()
      process.send_signal(number)
      said = process.communicate(timeout=20)[1]
    finally:
      process.kill()
  assert process.returncode == code
  assert f"clipflow: ended: {number.name} before the first step, with nothing to save; the same command begins" in said


# Arrays of all processes.


class Held:
  """A sharding of which this process has the given rows."""

  def __init__(self, *places: slice):
    self.places = places

  def addressable_devices_indices_map(self, shape):
    return {f"device {i}": (place,) for i, place in enumerate(self.places)}


def test_the_rows_here_are_those_of_all_devices_once_and_in_order():
  assert distributed.rows_here(Held(slice(4, 6), slice(0, 2), slice(4, 6)), 8).tolist() == [0, 1, 4, 5]
  assert distributed.rows_here(Held(slice(None)), 3).tolist() == [0, 1, 2]


def test_a_batch_is_put_together_of_the_rows_that_are_here():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  whole = {"a": np.arange(12).reshape(4, 3), "b": np.arange(4.0)}
  made = distributed.assemble(whole, np.arange(4), 4, dict.fromkeys(whole, sharding))
  assert all(isinstance(leaf, jax.Array) for leaf in made.values())
  assert all(np.array_equal(made[name], whole[name]) for name in whole)
  assert np.array_equal(distributed.place(whole["a"], sharding), whole["a"])


# Two processes, through the script.

PROGRAM = """
import os, sys, time
from pathlib import Path
from clipflow_jax.errors import UserError
from clipflow_jax.parallel import distributed
with distributed.joined():
  import jax
  me = jax.process_index()
  assert jax.process_count() == 2 and distributed.gather({str(me): me, "both": 7}) == {"0": 0, "1": 1, "both": 7}
  try:
    distributed.agree("number", str(me))
  except UserError as error:
    print(error, flush=True)
  distributed.share(Path(sys.argv[2]))
  own = Path(sys.argv[2], str(me))
  own.mkdir()
  try:
    distributed.share(own, patience=0.1)
  except UserError as error:
    print(error, flush=True)
  assert me or not [path for path in Path(sys.argv[2]).rglob("*") if path.is_file()]  # process 0 tidies up
  if sys.argv[1] == "late":
    if me == 1:
      time.sleep(600)
    distributed.barrier("breakfast", 2)
  if sys.argv[1] == "wrong" and me == 1:
    raise UserError("this host has no data")
  if sys.argv[1] == "wrong":
    time.sleep(600)
"""


def two(mood: str, folder: Path) -> subprocess.CompletedProcess:
  command = ["bash", ROOT / "launch" / "local_processes.sh", "2", sys.executable, "-c", PROGRAM, mood, folder]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "GRACE": "60"}
  return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


SECOND = r"process 1 of 2 \(host \S+, pid \d+\)"


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> subprocess.CompletedProcess:
  return two("late", tmp_path_factory.mktemp("late"))


@pytest.mark.slow
def test_who_does_not_come_to_a_barrier_is_named_and_all_end(late):
  assert late.returncode == 1, late.stderr
  assert re.search(rf"TimeoutError: 1 of 2 processes did not come to 'breakfast' in 2 s: {SECOND}", late.stderr)
  assert len(re.findall(r"\[\d\] clipflow: process 0 of 2 .* failed: TimeoutError", late.stderr)) == 2  # both say so


@pytest.mark.slow
def test_who_has_another_value_or_another_folder_is_named_by_both(late):
  assert len(re.findall(rf"the number of {SECOND} differs from that of process 0", late.stdout)) == 2
  assert len(re.findall(rf"{SECOND} cannot see what process 0 wrote into \S+/0: give all the same", late.stdout)) == 2


@pytest.mark.slow
def test_a_mistake_on_one_process_ends_both_with_its_one_line(tmp_path):
  done = two("wrong", tmp_path)
  assert done.returncode in (1, 2), done.stderr
  assert (
    len(re.findall(r"\[\d\] clipflow: process 1 of 2 .* failed: UserError: this host has no data", done.stderr)) == 2
  )
  assert "Traceback" not in done.stderr
