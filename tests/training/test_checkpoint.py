from __future__ import annotations

import functools
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import absl.logging
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipflow_jax.errors import UserError
from clipflow_jax.training import checkpoint
from clipflow_jax.training.checkpoint import Checkpoints, load
from tests.benchmarks.import_memory import resident

META = {
  "config": {"model": {"width": 8}, "name": None},
  "tokenizer": {"tokenizer.json": '{"version": "1.0"}'},
}
OPTIMIZERS = {
  "adamw": optax.adamw(1e-3),
  "muon": optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(1e-3)),
  "accumulated": optax.MultiSteps(optax.adamw(1e-3), every_k_schedule=2),
}
UPDATES = {name: jax.jit(tx.update) for name, tx in OPTIMIZERS.items()}


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any
  seed: jax.Array


@functools.cache
def make_state(step: int, *, optimizer: str = "adamw", ema: bool = True, width: int = 8) -> State:
  rng = np.random.default_rng(step)
  params = {
    "layers": {"kernel": jnp.asarray(rng.normal(size=(2, width, width)), jnp.float32)},
    "embedding": jnp.asarray(rng.normal(size=(16, width)), jnp.bfloat16),
  }
  # One update, so that the moments are not zero.
  _, opt_state = UPDATES[optimizer](params, OPTIMIZERS[optimizer].init(params), params)
  return State(jnp.int32(step), params, params if ema else None, opt_state, jnp.uint32(7))


def abstract(state: State) -> State:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_identical(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(directory: Path, *steps: int, keep: int = 2, **kwargs: Any) -> None:
  checkpoints = Checkpoints(directory, keep=keep)
  for step in steps:
    checkpoints.save(step, make_state(step, **kwargs), data_state={"next": step}, meta=META)
  checkpoints.close()


def files(step: Path) -> list[Path]:
  return sorted(path for path in step.rglob("*") if path.is_file())


def largest_file(step: Path) -> Path:
  return max(files(step), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("optimizer, ema", [("adamw", True), ("muon", False), ("accumulated", True)])
def test_a_round_trip_is_bitwise(tmp_path: Path, optimizer: str, ema: bool):
  state = make_state(3, optimizer=optimizer, ema=ema)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state, data_state={"next": [1, 2]}, meta=META)
  restored = checkpoints.restore(abstract(state))
  checkpoints.close()
  assert restored is not None
  assert restored.step == 3 and restored.data_state == {"next": [1, 2]} and restored.meta == META
  assert_identical(restored.state, state)


def test_a_run_without_checkpoints_restores_nothing(tmp_path: Path):
  checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
  assert checkpoints.restore(abstract(make_state(0))) is None
  assert checkpoints.latest_step() is None
  checkpoints.close()


def test_the_newest_are_kept(tmp_path: Path):
  save(tmp_path, 1, 2, 5, 11, keep=2)
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [5, 11]
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.latest_step() == 11
  checkpoints.close()


def test_multiples_stay_beside_the_newest_also_after_a_restart(tmp_path: Path):
  for steps in ((2, 4, 6), (8, 10, 12, 14)):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in steps:
      checkpoints.save(step, make_state(step), data_state={}, meta=META)
    checkpoints.close()
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 12, 14]


def test_a_kept_step_is_read_by_its_folder_though_there_are_newer_ones(tmp_path: Path):
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, keep_every=2)
  for step in (2, 3):
    checkpoints.save(step, make_state(step), data_state={}, meta=META | {"step": step})
  checkpoints.close()
  kept = tmp_path / "checkpoints" / "2"
  assert (load(tmp_path).step, load(kept).step, checkpoint.described(kept)["step"]) == (3, 2, 2)
  assert_identical(load(kept, ("params",)).state["params"], jax.device_get(make_state(2).params))


