"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write(path: Path, save: Callable[[Path], object]) -> None:
  """Atomically: under another name first, so that no reader ever meets half a file, and an error leaves none."""
  partial = path.with_name(f".partial-{path.name}")
  try:
    save(partial)
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write_text(path: Path, text: str) -> None:
  """As `write`, in UTF-8."""
  write(path, lambda partial: partial.write_text(text, encoding="utf-8"))
