"""Configs from Python files and the command line, and what of them JAX has to know before it starts."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipflow_jax.errors import UserError, local

if TYPE_CHECKING:
  from ml_collections import ConfigDict


def load(path: str, overrides: list[str]) -> ConfigDict:
  """The config of "file.py[:arg]" with "--config.a.b=value" overrides. Files are sought here, then beside the package.

  Raises UserError for a missing file, an unknown key, a value of another type, or an address in place of a path.
  """
  from absl import flags
  from ml_collections import ConfigDict, config_flags

  local(path)
  sys.path[:0] = [str(Path(__file__).parent.parent)]  # configs import each other as `configs.x`
  name, _, argument = path.partition(":")
  places = [Path(name), Path(__file__).parent.parent / name]
  found = next((place for place in places if place.is_file()), None)
  if not found:
    raise UserError(f"config file {name!r} does not exist (looked here and in {places[1].parent})")
  values = flags.FlagValues()
  argv = ["clipflow", f"--config={found}{f':{argument}' if argument else ''}", *overrides]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv)
    config = values["config"].value
  except UserError:
    raise
  except Exception as error:  # whatever running the file raises
    raise UserError(f"config {path}: {_why(error, found)}") from error
  if not isinstance(config, ConfigDict):
    raise UserError(f"config {path}: get_config returns {config!r}, which is no ConfigDict")
  _check_paths(config.to_dict())
  for stage in stages(config):
    if "file" in stage:
      stage.file = path
  return config


def stages(config: ConfigDict) -> list[ConfigDict]:
  """Those of a run in their order, or the one that the config is of."""
  return [config.stages[name] for name in config.order] if "order" in config else [config]


def set_environment(config: ConfigDict) -> None:
  """Sets the variables of config.environment, before JAX starts. What the user has set wins; flags come together.

  UserError where the stages of a run want different ones: all run in one process.
  """
  wanted = [stage.get("environment", {}) for stage in stages(config)]
  if any(one != wanted[0] for one in wanted):
    raise UserError("the stages of this run differ in `environment`, which is the whole process's: make them the same")
  for name, value in wanted[0].items():
    given = os.environ.get(name, "")
    os.environ[name] = f"{value} {given}".strip() if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") else given or value


def _check_paths(fields: Mapping[str, Any], before: str = "") -> None:
  """UserError for an address among the settings, but for those that jax takes and those of a user's own source."""
  kind = str(fields.get("kind", ""))
  if ":" in kind and not kind.startswith("tfds:"):
    return
  for key, value in fields.items():
    if isinstance(value, Mapping):
      if key != "environment":
        _check_paths(value, f"{before}{key}.")
    elif key != "compilation_cache":
      for one in value if isinstance(value, list | tuple) else [value]:
        try:
          local(one if isinstance(one, str) else "")
        except UserError as error:
          raise UserError(f"config.{before}{key}: {error}") from error


def _why(error: Exception, file: Path) -> str:
  """One line of an error of ml_collections, or of what the file itself raised, with the line of it."""
  text = str(error)
  frames = traceback.extract_tb(error.__traceback__)
  if places := [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]:
    return f"line {places[-1]}: {type(error).__name__}: {' '.join(text.split())}"
  if "no attribute 'get_config'" in text:
    return "it has no get_config(arg) that returns a ConfigDict"
  if isinstance(error, KeyError | AttributeError):  # an unknown key: quoted, and quoted again
    return "unknown key " + text.replace("\\n", "; ").translate(str.maketrans("", "", "\"'\\"))
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  # A config file that fails comes with its traceback, of which the last line tells.
  return lines[-1] if "Traceback" in text else " ".join(lines)