def test_a_step_being_saved_is_the_latest(tmp_path: Path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(4, make_state(4), data_state={}, meta={})
  assert checkpoints.latest_step() == 4
  checkpoints.close()


def test_what_is_saved_may_be_donated_and_changed_at_once(tmp_path: Path):
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  tree, data_state = {"w": [jnp.zeros((512, 512)) for _ in range(4)]}, {"next": 0}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, tree, data_state=data_state, meta={})
  data_state["next"] = 1
  target = abstract(tree)
  for _ in range(5):
    tree = step(tree)
  restored = checkpoints.restore(target)
  checkpoints.close()
  assert restored is not None and restored.data_state == {"next": 0}
  assert all(not np.asarray(w).any() for w in restored.state["w"])


def test_what_is_not_json_is_refused_by_save(tmp_path: Path):
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(TypeError, match="JSON"):
    checkpoints.save(1, make_state(1), data_state={"next": object()}, meta={})
  checkpoints.close()


def test_a_failed_save_is_raised_by_the_next(tmp_path: Path):
  """A limit on the size of files stands for the full disk."""
  checkpoints = Checkpoints(tmp_path)
  state = make_state(1, width=256)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
  try:
    checkpoints.save(1, state, data_state={}, meta={})
    with pytest.raises(RuntimeError, match=r"step 1 could not be written to .*File too large"):
      checkpoints.save(2, state, data_state={}, meta={})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert checkpoints.latest_step() is None
  checkpoints.save(2, state, data_state={}, meta={})
  checkpoints.close()
  assert load(tmp_path, ("step",)).step == 2


def test_a_save_that_is_done_leaves_no_thread_and_no_open_file(tmp_path: Path):
  """Of a long run they would be thousands, and a process may open some 1,000 files."""

  def held() -> tuple[int, int]:
    checkpoints.wait()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))

  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, make_state(1), data_state={}, meta={})
  threads, files = held()
  for step in (2, 3, 4):
    checkpoints.save(step, make_state(1), data_state={}, meta={})
  assert held()[0] <= threads and held()[1] <= files
  checkpoints.close()


def test_a_save_gives_free_memory_back_to_the_system(tmp_path: Path):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, make_state(1), data_state={}, meta={})
  checkpoints.wait()
  texts = [f"{i:2000d}" for i in range(100_000)]
  full = resident("VmRSS")
  del texts[:-1]  # the last one keeps glibc from shortening its heap
  checkpoints.save(2, make_state(1), data_state={}, meta={})
  assert full - resident("VmRSS") > 100e6  # of 200; the save under way takes some
  checkpoints.close()


def test_saving_and_restoring_are_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd):
  before = absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.INFO)
  try:
    with caplog.at_level(logging.DEBUG):
      save(tmp_path, 1, 2, 3)
      load(tmp_path)
      absl.logging.info("of another")
  finally:
    absl.logging.set_verbosity(before)
  assert [record.getMessage() for record in caplog.records if record.name == "absl"] == ["of another"]
  assert "orbax" not in "".join(capfd.readouterr())


