"""Floating-point operations of a traced function, counted from its matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def count(fn: Callable, *args: Any) -> int:
  """FLOPs (2 per multiply-add) of all matrix products and convolutions in fn(*args); args may be abstract.

  Loops count as often as they run, which XLA's own cost analysis does not do. A while loop counts once.
  """
  return _jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr(jaxpr: Any) -> int:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
  if equation.primitive.name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs
  times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
  inner = 0
  for value in equation.params.values():
    for sub in value if isinstance(value, (tuple, list)) else (value,):
      sub = getattr(sub, "jaxpr", sub)
      inner += _jaxpr(sub) if hasattr(sub, "eqns") else 0
  return times * inner
