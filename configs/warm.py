"""Starting from imported weights: a language model becomes expert `text` beside a fresh `flow`, a tower the tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError

RUN = ("unroll", "remat")  # how a part is computed, which what comes in does not say


def start(config: ConfigDict, workdir: str) -> None:
  """Puts the language model that `clipflow import` wrote to `workdir` into a stage's config.

  The flow expert keeps its width and mlp; depth, heads and head dim are the language model's. Where that has no rotary
  sections for rows and columns, half of the frequencies become theirs, which changes nothing for words.
  """
  fields = imported(workdir).get("transformer")
  if not fields:
    raise UserError(f"{workdir} holds no language model; import one of the families llama, qwen2, qwen3, qwen2_5_vl")
  ours = config.model.transformer
  quarter = fields["head_dim"] // 8
  sections = fields.get("rope_sections") or (fields["head_dim"] // 2 - 2 * quarter, quarter, quarter)
  own = {name: ours[name] for name in ("flow_width", "flow_mlp", "early_layer", *RUN) if name in ours}
  config.model.transformer = dict(fields, rope_sections=tuple(sections), **own)
  begin_from(config, workdir)


def tower(config: ConfigDict, workdir: str) -> None:
  """Puts the tower that `clipflow import` wrote to `workdir` into a stage's config, alone or with its text tower.

  Pictures get its size and the pixel decoder its patches, and the statistics of its features are measured at the start.
  A text tower knows the words of its own tokenizer alone: it comes where the stage takes that one, which it can for
  captions and where no language model brings another. Else the stage has none.
  """
  fields = imported(workdir).get("clip")
  if not fields:
    raise UserError(f"{workdir} holds no tower; import one of the families clip, siglip, eva02_large, dinov2")
  ours, vision = config.model.clip, fields["vision"]
  if "text" in fields and not _takes_tokenizer(config, workdir):
    fields = {name: value for name, value in fields.items() if name != "text"}
    ours.text = None
  for name, value in fields.items():  # a text tower and how both are compared, where there are two
    run = {key: ours[name][key] for key in RUN if key in ours[name]} if name in ("vision", "text") else None
    ours[name] = value if run is None else dict(value, **run)
  if "text" in fields:
    config.data.length = fields["text"]["length"]
  sized(config, vision["image_size"])
  config.measure_features = 4096
  begin_from(config, workdir)


def sized(config: ConfigDict, size: int) -> None:
  """Pictures of so many pixels a side, for the tower and the pixel decoder too: as many of the tower's patches as fit.

  What a run of another size learned of places is resampled where this one begins from it.
  """
  vision = config.model.clip.vision
  if size < vision.patch_size:
    raise UserError(f"pictures of {size} pixels a side are smaller than the tower's patches, {vision.patch_size}")
  vision.image_size = config.data.source.size = size
  if config.model.get("pixel_decoder"):
    seen = size // vision.patch_size * vision.patch_size
    config.model.pixel_decoder.update(image_size=seen, patch_size=vision.patch_size * vision.get("feature_pool", 1))


def _takes_tokenizer(config: ConfigDict, workdir: str) -> bool:
  """Whether a stage is of captions alone, begins from nothing else, and the import in `workdir` has a tokenizer."""
  from clipflow_jax.training import checkpoint

  tasks = {name for name, weight in config.data.tasks.items() if weight} | set(config.data.row)
  return tasks == {"caption"} and not config.init_from and bool(checkpoint.described(workdir)["tokenizer"])


def imported(workdir: str) -> dict[str, Any]:
  """The fields of the model in a workdir of `clipflow import`."""
  file = Path(workdir) / "model.json"
  if not file.is_file():
    raise UserError(f"{workdir} is no imported model; make one with: clipflow import --from=... --output={workdir}")
  return json.loads(file.read_text())


def begin_from(config: ConfigDict, workdir: str) -> None:
  """The run begins from that workdir too."""
  config.init_from = ",".join(filter(None, [config.init_from, str(workdir)]))
