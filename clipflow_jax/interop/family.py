"""What a family of models is: its table, and how its config.json and our module's fields say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from clipflow_jax.errors import UserError
from clipflow_jax.interop.tensors import Row

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type` of config.json.

  kind: the class of our module.
  module: config.json and preprocessor_config.json ({} where there is none), both complete -> our module.
  config: our module -> what config.json says of it, or None where this family cannot say it.
  parameters: our module -> its parameters' shapes.
  ignored: regex of their tensors that are left where they are.
  processor: our module -> preprocessor_config.json, or None.
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


def need(config: Config, key: str, *values: Any) -> None:
  """UserError unless config.json has one of `values` at `key`: what our modules can compute."""
  if config.get(key) not in values:
    able = " or ".join(repr(value) for value in values)
    raise UserError(f"config.json says {key} {config.get(key)!r}; this package computes only {able}")
