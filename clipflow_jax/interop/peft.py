"""A language model's adapters as peft writes them: a folder of adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clipflow_jax.errors import UserError
from clipflow_jax.interop import tensors
from clipflow_jax.interop.family import need
from clipflow_jax.interop.language import LAYERS, ROWS
from clipflow_jax.interop.new_folder import written_whole
from clipflow_jax.interop.tensors import LINEAR, Row

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Two small matrices beside each of a layer's: peft has them as PyTorch's linear layers.
TABLE = tuple(
  Row(
    f"{row.ours}_lora_{end}", f"base_model.model.{row.theirs.removesuffix('weight')}lora_{end.upper()}.weight", LINEAR
  )
  for row in ROWS
  if row.ours.startswith(LAYERS) and row.layout is LINEAR
  for end in ("a", "b")
)
# What peft can do beside plain adapters: what it must say for none of it.
PLAIN: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": (None, "none"),
  "fan_in_fan_out": (None, False),
  "use_dora": (None, False),
  "use_rslora": (None, False),
  "modules_to_save": (None, []),
  "layers_to_transform": (None,),
  "rank_pattern": (None, {}),
  "alpha_pattern": (None, {}),
  "alora_invocation_tokens": (None,),
  "layer_replication": (None,),
  "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change the base as well
}


def save(path: Path, flat: Mapping[str, Any], *, alpha: float, base: str = "") -> None:
  """Writes a folder that peft and `load` read, all of it or nothing.

  flat: {"text/layers/.../kernel_lora_a": f[L,in,rank], ..._b: f[L,rank,out]}. base: the name of the model that they
  belong to. UserError for adapters that no language model of transformers has, and where `path` is there already.
  """
  from safetensors.numpy import save_file

  try:
    rows = tensors.plan(TABLE, flat)
  except ValueError as error:
    raise UserError(f"peft's format cannot hold these adapters: {error}") from error
  rank = next(leaf.shape[-1] for name, leaf in flat.items() if name.endswith("_lora_a"))
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": sorted({row.theirs.split(".")[-3] for row in rows.values()}),
  }
  with written_whole(path) as scratch:
    (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    made = {name: tensor.make() for name, tensor in tensors.theirs(rows, flat).items()}
    save_file(made, scratch / WEIGHTS, metadata={"format": "pt"})


def load(path: Path) -> tuple[dict[str, np.ndarray], float]:
  """(what `save` was given, alpha) of a folder of peft's.

  UserError for what is no such folder, for what goes beyond plain LoRA on a layer's matrices, and for tensors that are
  missing or not expected, with their names.
  """
  try:
    config = json.loads((path / CONFIG).read_text())
  except (OSError, ValueError) as error:
    raise UserError(
      f"{path} has no readable {CONFIG} ({error}); give a folder that peft's save_pretrained wrote"
    ) from error
  for key, values in PLAIN.items():
    need(config, key, *values)
  files = tensors.Files(path)
  abstract: dict[str, jax.ShapeDtypeStruct] = {}
  for row in TABLE:
    found = re.compile(re.escape(row.theirs).replace(r"\{\}", r"(\d+)"))
    layers = [int(match[1]) for match in map(found.fullmatch, files.where) if match]
    if layers:
      outputs, inputs = files[row.theirs.format(min(layers))].get_shape()
      abstract[row.ours] = jax.ShapeDtypeStruct((max(layers) + 1, inputs, outputs), np.float32)
  rows = tensors.plan(TABLE, abstract)
  tensors.check(files, rows, abstract, r"(?!)", path)
  read = {name: np.asarray(leaf) for name, leaf in tensors.read(files, rows, abstract, None, None).items()}
  if not read:
    raise UserError(f"{path} holds no adapters")
  return read, float(config["lora_alpha"])