DAMAGES = {
  "arrays truncated": lambda step: os.truncate(largest_file(step / "state"), 100),
  "arrays deleted": lambda step: largest_file(step / "state").unlink(),
  "index zeroed": lambda step: (step / "state" / "manifest.ocdbt").write_bytes(bytes(100)),
  "description deleted": lambda step: (step / "state" / "_METADATA").unlink(),
  "description truncated": lambda step: os.truncate(step / "state" / "_METADATA", 50),
  "state deleted": lambda step: shutil.rmtree(step / "state"),
  "data deleted": lambda step: (step / "data" / "data.json").unlink(),
  "meta truncated": lambda step: os.truncate(step / "meta" / "data.json", 5),
  "everything deleted": lambda step: [shutil.rmtree(path) for path in step.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_falls_back_to_the_one_before(tmp_path: Path, caplog, damage: str):
  save(tmp_path, 1, 2)
  DAMAGES[damage](tmp_path / "2")
  checkpoints = Checkpoints(tmp_path)
  restored = checkpoints.restore(abstract(make_state(2)))
  assert restored is not None and restored.step == 1 and restored.data_state == {"next": 1}
  assert_identical(restored.state, make_state(1))
  warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
  assert len(warnings) == 1 and f"{tmp_path / '2'} is damaged" in warnings[0]

  # The damaged files stay to be looked at, out of the way of the run, which writes its step 2 again.
  assert (tmp_path / "2.damaged").is_dir() and checkpoints.latest_step() == 1
  checkpoints.save(2, make_state(2), data_state={"next": 2}, meta=META)
  restored = checkpoints.restore(abstract(make_state(2)))
  checkpoints.close()
  assert restored is not None and restored.step == 2


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
  directory = tmp_path_factory.mktemp("two_steps")
  save(directory, 1, 2, width=64)
  return directory


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_missing_or_short_file_never_yields_wrong_arrays(two_steps: Path, tmp_path_factory, data):
  directory = tmp_path_factory.mktemp("damaged") / "checkpoints"
  shutil.copytree(two_steps, directory)
  victim = data.draw(st.sampled_from(files(directory / "2")))
  fraction = data.draw(st.floats(0, 1, exclude_max=True))
  os.truncate(victim, int(victim.stat().st_size * fraction)) if fraction else victim.unlink()
  checkpoints = Checkpoints(directory)
  restored = checkpoints.restore(abstract(make_state(1, width=64)))
  checkpoints.close()
  assert restored is not None and restored.data_state == {"next": restored.step} and restored.meta == META
  assert_identical(restored.state, make_state(restored.step, width=64))


def test_nothing_but_damaged_steps_is_a_user_error(tmp_path: Path):
  save(tmp_path, 1, 2, width=64)
  for step in (1, 2):
    os.truncate(largest_file(tmp_path / str(step) / "state"), 10)
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(UserError, match=r"no readable checkpoint: .*2, .*1 cannot be read .* of \d+ bytes") as error:
    checkpoints.restore(abstract(make_state(1, width=64)))
  checkpoints.close()
  assert "\n" not in str(error.value)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # nothing was touched


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda s: s.replace(params=s.params | {"embedding": jax.ShapeDtypeStruct((17, 8), jnp.bfloat16)}),
      r"params/embedding is bfloat16\[16, 8\] there and bfloat16\[17, 8\] here",
    ),
    (
      lambda s: s.replace(params=s.params | {"embedding": jax.ShapeDtypeStruct((16, 8), jnp.float32)}),
      r"params/embedding is bfloat16\[16, 8\] there and float32\[16, 8\] here",
    ),
    (
      lambda s: s.replace(params=s.params | {"head": jax.ShapeDtypeStruct((3,), jnp.float32)}),
      r"params/head is absent there and float32\[3\] here",
    ),
    (lambda s: s.replace(ema=None), r"ema/embedding is bfloat16\[16, 8\] there and absent here"),
    (
      lambda s: s.replace(opt_state=abstract(make_state(1, optimizer="muon")).opt_state),
      r"opt_state/\S+ is .* \(and \d+ more\)",
    ),
  ],
)
def test_another_tree_is_a_user_error_that_names_the_leaf(tmp_path: Path, change, message: str):
  save(tmp_path, 1, 2)
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(UserError, match=message):
    checkpoints.restore(change(abstract(make_state(2))))
  checkpoints.close()
  assert (tmp_path / "2").is_dir()


