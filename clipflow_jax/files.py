"""Files that are written whole or not at all, and folders that are one process's own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from clipflow_jax.errors import UserError


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """The name to write under, of the same ending, which becomes `path` at the end, atomically.

  No reader ever meets half a file, and an error leaves none. What a killed process left is written over by the next.
  """
  partial = path.with_name(f".partial-{path.name}")
  try:
    yield partial
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write(path: Path, save: Callable[[Path], object]) -> None:
  """What `save` writes into the file that it is given, as `whole`."""
  with whole(path) as partial:
    save(partial)


def write_text(path: Path, text: str) -> None:
  """As `write`, in UTF-8."""
  write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
  """Keeps the folder for this process alone until it is done, or has ended however. UserError where another has it.

  Where the file system knows no locks, as some that mount buckets, nothing is kept.
  """
  with (folder / ".held").open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(f"{folder} is in use by {file.read()}: wait for it, or give another folder") from error
    except OSError:
      yield
      return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    yield
