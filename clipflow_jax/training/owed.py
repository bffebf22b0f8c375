"""What was due at a step and is not there yet: a process may end while it samples or evaluates, the step long saved."""

from __future__ import annotations

import json
from pathlib import Path

from clipflow_jax import files

FILE = "owed.json"  # {"step", "what": names}, there while they are being made


def note(workdir: Path, step: int, what: list[str]) -> None:
  """Before the step is saved: whoever goes on from it finds what it owes."""
  files.write_text(workdir / FILE, json.dumps(dict(step=step, what=what)))


def settle(workdir: Path) -> None:
  """What was noted is made."""
  (workdir / FILE).unlink(missing_ok=True)


def at(workdir: Path, step: int) -> list[str]:
  """What the step owes; nothing where that was noted of another one, which is not what a run goes on from."""
  try:
    noted = json.loads((workdir / FILE).read_text(encoding="utf-8"))
  except FileNotFoundError:
    return []
  return noted["what"] if noted["step"] == step else []
