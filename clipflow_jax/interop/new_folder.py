"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clipflow_jax.errors import UserError


def refuse(path: Path) -> None:
  """UserError where `path` is there already and not empty, and where it would be below a file."""
  for parent in path.parents:
    if parent.exists() and not parent.is_dir():
      raise UserError(f"{path} cannot be made: {parent} is a file; give a new folder")
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} is there already; give a new folder")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
  """A folder beside `path` to write into, which becomes `path` at the end, and of which an error leaves nothing."""
  refuse(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  except OSError as error:
    raise UserError(f"{path} cannot be made: {error}") from error
  try:
    yield scratch
    scratch.chmod(0o755)
    scratch.replace(path)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
