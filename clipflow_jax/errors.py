"""The one error for bad input, and what raises it for user's code and folders that a setting names."""

from __future__ import annotations

import pkgutil
import re
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


def local(place: str) -> str:
  """The path of a file or folder, or several with commas between, as given; "name=path" too. UserError for an address.

  Files are opened as the machine's own: of gs://bucket/run they would be those of the folder gs: here.
  """
  if found := re.search(r"(?:^|[,=])\s*([a-z][a-z0-9+.-]*://[^,]*)", place, re.IGNORECASE):
    raise UserError(
      f"{found[1]} is an address, not a path: mount or download what is there and give its path "
      "(launch/tpu/pod.sh and launch/gke mount buckets by gcsfuse)"
    )
  return place


def make_folder(folder: Path) -> None:
  """Makes the folder, where it is not there already. UserError where it can be none."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot write into {folder}: {error}") from error