KILLED = """
import os, signal, sys
import jax, numpy as np
from clipflow_jax.training.checkpoint import Checkpoints

split = jax.NamedSharding(jax.make_mesh((4,), ("data",)), jax.P("data"))
checkpoints = Checkpoints(sys.argv[1])
rows = np.arange(64, dtype=np.float32).reshape(8, 8)
checkpoints.save(1, {"rows": jax.device_put(rows, split)}, data_state={"next": 1}, meta={})
checkpoints.wait()
noise = np.random.default_rng(0).normal(size=(8, 1 << 21)).astype(np.float32)
checkpoints.save(2, {"rows": jax.device_put(noise, split)}, data_state={"next": 2}, meta={})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """What a process with four devices leaves: a step split over them, and a second one it was killed in."""
  directory = tmp_path_factory.mktemp("killed")
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
  }
  done = subprocess.run([sys.executable, "-c", KILLED, str(directory)], env=environment, capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()
  return directory


def test_a_killed_save_leaves_the_step_before_it_on_fewer_devices(killed: Path, tmp_path: Path):
  assert (killed / "2.orbax-checkpoint-tmp").is_dir(), "the process was killed too late to test anything"
  assert load(killed, ("rows",)).step == 1
  directory = tmp_path / "checkpoints"
  shutil.copytree(killed, directory)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  checkpoints = Checkpoints(directory)
  restored = checkpoints.restore({"rows": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=here)})
  assert restored is not None and restored.step == 1 and restored.data_state == {"next": 1}
  assert restored.state["rows"].sharding == here
  np.testing.assert_array_equal(restored.state["rows"], np.arange(64).reshape(8, 8))
  checkpoints.save(2, restored.state, data_state={}, meta={})
  checkpoints.close()
  assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]


def test_load_reads_the_parts_asked_for_and_no_others(tmp_path: Path):
  def bytes_read() -> int:
    return ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]

  save(tmp_path, 1, width=512)
  before = bytes_read()
  read = load(tmp_path, ("ema", "step"))
  ema = make_state(1, width=512).ema
  assert bytes_read() - before < 1.2 * sum(x.nbytes for x in jax.tree.leaves(ema))
  assert read.step == 1 and read.meta == META and set(read.state) == {"ema", "step"}
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(read.state))
  assert_identical(read.state["ema"], ema)


def test_load_gives_none_for_an_average_that_was_not_kept(tmp_path: Path):
  save(tmp_path, 1, ema=False)
  assert load(tmp_path).state == {"ema": None}
  read = load(tmp_path, ("ema", "params"))
  assert read.state["ema"] is None
  assert_identical(read.state["params"], make_state(1).params)


@pytest.mark.parametrize("where, step", [(".", 2), ("checkpoints", 2), ("checkpoints/1", 1)])
def test_load_takes_a_workdir_its_checkpoints_or_one_step(tmp_path: Path, where: str, step: int):
  save(tmp_path / "checkpoints", 1, 2)
  assert load(tmp_path / where).step == step


def test_load_falls_back_and_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
  save(tmp_path, 1, 2)
  largest_file(tmp_path / "2" / "state").unlink()
  assert load(tmp_path).step == 1
  assert "2 is damaged" in caplog.text
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_run_is_described_by_the_newest_step_that_can_tell(tmp_path: Path):
  save(tmp_path / "checkpoints", 1, 2)
  assert checkpoint.described(tmp_path) == META and checkpoint.steps(tmp_path) == [2, 1]
  os.truncate(tmp_path / "checkpoints" / "2" / "meta" / "data.json", 5)
  assert checkpoint.described(tmp_path) == META
  (tmp_path / "checkpoints" / "1" / "meta" / "data.json").unlink()
  with pytest.raises(UserError, match="no readable checkpoint in"):
    checkpoint.described(tmp_path)


def test_load_says_what_is_wrong_with_a_path(tmp_path: Path):
  with pytest.raises(UserError, match="no checkpoint in .*nowhere: give a workdir"):
    load(tmp_path / "nowhere")
  with pytest.raises(UserError, match="no checkpoint in"):
    load(tmp_path)
  save(tmp_path, 7)
  with pytest.raises(UserError, match="has no 'average': ask for some of ema, opt_state, params, seed, step"):
    load(tmp_path, ("average",))
  os.truncate(largest_file(tmp_path / "7" / "state"), 10)
  with pytest.raises(UserError, match="no readable checkpoint: .*7 cannot be read"):
    load(tmp_path / "7")
