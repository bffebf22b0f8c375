"""What a family of models is: its table, and how its config.json and our module's fields say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
from flax import linen as nn

from clipflow_jax.errors import UserError
from clipflow_jax.interop.tensors import Files, Row

Config = Mapping[str, Any]
RUN = ("parent", "name", "dtype", "kernel", "axes", "remat", "unroll")  # how a module is computed, not what it is


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type` of config.json, or how an `architecture` of timm begins.

  kind: the class of our module.
  module: config.json and preprocessor_config.json ({} where there is none), both complete -> our module.
  config: our module -> what config.json says of it, or None where this family cannot say it.
  parameters: our module -> its parameters' shapes.
  ignored: regex of their tensors that are left where they are.
  processor: our module -> preprocessor_config.json, or None.
  base: the `model_type` that completes config.json where transformers does not know this one; None: it is complete.
  unsaid: the tensors -> what config.json leaves to them.
  """

  name: str
  architecture: str
  kind: type[nn.Module]
  rows: tuple[Row, ...]
  module: Callable[[Config, Config], nn.Module]
  config: Callable[[Any], dict[str, Any] | None]
  parameters: Callable[[Any], Any]
  ignored: str = r"(?!)"
  processor: Callable[[Any], dict[str, Any] | None] = lambda module: None
  base: str | None = ""
  unsaid: Callable[[Files], dict[str, Any]] = lambda files: {}


def described(module: nn.Module) -> dict[str, Any]:
  """What a module is, in fields that JSON can hold; defaults are left out."""
  fields = {field.name: (getattr(module, field.name), field.default) for field in dataclasses.fields(module)}
  kept = {name: value for name, (value, default) in fields.items() if name not in RUN and value != default}
  return {name: flax.core.unfreeze(value) if hasattr(value, "items") else value for name, value in kept.items()}


def need(config: Config, key: str, *values: Any) -> None:
  """UserError unless config.json has one of `values` at `key`: what our modules can compute."""
  if config.get(key) not in values:
    able = " or ".join(repr(value) for value in values)
    raise UserError(f"config.json says {key} {config.get(key)!r}; this package computes only {able}")
