"""Models as Hugging Face's `save_pretrained` writes them: a folder of config.json and safetensors, in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from clipflow_jax.data.text import IMAGE, Chat
from clipflow_jax.errors import UserError
from clipflow_jax.interop import blip3o, eva, language, qwen_vision, tensors, vision
from clipflow_jax.interop.family import Family
from clipflow_jax.interop.new_folder import written_whole
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.models.transformer import Transformer

# transformers warns at import that PyTorch is absent; configurations need none.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

FAMILIES: dict[str, Family] = {
  family.name: family for room in (language, vision, eva, qwen_vision, blip3o) for family in room.FAMILIES
}
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # of a hub repository: no pickle
SHARD = "5GB"
WRITES = (Transformer, ClipFlow)  # modules that write words
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"


def load(
  path: Path | str, *, dtype: Any = None, shardings: Callable[[Any], Any] | None = None, family: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
  """(our module, its parameters) of a model's folder or hub id.

  dtype: of the parameters and of the computation; None keeps the file's. shardings: from the tree of parameters'
  shapes to one of shardings, such as `functools.partial(parallel.sharding.of_parameters, mesh=mesh)`; each
  device's part is read straight from the file. family: of a checkpoint of several models the one that is wanted, such
  as "qwen2_5_vl_vision"; None takes what config.json names. Raises UserError for pickled files, families and features
  that are not known, and with their names for tensors that are missing, misshapen or not expected: before any is read.
  """
  folder = find(path)
  config, processor = read_config(folder, family)
  known = FAMILIES[config["model_type"]]
  files = tensors.Files(folder)
  module = known.module(config | known.unsaid(files), processor)
  abstract = known.parameters(module)
  flat = tensors.flatten(abstract)
  rows = tensors.plan(known.rows, flat)
  tensors.check(files, rows, flat, known.ignored, folder)
  places = None if shardings is None else tensors.flatten(shardings(abstract))
  params = tensors.nest(tensors.read(files, rows, flat, dtype, places))
  kinds = {leaf.dtype for leaf in tensors.flatten(params).values()}
  return module.clone(dtype=np.result_type(*kinds)), params


def save(
  path: Path | str,
  module: nn.Module,
  params: Mapping[str, Any],
  *,
  family: str | None = None,
  config: Mapping[str, Any] | None = None,
  generation: Mapping[str, Any] | None = None,
  tokenizer: Any = None,
) -> str:
  """Writes a folder that transformers (and `load`) reads, all of it or nothing. Returns the family's name.

  family: a `model_type`; None takes the first that can say what the module is. config: more keys of config.json,
  such as max_position_embeddings, which no tensor tells. generation: of generation_config.json. With a tokenizer both
  name the tokens that begin and end what a language model writes, those of its own beside those that are given.
  Weights keep their dtype, in shards of 5 GB. Raises UserError where the family cannot express the module, and where
  `path` is there already and not empty.
  """
  chosen, described = _describe(module, family)
  flat = tensors.flatten(params)
  try:
    rows = tensors.plan(chosen.rows, flat)
  except ValueError as error:
    raise UserError(f"a {chosen.name} checkpoint cannot hold this model: {error}") from error
  config, generation = dict(config or {}), dict(generation or {})
  if tokenizer is not None and isinstance(module, WRITES):
    config |= _ids(tokenizer, config)
    generation |= _ids(tokenizer, config | generation)
    if IMAGE in tokenizer.get_vocab():  # words cannot show what a picture would
      generation["suppress_tokens"] = [tokenizer.convert_tokens_to_ids(IMAGE)]
  if "text_config" in described:
    config = {"text_config": config} | config
  with written_whole(Path(path)) as scratch:
    kinds = {str(np.dtype(leaf.dtype)) for leaf in flat.values()}
    _write_config(scratch, chosen, _merge(config, described), kinds)
    if generation:
      (scratch / GENERATION).write_text(json.dumps(generation, indent=2))
    _write_tensors(scratch, tensors.theirs(rows, flat))
    settings = chosen.processor(module)
    if settings:
      (scratch / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    if tokenizer is not None:
      tokenizer.save_pretrained(scratch)
  return chosen.name


def find(source: Path | str) -> Path:
  """The folder of a model: `source` itself, or a snapshot of the hub repository of that name (downloads resume)."""
  folder = Path(source)
  if folder.is_dir():
    return folder
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HFValidationError

  try:
    return Path(snapshot_download(str(source), allow_patterns=DOWNLOADED))
  except HFValidationError as error:
    raise UserError(f"{source} is neither a folder nor the name of a hub repository, OWNER/NAME") from error
  except Exception as error:  # the hub's own errors, those of the network below it, and of offline mode
    raise UserError(f"cannot get {source} from the hub: {str(error).splitlines()[0]}") from error


def read_config(folder: Path, family: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
  """(config.json with every default filled in, what is said of pictures or {})."""
  from transformers import AutoConfig

  written = _read_json(folder / "config.json")
  kind = written.pop("model_type", None) or "_".join(str(written.get("architecture")).split("_")[:2])
  if kind not in FAMILIES:
    raise UserError(f"{folder} is of the family {kind!r}; there are {', '.join(sorted(FAMILIES))}")
  if family not in (None, kind) and (family not in FAMILIES or FAMILIES[family].base != kind):
    raise UserError(f"{folder} is of the family {kind!r}, which holds no {family!r}")
  kind = family or kind
  base = FAMILIES[kind].base
  try:
    config = written if base is None else AutoConfig.for_model(base or kind, **written).to_dict()
    config |= {"model_type": kind}
  except Exception as error:  # whatever its validation raises
    raise UserError(f"{folder}/config.json: {str(error).splitlines()[0]}") from error
  if config.get("quantization_config"):
    raise UserError(f"{folder} is quantised; take the repository with the original weights")
  for name in ("preprocessor_config.json", "processor_config.json"):  # the second of processors of words and pictures
    if (folder / name).is_file():
      said = _read_json(folder / name)
      return config, said.get("image_processor", said)
  return config, {}


def read_words(folder: Path) -> dict[str, dict[str, Any]]:
  """What a language model's files say and no tensor does: `save`'s config and generation. {} of another model."""
  config, _ = read_config(folder)
  if FAMILIES[config["model_type"]].kind not in WRITES:
    return {}
  config |= config.get("text_config", {})
  file = folder / GENERATION
  kept = {key: config[key] for key in (*IDS, "max_position_embeddings") if config.get(key) is not None}
  return {"config": kept, "generation": _read_json(file) if file.is_file() else {}}


def family(name: str) -> Family:
  """The family of that `model_type`. UserError for one that is not known."""
  if name not in FAMILIES:
    raise UserError(f"the family {name!r} is unknown; there are {', '.join(sorted(FAMILIES))}")
  return FAMILIES[name]


def _read_json(file: Path) -> dict[str, Any]:
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
      raise ValueError("it holds no object")
    return found
  except (OSError, ValueError) as error:
    raise UserError(f"{file.parent} has no readable {file.name} ({error}); give the folder of a model") from error


def _describe(module: nn.Module, name: str | None) -> tuple[Family, dict[str, Any]]:
  for tried in [family(name)] if name else FAMILIES.values():
    described = tried.config(module) if isinstance(module, tried.kind) else None
    if described is not None:
      return tried, described
  what = f"a {name} checkpoint cannot" if name else "no family of transformers can"
  raise UserError(
    f"{what} say what this {type(module).__name__} is; its fields go beyond it: {' '.join(str(module).split())}"
  )


def _ids(tokenizer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """The IDS that are given, or the tokenizer's; its own end and its template's end too, as they do here."""
  ids = {key: getattr(tokenizer, key) if given.get(key) is None else given[key] for key in IDS}
  ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
  if more := [token for token in Chat(tokenizer).ends if token not in ends]:
    ids["eos_token_id"] = [*filter(lambda token: token is not None, ends), *more]
  return {key: value for key, value in ids.items() if value is not None}


def _merge(more: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
  """`described` over `more`, section by section."""
  for key, value in described.items():
    more[key] = _merge(dict(more.get(key) or {}), value) if isinstance(value, dict) else value
  return more


def _write_config(folder: Path, family: Family, config: dict[str, Any], kinds: set[str]) -> None:
  from transformers import AutoConfig

  config = {key: value for key, value in config.items() if key != "model_type"}
  dtype = kinds.pop() if len(kinds) == 1 else None
  if family.base != "":  # transformers would write what the programs of that family do not read
    if family.architecture:
      config |= {"model_type": family.name, "architectures": [family.architecture], "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return
  made = AutoConfig.for_model(family.name, **config | {"architectures": [family.architecture]})
  made.dtype = dtype
  made.save_pretrained(folder)


def _write_tensors(folder: Path, made: dict[str, tensors.Tensor]) -> None:
  from huggingface_hub import split_state_dict_into_shards_factory
  from safetensors.numpy import save_file

  split = split_state_dict_into_shards_factory(
    made,
    get_storage_size=lambda tensor: tensor.bytes,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=SHARD,
  )
  for file, names in split.filename_to_tensors.items():
    save_file({name: made[name].make() for name in names}, folder / file, metadata={"format": "pt"})
  if split.is_sharded:
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
