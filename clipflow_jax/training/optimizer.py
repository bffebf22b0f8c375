"""The optimizer of a stage, from optax parts."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from clipflow_jax.errors import UserError
from clipflow_jax.training.state import Params, flatten, nest

# Matrices between hidden layers go to Muon; heads, embeddings, gains and biases to Adam.
MUON = r".*/kernel"
NOT_MUON = r".*head/kernel"
# What weight decay pulls to zero: matrices, not a stack's gains and biases, which have two axes too, nor positions.
DECAYED = r".*/(kernel(_lora_[ab])?|embedding)"


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """name: "muon" (Jordan et al. 2024; from scratch) or "adamw" (fine-tuning).

  learning_rate: its peak, after `warmup` steps from 0 and before a cosine to `final` of it at `steps`.
  decay: the share of the steps, the last ones, in which the rate falls, by the same cosine; before them it stays at its
    peak. 1: it falls from the end of the warm-up on. Less lets a run be extended (Hu et al. 2024, MiniCPM).
  adam_learning_rate: the peak for what Muon leaves to Adam. clip: global gradient norm.
  weight_decay: of matrices alone, times the learning rate; with Muon of those that are its.
  patience: steps in a row with a non-finite gradient that are skipped before the run stops.
  offload: "host" keeps the moments in the host's memory and brings them to the device within each step; "" never.
  UserError for a value that makes no sense.
  """

  steps: int
  name: str = "muon"
  learning_rate: float = 0.02
  adam_learning_rate: float = 3e-3
  warmup: int = 20
  final: float = 0.0
  decay: float = 1.0
  weight_decay: float = 0.0
  clip: float = 1.0
  b1: float = 0.9
  b2: float = 0.95
  patience: int = 10
  offload: str = ""

  def __post_init__(self):
    if self.name not in ("muon", "adamw"):
      raise UserError(f"optimizer.name {self.name!r} is unknown; choose muon or adamw")
    if self.offload not in ("", "host"):
      raise UserError(f"optimizer.offload {self.offload!r} is unknown; choose host, or '' for none")
    for name in ("learning_rate", "adam_learning_rate", "warmup", "weight_decay", "final"):
      if not 0 <= getattr(self, name) < math.inf:
        raise UserError(f"optimizer.{name} is {getattr(self, name)}: give a number from 0")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f"optimizer.{name} is {getattr(self, name)}: give a number from 0 to less than 1")
    if not 0 < self.decay <= 1:
      raise UserError(f"optimizer.decay is {self.decay}: give a share of the steps above 0, up to 1 for all of them")
    if not self.clip > 0:
      raise UserError(f"optimizer.clip is {self.clip}: give the largest norm of a gradient, or inf for any")
    if self.patience < 1:
      raise UserError(f"optimizer.patience is {self.patience}: give 1 step or more")

  def schedule(self, peak: float) -> optax.Schedule:
    """Updates made, from 0 -> the rate of the next one."""
    warmup = min(self.warmup, self.steps // 2)
    stays = max(0, self.steps - warmup - max(1, round(self.decay * self.steps)))
    moves = optax.warmup_cosine_decay_schedule(
      0.0, peak, warmup, max(self.steps, warmup + 1) - stays, end_value=peak * self.final
    )
    return (lambda count: moves(count - jnp.clip(count - warmup, 0, stays))) if stays else moves

  def rates(self) -> np.ndarray:
    """f32[steps], on the host: the learning rate of each update."""
    return np.asarray(jax.jit(self.schedule(self.learning_rate))(np.arange(self.steps)))

  def make(self, scales: dict[str, float]) -> optax.GradientTransformation:
    """The whole chain. scales: {path: learning-rate multiplier} of the trained parameters."""
    if self.name == "muon":
      rule = optax.contrib.muon(
        self.schedule(self.learning_rate),
        weight_decay=self.weight_decay,
        adam_b1=self.b1,
        adam_b2=self.b2,
        adam_learning_rate=self.schedule(self.adam_learning_rate),
        muon_weight_dimension_numbers=muon_dimensions,
      )
    else:
      rule = optax.adamw(
        self.schedule(self.learning_rate),
        b1=self.b1,
        b2=self.b2,
        weight_decay=self.weight_decay,
        mask=lambda params: nest({path: bool(re.fullmatch(DECAYED, path)) for path in flatten(params)}),
      )
    tree = nest({path: scale for path, scale in scales.items() if scale})
    scaled = optax.stateless(lambda updates, _: jax.tree.map(lambda update, scale: update * scale, updates, tree))
    whole = skip_nonfinite(optax.chain(optax.clip_by_global_norm(self.clip), rule, scaled))
    if not self.offload:
      return whole

    def update(grads, state, params=None):
      return whole.update(grads, jax.device_put(state, jax.memory.Space.Device), params)

    return optax.GradientTransformation(whole.init, update)  # where its result goes is said by the state's shardings


def skip_nonfinite(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """The rule, which a gradient of no finite norm passes by: however many there are, parameters and moments stay.

  State as of `optax.apply_if_finite`, which takes one of two branches: what these write, another pass would then read.
  Here each number is chosen where it is made, and the norm is the one that clips.
  """

  def update(grads, state, params=None):
    finite = jnp.isfinite(optax.tree.norm(grads))
    updates, inner = rule.update(grads, state.inner_state, params)
    updates = jax.tree.map(lambda update: jnp.where(finite, update, 0), updates)
    inner = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner, state.inner_state)
    total, in_a_row = (optax.safe_increment(n) for n in (state.total_notfinite, state.notfinite_count))
    total, in_a_row = jnp.where(finite, state.total_notfinite, total), jnp.where(finite, 0, in_a_row)
    return updates, optax.ApplyIfFiniteState(in_a_row, finite, total, inner)

  return optax.GradientTransformation(optax.apply_if_finite(rule, 1).init, update)


def muon_dimensions(params: Params) -> Params:
  """For optax: which parameters are Muon's, the last two axes of each being its matrix (an axis before is layers)."""

  def of(path, leaf):
    if not re.fullmatch(MUON, path) or re.fullmatch(NOT_MUON, path):
      return None
    return MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

  return nest({path: of(path, leaf) for path, leaf in flatten(params).items()})
