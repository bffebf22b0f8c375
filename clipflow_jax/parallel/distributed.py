"""The processes of one run: how they find each other, share arrays, wait for each other and end together.

All of them run the same program; only process 0 speaks and writes. On one process every function here is a no-op
or the plain thing. JAX has no public door to its coordination service (names, barriers): `_service` is the one place
that reaches behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipflow_jax.errors import UserError

PyTree = Any

log = logging.getLogger(__name__)

PLAIN = ("CLIPFLOW_COORDINATOR", "CLIPFLOW_PROCESSES", "CLIPFLOW_PROCESS")
TIMEOUT = "CLIPFLOW_TIMEOUT"  # seconds after which a silent process is taken for dead, 100 by default
ANSWER = 5.0  # seconds that processes have to say that they are alive once one has failed
_NAMES, _FAILED, _ANSWERS, _ARRIVED = (f"clipflow/{key}" for key in ("names", "failed", "answers", "arrived"))
_barriers = itertools.count()  # all processes come to the same barriers in the same order
_asked = itertools.count()  # and ask as often whether to stop


def environment(variables: Mapping[str, str]) -> dict[str, Any] | None:
  """What `jax.distributed.initialize` must be told, or None where there is one process.

  CLIPFLOW_COORDINATOR=HOST:PORT, CLIPFLOW_PROCESSES=N and CLIPFLOW_PROCESS=0..N-1 come first (plain machines, GPU jobs
  of GKE, `launch/local_processes.sh`); then SLURM's and the TPU's (a pod's VMs, GKE), which JAX reads itself.
  """
  given = {name: variables[name] for name in PLAIN if variables.get(name)}
  if given:
    missing = [name for name in PLAIN if name not in given]
    if missing:
      raise UserError(f"{', '.join(given)} is set but {', '.join(missing)} is not: set all three, or none")
    address, port = given[PLAIN[0]], given[PLAIN[0]].rpartition(":")[2]
    try:
      count, index = int(given[PLAIN[1]]), int(given[PLAIN[2]])
    except ValueError:
      count, index = 0, 0
    if ":" not in address or not port.isdigit() or not 0 <= index < count:
      raise UserError(
        f"{' '.join(f'{name}={value}' for name, value in given.items())}: "
        "give HOST:PORT, a number of processes and this one's number from 0"
      )
    if count == 1:
      return None
    return dict(
      coordinator_address=address, num_processes=count, process_id=index, cluster_detection_method="deactivate"
    )
  # Under srun: the shell of salloc has no step.
  if int(variables.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in variables:
    return dict(cluster_detection_method="slurm")
  platforms = variables.get("JAX_PLATFORMS", "")
  chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
  if (not platforms or "tpu" in platforms) and chips and importlib.util.find_spec("libtpu"):
    return {}  # JAX asks the VM's metadata or GKE's variables; a single host is a run of one process
  return None


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Joins this process to the others of its run for what is inside. Enter before anything uses a device.

  When one of them fails, all end within seconds, naming it and those that no longer answer; a process that is killed
  without a word is found after CLIPFLOW_TIMEOUT seconds by JAX, which ends the others with its number.
  """
  where = environment(os.environ)
  if where is None:
    yield
    return
  timeout = _timeout(os.environ)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  log.info("joins the other processes of the run%s", f" {_plain(where)}" if "process_id" in where else "")
  jax.distributed.initialize(**where, heartbeat_timeout_seconds=timeout, shutdown_timeout_seconds=timeout)
  own = f"host {socket.gethostname()}, pid {os.getpid()}"
  _service().client.key_value_set(f"{_NAMES}/{_service().process_id}", own)
  if _service().process_id > 0:
    logging.getLogger("clipflow_jax").setLevel(logging.WARNING)
  watch = threading.Thread(target=_end_with_others, name="clipflow-processes", daemon=True)
  try:
    barrier("start", timeout)
    for i in range(_service().num_processes):
      log.info("%s", name(i))
    watch.start()
    yield
    barrier("end", timeout)
  except BaseException as error:
    if isinstance(error, SystemExit) and not error.code:
      barrier("end", timeout)
      raise
    if not isinstance(error, UserError):
      traceback.print_exc()
    why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    end(why, 2 if isinstance(error, UserError) else 1)
  finally:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the other processes set it too
      _service().client.key_value_set(_FAILED, "")
    watch.join()
    jax.distributed.shutdown()


def name(process: int) -> str:
  """Who that is, as in "process 1 of 4 (host pod-w1, pid 77)"."""
  known = dict(_entries(_NAMES))
  return f"process {process} of {_service().num_processes} ({known.get(process, 'never seen')})"


def barrier(what: str, timeout: float = 600.0) -> None:
  """Waits until every process is here. TimeoutError after `timeout` seconds names those that are not."""
  if _service().client is None:
    return
  key = f"{_ARRIVED}/{next(_barriers)} {what}"
  _service().client.key_value_set(f"{key}/{_service().process_id}", "")
  try:
    _service().client.wait_at_barrier(key, int(1000 * timeout))
  except jax.errors.JaxRuntimeError as error:
    missing = sorted(set(range(_service().num_processes)) - {process for process, _ in _entries(key)})
    if not missing:  # the barrier has failed for another reason
      raise
    who = "; ".join(map(name, missing))
    raise TimeoutError(
      f"{len(missing)} of {_service().num_processes} processes did not come to {what!r} in {timeout:g} s: {who}"
    ) from error


@contextlib.contextmanager
def termination() -> Iterator[Callable[[], int]]:
  """A function that says, once a step, which signal asks to stop, or 0: SIGTERM, to this process or to any other.

  One process alone also heeds its first Ctrl-C so (SIGINT); a second one ends it at once. Many processes agree in the
  background on one step to stop at, so all of them must ask equally often. The signal is only remembered; what is
  inside acts between steps. Before it is first asked there is nothing to keep: as `_ending_at_once`.
  """
  seen: list[int] = []
  with contextlib.ExitStack() as before_steps:
    if threading.current_thread() is threading.main_thread():
      before_steps.enter_context(_ending_at_once())
    if jax.process_count() > 1:  # JAX's own handler of SIGTERM has been there since `joined`

      def agreed() -> int:
        before_steps.close()
        if not seen and multihost_utils.reached_preemption_sync_point(next(_asked)):  # true at that one step only
          seen.append(signal.SIGTERM)
        return seen[0] if seen else 0

      yield agreed
      return
    if threading.current_thread() is not threading.main_thread():  # the caller owns signals
      yield lambda: 0
      return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))}

    def interrupted(number: int, _: Any) -> None:
      seen.append(number)
      signal.signal(number, before[signal.SIGINT])
      print("clipflow: stops after this step and its checkpoint; Ctrl-C again to stop at once", file=sys.stderr)

    def asked() -> int:
      before_steps.close()
      if signal.SIGINT not in before:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupted)
      return seen[0] if seen else 0

    try:
      yield asked
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
  """Inside, SIGINT and SIGTERM end the process and all others of the run, with code 130 and 0, saying so.

  Python runs its handlers in the main thread, which hears nothing while it compiles, for minutes: here a thread hears
  what Python writes of each signal that has a handler of its own (of many processes SIGTERM has JAX's). At a prompt,
  such as a notebook's, Ctrl-C does what it always does.
  """
  if hasattr(sys, "ps1"):
    yield
    return
  hears, told = socket.socketpair()
  told.setblocking(False)  # as Python wants it

  def hear() -> None:
    while heard := hears.recv(1):
      if (number := heard[0]) in (signal.SIGINT, signal.SIGTERM):
        why = (
          f"{signal.Signals(number).name} before the first step, with nothing to save; the same command begins again"
        )
        end(why, 0 if number == signal.SIGTERM else 130)

  before = signal.set_wakeup_fd(told.fileno())
  thread = threading.Thread(target=hear, name="clipflow-signals", daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    told.close()  # at which the thread ends
    thread.join()
    hears.close()


# Arrays and values of all processes.


def rows_here(sharding: jax.sharding.Sharding, rows: int) -> np.ndarray:
  """i64[r]: which of a batch's `rows` lie on devices of this process, ascending."""
  places = sharding.addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[index] for index in places]))


