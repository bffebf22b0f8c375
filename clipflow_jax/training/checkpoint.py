"""Checkpoints of a run: asynchronous, self-contained, restorable onto any mesh. Only this file knows Orbax.

CHECKPOINTS/STEP/ holds three items: `state` (arrays), `data` (JSON, where the data stream stands) and `meta`
(JSON: config, tokenizer files and whatever else inference needs). Orbax writes a step under a temporary name
and renames it when it is whole, so a killed process leaves nothing half-written under a step's name. What
happens to it later (files missing, truncated, zeroed) is found when reading; a flipped bit inside an array is
not, for Orbax keeps no checksum of array data.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from clipflow_jax.errors import UserError
from clipflow_jax.parallel import distributed

PyTree = Any

log = logging.getLogger(__name__)

# Orbax tells the story of every save and load through absl, and each of its threads logs a failure with a
# traceback of its own. Failures are raised or reported here, once, so its records are dropped; other users of
# absl keep theirs.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


@dataclasses.dataclass(frozen=True)
class Restored:
  """What one checkpoint held."""

  step: int
  state: PyTree  # the state; from `load`, a dict of the parts asked for
  data_state: dict[str, Any]
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run. All processes call every method.

  keep: so many of the newest are kept. keep_every: those of its multiples stay besides, for good; 0: none.
  """

  def __init__(self, directory: Path | str, *, keep: int = 2, keep_every: int = 0):
    """Creates `directory` (workdir/checkpoints) and removes what a killed save left in it."""
    self._directory = _absolute(directory)
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    self._saving: int | None = None
    self._saved: ocp.AsyncResponse[bool] | None = None  # of the save under way
    self._orbax = ocp.training.Checkpointer(
      self._directory,
      context=_context(),
      preservation_policy=policies.AnyPreservationPolicy(kept),
      cleanup_tmp_directories=True,
    )

  def save(self, step: int, state: PyTree, *, data_state: dict[str, Any], meta: dict[str, Any]) -> None:
    """Starts writing a checkpoint and returns; the arrays may be donated right away.

    Waits first for the save under way, so at most one is in memory. Raises RuntimeError when that one failed,
    OSError when the step's folder cannot be made, TypeError when `data_state` or `meta` is not JSON.
    """
    self.wait()
    _give_back()
    # JSON is encoded in the background, after the caller has gone on: copied, and refused, here.
    items = {"state": state, "data": json.loads(json.dumps(data_state)), "meta": json.loads(json.dumps(meta))}
    self._saving = step
    self._saved = self._orbax.save_checkpointables_async(step, items, force=True)

  def restore(self, abstract_state: PyTree) -> Restored | None:
    """The newest readable checkpoint, or None when there is none at all.

    abstract_state: jax.ShapeDtypeStruct leaves with the shardings to restore onto (any mesh).

    A damaged step is reported and the one before it is tried; once that has been read, the damaged one is
    renamed to STEP.damaged, so that the run can write its step again. Raises UserError when every step is
    damaged, or when the saved tree is not the expected one.
    """
    self.wait()
    folders = _steps(self._directory)
    if not folders:
      return None
    restored, damaged = _newest_readable(folders, lambda folder: _read_state(folder, abstract_state))
    self._set_aside(damaged)
    return restored

  def latest_step(self) -> int | None:
    """The newest step that is saved or being saved."""
    latest = self._orbax.latest
    return None if latest is None else latest.step

  def wait(self) -> None:
    """Until the save under way is on disk. Raises RuntimeError when it failed."""
    saved, self._saved = self._saved, None
    try:
      self._orbax.wait()
    except Exception as error:
      raise RuntimeError(
        f"the checkpoint of step {self._saving} could not be written to {self._directory}: {_reason(error)}"
      ) from error
    finally:
      # Orbax waits besides in a thread with an event loop, which ends when it is asked how that went, and not before:
      # each save would leave a thread and three open files.
      if saved is not None:
        with contextlib.suppress(Exception):  # raised above
          saved.result()

  def close(self) -> None:
    """Waits for the save under way, then frees what Orbax holds."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def _set_aside(self, folders: list[epath.Path]) -> None:
    if not folders:
      return
    if jax.process_index() == 0:
      for folder in folders:
        aside = folder.with_name(f"{folder.name}.damaged")
        if aside.exists():
          aside.rmtree()
        folder.rename(aside)
    distributed.barrier("damaged checkpoints set aside")
    self._orbax.reload()


def load(path: Path | str, names: tuple[str, ...] = ("ema",)) -> Restored:
  """Reads parts of a checkpoint's state, and no other arrays, without knowing the tree beforehand.

  path: a workdir, its checkpoints folder (the newest readable step is taken), or one step's folder.
  names: fields of the saved state; "averaged" is its average, or what was trained where the run kept none.

  `state` of the result maps each name to a tree of NumPy arrays (dicts and lists stand for other containers),
  or to None where the run kept none. Nothing is written. Raises UserError when there is no readable
  checkpoint, or when the state has no such field.
  """
  place = _absolute(path)
  folders = _steps(place / "checkpoints") or _steps(place)
  if not folders and place.name.isdigit() and place.is_dir():
    folders = [place]
  if not folders:
    raise UserError(
      f"no checkpoint in {path}: give a workdir with a checkpoints folder, that folder, or one step's folder"
    )
  return _newest_readable(folders, lambda folder: _read_parts(folder, names))[0]


def described(path: Path | str) -> dict[str, Any]:
  """`meta` of the newest step that can tell it, of a path as for `load`. Reads no array, nor need JAX find devices.

  UserError where there is no checkpoint, or no description can be read.
  """
  place = _absolute(path)
  failed: list[Exception] = []
  for folder in _steps(place / "checkpoints") or _steps(place) or [place]:
    try:
      return json.loads((folder / "meta" / "data.json").read_text())
    except (OSError, ValueError) as error:
      failed.append(error)
  raise UserError(f"no readable checkpoint in {path} ({failed[0]}): give the workdir of a run or of an import")


def steps(workdir: Path | str) -> list[int]:
  """The steps that a run has checkpoints of, newest first: damaged ones too, until a resume has set them aside."""
  return [int(folder.name) for folder in _steps(_absolute(workdir) / "checkpoints")]


def shapes(folder: Path | str) -> dict[str, Any]:
  """The state that one step's folder holds, by field: leaves with shape and dtype, no array is read.

  UserError where its description is damaged.
  """
  try:
    return _saved_tree(_absolute(folder))
  except Exception as error:
    raise UserError(f"{folder} does not say what it holds ({_reason(error)}): take another step") from error


def _newest_readable(
  folders: list[epath.Path], read: Callable[[epath.Path], Restored]
) -> tuple[Restored, list[epath.Path]]:
  """The first of `folders` that can be read, and the damaged ones before it. UserError when there is none."""
  damaged: dict[epath.Path, str] = {}
  reason = ""
  for folder in folders:
    restored, reason = None, "another process could not read it"
    try:
      restored = read(folder)
    except UserError:
      raise
    except Exception as error:
      reason = _reason(error)
    if _everywhere(restored is not None):
      assert restored is not None
      for passed, why in damaged.items():
        log.warning("checkpoint %s is damaged and passed over: %s", passed, why)
      return restored, list(damaged)
    damaged[folder] = reason
  raise UserError(
    f"no readable checkpoint: {', '.join(map(str, damaged))} cannot be read ({reason}); "
    "restore the files from a copy, or start in another workdir"
  )


def _everywhere(success: bool) -> bool:
  """Whether all processes succeeded, so that they fall back together and never restore different steps."""
  return bool(multihost_utils.process_allgather(np.asarray(success)).all())


def _absolute(path: Path | str) -> epath.Path:
  place = epath.Path(path)
  # gs://... is absolute too, and resolve() would spoil it.
  return place if place.is_absolute() else place.resolve()


def _steps(directory: epath.Path) -> list[epath.Path]:
  """The steps' folders, newest first; incomplete ones too, unlike in Orbax's own list, to be reported."""
  if not directory.is_dir():
    return []
  return sorted((p for p in directory.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)


def _read_state(folder: epath.Path, abstract_state: PyTree) -> Restored:
  _check_fit(folder, _saved_tree(folder), abstract_state)
  return _read(folder, abstract_state, _context())


def _read_parts(folder: epath.Path, names: tuple[str, ...]) -> Restored:
  saved = _saved_tree(folder)
  averaged = "ema" if jax.tree.leaves(saved.get("ema")) else "trained"
  kept = {name: averaged if name == "averaged" else name for name in names}
  for name in kept.values():
    if name not in saved:
      raise UserError(f"the state in {folder} has no {name!r}: ask for some of {', '.join(sorted(saved))}")
  wanted = {name: jax.tree.map(lambda _: np.ndarray, saved[name]) for name in kept.values()}
  read = _read(folder, wanted, _context(partial=True))
  return dataclasses.replace(read, state={name: read.state[there] for name, there in kept.items()})


def _read(folder: epath.Path, abstract_state: PyTree, context: ocp.Context) -> Restored:
  with context:
    # One at a time and the small ones first: when one fails, Orbax would abandon the reads beside it noisily.
    data_state = ocp.load_checkpointables(folder, {"data": None})["data"]
    meta = ocp.load_checkpointables(folder, {"meta": None})["meta"]
    state = abstract_state
    if jax.tree.leaves(abstract_state):  # a tree of None and {} alone is itself, and Orbax fails on it
      state = ocp.load(folder, abstract_state, checkpointable_name="state")
  return Restored(int(folder.name), state, data_state, meta)


def _saved_tree(folder: epath.Path) -> dict[str, Any]:
  """The tree of the saved state: leaves with shape and dtype, no array data."""
  _check_files(folder / "state")
  saved = ocp.metadata(folder, checkpointable_name="state").metadata
  if saved is None:
    raise ValueError("the description of its arrays in state/ cannot be read")
  return saved


def _check_files(state: epath.Path) -> None:
  """Raises ValueError when a file that Orbax reads beside others is damaged, as far as no array need be read.

  Orbax would fail on it too, but abandon the reads of all other arrays, and Python prints each of them.
  """
  for description in (state / "array_metadatas").glob("*"):
    json.loads(description.read_text())
  # The data files: none may be missing, or shorter than the index of the OCDBT store says.
  store = ts.KvStore.open(f"{state.as_uri()}/").result()
  nodes = [ts.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
  sizes: dict[str, int] = {}
  while nodes:
    for entry in ts.ocdbt.dump(store, nodes.pop()).result()["entries"]:
      if "location" in entry:
        nodes.append(entry["location"])
      elif "indirect_value" in entry:
        _, folder, name, offset, length = entry["indirect_value"].split(":")
        sizes[folder + name] = max(sizes.get(folder + name, 0), int(offset) + int(length))
  for name, size in sizes.items():
    found = (state / name).stat().length if (state / name).exists() else 0
    if found < size:
      raise ValueError(f"state/{name} has {found} of {size} bytes")


def _check_fit(folder: epath.Path, saved: PyTree, expected: PyTree) -> None:
  """Raises UserError naming the first leaves that differ. Orbax would cast dtypes in silence."""
  there, here = _leaves(saved), _leaves(expected)
  differing = [
    f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if differing:
    more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
    raise UserError(
      f"checkpoint {folder} does not fit this config: {'; '.join(differing[:3])}{more}. "
      "Use the config it was written with, or another workdir"
    )


def _leaves(tree: PyTree) -> dict[str, str]:
  """Each leaf's path and what it is, as in {"params/encoder/kernel": "float32[16, 8]"}."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _context(*, partial: bool = False) -> ocp.Context:
  """Orbax's options. partial: read only the leaves that are asked for."""
  context = ocp.Context()
  # By itself Orbax takes a dict of numbers for a tree of arrays.
  context.checkpointables.registry = ocp.handlers.local_registry()
  for item in ("data", "meta"):
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=item)
  context.pytree.loading.partial_load = partial
  # In the background, a folder that cannot be made leaves threads that wait for it long after the run's end.
  context.asynchronous.create_directories_asynchronously = False
  return context


def _give_back() -> None:
  """Returns to the system what is allocated no more.

  glibc has a heap for every few threads and keeps what is freed in the midst of one: what compiling took (hundreds of
  megabytes), and a little more with each thousand steps, for one thread frees what another has made.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, "malloc_trim"):  # of glibc alone
    libc.malloc_trim(0)


def _reason(error: BaseException) -> str:
  """The first line of what really happened: Orbax wraps it in an error about handlers."""
  while error.__cause__ is not None:
    error = error.__cause__
  return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
