"""The one error for bad input, and what raises it for user's code and folders that a setting names."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any


class UserError(Exception):
  """Something the user can fix. The message is one line: what is wrong, where, and the remedy.

  The command line prints it without a traceback and exits with code 2.
  """


def resolve(setting: str, place: str) -> Any:
  """What "module:name" names, of the user's own code; setting: where that was said. UserError where it is not there."""
  try:
    return pkgutil.resolve_name(place)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(
      f"{setting} is {place!r}, which cannot be imported: {error}; is its folder in PYTHONPATH?"
    ) from error


def make_folder(folder: Path) -> None:
  """Makes the folder, where it is not there already. UserError where it can be none."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot write into {folder}: {error}") from error