def assemble(local: PyTree, rows: np.ndarray, total: int, shardings: PyTree) -> PyTree:
  """Global arrays [total,...] of what each process has.

  local: leaves [r,...], which are the global rows `rows`, ascending; all that lie on devices of this process are among
  them. shardings: a tree like `local`.
  """

  def leaf(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    def part(index):
      start, stop, _ = index[0].indices(total)
      first = int(np.searchsorted(rows, start))
      return value[(slice(first, first + stop - start), *index[1:])]

    return jax.make_array_from_callback((total, *value.shape[1:]), sharding, part)

  return jax.tree.map(leaf, local, shardings)


def place(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """The global array of a value that every process has whole."""
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(tree: PyTree) -> PyTree:
  """Global arrays, in the host memory of every process, whole."""
  return multihost_utils.process_allgather(tree, tiled=True)


def gather(own: Mapping[str, Any]) -> dict[str, Any]:
  """The union of a small JSON dict of every process; where they share a key they have the same value."""
  if jax.process_count() == 1:
    return dict(own)
  data = np.frombuffer(json.dumps(dict(own)).encode(), np.uint8)
  longest = int(multihost_utils.process_allgather(np.asarray(len(data))).max())
  room = -(-longest // 1024) * 1024  # few different shapes, for each is compiled
  padded = np.full(room, ord(" "), np.uint8)
  padded[: len(data)] = data
  parts = multihost_utils.process_allgather(padded)
  return {key: value for part in parts for key, value in json.loads(part.tobytes()).items()}


def agree(what: str, value: str) -> None:
  """UserError, naming them, when some processes have another value than process 0."""
  digest = hashlib.sha256(value.encode()).hexdigest()
  found = gather({str(jax.process_index()): digest})
  others = [name(int(i)) for i, theirs in found.items() if theirs != found["0"]]
  if others:
    raise UserError(f"the {what} of {', '.join(others)} differs from that of process 0: start all with the same")


def share(folder: Path, patience: float = 30.0) -> None:
  """UserError, naming them, when some processes do not see what process 0 puts into a folder that is all theirs.

  Each would go by what it finds there, and wait for ever for others that found something else. patience: seconds that a
  network's file system may need to tell.
  """
  if jax.process_count() == 1:
    return
  first = jax.process_index() == 0
  told = {"folder": str(folder), "mark": f".seen-by-all-{uuid.uuid4().hex}"} if first else {}
  if first:
    (folder / told["mark"]).touch()
  told = gather(told)
  mark = folder / told["mark"]
  end = time.monotonic() + patience
  while not (seen := mark.exists()) and time.monotonic() < end:
    time.sleep(0.5)
  found = gather({str(jax.process_index()): seen})
  if first:
    mark.unlink()
  others = [name(int(i)) for i, theirs in found.items() if not theirs]
  if others:
    raise UserError(
      f"{', '.join(others)} cannot see what process 0 wrote into {told['folder']}: "
      "give all the same --workdir, on a file system that they share"
    )


# Ending together.

_leaving = threading.Lock()  # never released: of two threads that have a reason, the first one gives it


def end(why: str, code: int) -> NoReturn:
  """Ends this process at once, and with it all others of the run, which say why."""
  _leaving.acquire()
  if _service().client is None:
    print(f"clipflow: ended: {why}", file=sys.stderr, flush=True)
    os._exit(code)
  why = f"{name(_service().process_id)} failed: {why}"
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has failed before
    _service().client.key_value_set(_FAILED, why)
  _leave(why, code)


def _end_with_others() -> None:
  """Waits for a process to fail, then ends this one, wherever it stands."""
  try:
    first = _service().client.blocking_key_value_get(_FAILED, 10**10)  # ms: months
  except jax.errors.JaxRuntimeError:
    return  # the service has gone, and JAX says so
  if first:
    _leaving.acquire()
    _leave(first, 1)


def _leave(why: str, code: int) -> NoReturn:
  """Ends the process. An orderly exit would wait minutes for those that will not come."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _service().client.key_value_set(f"{_ANSWERS}/{_service().process_id}", "", allow_overwrite=True)
  silent = set(range(_service().num_processes))
  end = time.monotonic() + ANSWER
  while silent and time.monotonic() < end:
    time.sleep(0.2)
    silent = set(range(_service().num_processes)) - {process for process, _ in _entries(_ANSWERS)}
  lost = f"; no answer from {'; '.join(map(name, sorted(silent)))}: dead or hanging" if silent else ""
  print(f"clipflow: {why}{lost}", file=sys.stderr, flush=True)
  if _service().process_id == 0:
    time.sleep(1)  # the service lives in this process: the others read the same lines first
  os._exit(code)


def _entries(folder: str) -> list[tuple[int, str]]:
  """(process, value) of the keys FOLDER/PROCESS that have been set."""
  return [(int(key.rpartition("/")[2]), value) for key, value in _service().client.key_value_dir_get(f"{folder}/")]


def _service() -> Any:
  """JAX's own view of the run: client, process_id, num_processes. Unlike `jax.process_index` it asks no device."""
  from jax._src import distributed

  return distributed.global_state


def _plain(where: Mapping[str, Any]) -> str:
  return f"as number {where['process_id']} of {where['num_processes']} at {where['coordinator_address']}"


def _timeout(variables: Mapping[str, str]) -> int:
  try:
    timeout = int(variables.get(TIMEOUT, 100))
  except ValueError:
    timeout = 0
  if timeout < 5:
    raise UserError(f"{TIMEOUT}={variables[TIMEOUT]}: give whole seconds, at least 5")
  return timeout
