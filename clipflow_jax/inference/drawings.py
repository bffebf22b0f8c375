"""Drawings as a folder: a PNG of each and captions.jsonl, which is a source of data. A stopped one goes on.

Each picture has a seed of its own, by which it is named: `clipflow draw` with its caption and seed gives it again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from clipflow_jax.data.folder import CAPTIONS
from clipflow_jax.errors import UserError, make_folder
from clipflow_jax.files import write, write_text
from clipflow_jax.inference import batching, untaught

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

log = logging.getLogger(__name__)

HOW = "drawn.json"  # by what model and with what settings: all of a folder are drawn alike


def plan(folder: Path, prompts: Sequence[str], seed: int) -> list[dict[str, Any]]:
  """A line of captions.jsonl for each prompt, the i-th with seed + i.

  UserError where a folder holds other things than drawings, or under one of these names a drawing of other words.
  """
  batching.seeds_of(len(prompts), range(seed, seed + len(prompts)))
  lines: list[dict[str, Any]] = [
    {"file": f"{seed + i:06d}.png", "caption": prompt, "seed": seed + i} for i, prompt in enumerate(prompts)
  ]
  if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / HOW).is_file())):
    raise UserError(f"{folder} holds other things than drawings; give a new folder")
  held = _held(folder)
  for line in lines:
    there = held.get(line["file"], line).get("caption")
    if there != line["caption"]:
      raise UserError(
        f"{folder / line['file']} is of {there!r}, not of {line['caption']!r}: "
        "give the prompts in the same order, another --seed or a new folder"
      )
  return lines


def draw(model: ClipFlow, folder: Path, lines: Sequence[dict[str, Any]], said: dict[str, Any], **how: Any) -> int:
  """Draws into the folder what is not there of the lines of `plan`; returns how many. Each file is written atomically.

  said: what else the pictures depend on, such as whose they are; how: of `ClipFlow.draw`, without seeds. A batch of
  which some are missing is drawn whole, so that they come out as they would have. UserError for a prompt that cannot be
  drawn, before any is, and where the pictures that are there were drawn otherwise.
  """
  parts = [lines[i : i + model.batch_size] for i in range(0, len(lines), model.batch_size)]
  model.need("pixel decoder", "decode")
  for part in parts:
    sampling, *_ = model.to_draw([line["caption"] for line in part], how.get("steps"), how.get("guidance"))
  make_folder(folder)
  try:
    _agree(folder, said | how | {"step": model.step, "steps": sampling.steps, "guidance": sampling.guidance})
    untaught.warn(model, untaught.DRAWS, untaught.DECODES)
    held, drawn = _held(folder), 0
    for part in parts:
      missing = {line["file"] for line in part} - held.keys()
      if not missing:
        continue
      pictures = model.draw([line["caption"] for line in part], seed=[line["seed"] for line in part], **how)
      for line, picture in zip(part, pictures, strict=True):
        if line["file"] in missing:
          write(folder / line["file"], Image.fromarray(picture).save)
      held |= {line["file"]: line for line in part}
      write_text(folder / CAPTIONS, "".join(json.dumps(held[file]) + "\n" for file in sorted(held)))
      drawn += len(missing)
      log.info("%d of %d pictures are there", sum(line["file"] in held for line in lines), len(lines))
  except OSError as error:
    raise UserError(f"cannot write into {folder}: {error}") from error
  return drawn


def _agree(folder: Path, how: dict[str, Any]) -> None:
  """Notes how the pictures are drawn. UserError where that is not how those that are there were."""
  file, noted = folder / HOW, how
  try:
    if file.is_file():
      noted = dict(json.loads(file.read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"{file} cannot be read ({error}); give a new folder") from error
  if other := [key for key in how if noted.get(key) != how[key]]:
    told = ", ".join(f"{key} {noted.get(key)} there, {how[key]} here" for key in other)
    raise UserError(f"the pictures in {folder} were drawn otherwise ({told}); draw as they were, or give a new folder")
  write_text(file, json.dumps(how, indent=2) + "\n")


def _held(folder: Path) -> dict[str, dict[str, Any]]:
  """{file: its line} of the pictures that are there."""
  file = folder / CAPTIONS
  try:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return {line["file"]: line for line in lines if (folder / line["file"]).is_file()}
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise UserError(f"{file} cannot be read ({error!r}); mend it, or give a new folder") from error
