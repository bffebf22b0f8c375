"""Starting from an imported language model: it becomes expert `text`, and expert `flow` is fresh beside it."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from clipflow_jax.errors import UserError


def start(config: ConfigDict, workdir: str) -> None:
  """Puts the language model that `clipflow import` wrote to `workdir` into a stage's config.

  The flow expert keeps its width and mlp; depth, heads and head dim are the language model's. Where that has no rotary
  sections for rows and columns, half of the frequencies become theirs, which changes nothing for words.
  """
  file = Path(workdir) / "model.json"
  if not file.is_file():
    raise UserError(f"{workdir} is no imported model; make one with: clipflow import --from=... --output={workdir}")
  fields = json.loads(file.read_text()).get("transformer")
  if not fields:
    raise UserError(f"{workdir} holds no language model; import one of the families llama, qwen2, qwen3, qwen2_5_vl")
  ours = config.model.transformer
  quarter = fields["head_dim"] // 8
  sections = fields.get("rope_sections") or (fields["head_dim"] // 2 - 2 * quarter, quarter, quarter)
  own = {name: ours[name] for name in ("flow_width", "flow_mlp", "early_layer", "unroll", "remat") if name in ours}
  config.model.transformer = dict(fields, rope_sections=tuple(sections), **own)
  config.init_from = str(workdir)
