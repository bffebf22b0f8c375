"""The train step: one jitted function of (state, batch), with the state donated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipflow_jax.batch import Batch
from clipflow_jax.errors import UserError
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives.joint import Objective
from clipflow_jax.training.state import Params, TrainState, merge

Metrics = dict[str, jax.Array]
SEEN = ("images", "tokens")  # metrics of `make`: how many a batch has, wherever there was room for more


def make(
  model: ClipFlow,
  objective: Objective,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  ema: float = 0.0,
  accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The pure step. Its randomness is fold_in(seed, step), a key a row: it depends on neither restarts nor sharding.

  ema: decay of the average of parameters, warmed up as min(ema, (1+step)/(10+step)).
  accumulate: the batch is cut into that many parts, whose gradients add up to the whole batch's: losses are divided by
    the whole batch's counts. (A contrastive loss compares within a part.)
  """

  def gradients(state: TrainState, batch: Batch, keys: jax.Array, counts):
    def loss(trained):
      variables = {"params": merge(trained, state.frozen)}
      sums = model.apply(variables, batch, keys, method=objective.sums)
      return objective.loss(sums, counts)

    return jax.grad(loss, has_aux=True)(state.trained)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    rows = batch.tokens.shape[0]
    if rows % accumulate:
      raise UserError(f"data.batch_size {rows} cannot be cut into {accumulate} equal parts; change it or accumulate")
    keys = _keys(seed, state.step, rows)
    counts = objective.counts(batch)
    grads, metrics = _in_parts(lambda part: gradients(state, part[0], part[1], counts), (batch, keys), accumulate)
    updates, opt_state = tx.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    average = state.ema
    if average is not None:
      decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
      average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, trained)
    metrics |= {
      "images": (batch.image_roles > 0).sum(dtype=jnp.float32),
      "tokens": (batch.segments > 0).sum(dtype=jnp.float32),
      "gradient_norm": optax.tree.norm(grads),
      "skipped": opt_state.total_notfinite.astype(jnp.float32),
      "skipped_in_a_row": opt_state.notfinite_count.astype(jnp.float32),
    }
    new = dataclasses.replace(state, step=state.step + 1, trained=trained, ema=average, opt_state=opt_state)
    return new, metrics

  return step


def losses(
  model: ClipFlow, objective: Objective, *, seed: int, accumulate: int = 1
) -> Callable[[Params, Batch, jax.Array], Metrics]:
  """The pure function of (all parameters, batch, number i32[]) that gives the step's losses and learns nothing.

  Its randomness is fold_in(seed, number), a key a row. accumulate: as of `make`.
  """

  def of(params: Params, batch: Batch, number: jax.Array) -> Metrics:
    keys = _keys(seed, number, batch.tokens.shape[0])
    counts = objective.counts(batch)

    def part(rows):
      sums = model.apply({"params": params}, *rows, method=objective.sums)
      return objective.loss(sums, counts)[1]

    return _in_parts(part, (batch, keys), accumulate)

  return of


def _keys(seed: int, number: jax.Array, rows: int) -> jax.Array:
  return jax.random.split(jax.random.fold_in(jax.random.key(seed), number), rows)


def _in_parts(of: Callable[[Any], Any], rows: Any, count: int) -> Any:
  """The sum of `of` over that many equal parts of `rows`, a tree of leaves [B,...], one part after the other."""
  if count == 1:
    return of(rows)
  # A part is every count-th row, so that each device has as many of it: of neighbours it would lie on few of them.
  parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), rows)

  def add(total, part):
    return jax.tree.map(jnp.add, total, of(part)), None

  first, rest = (jax.tree.map(lambda x, s=s: x[s], parts) for s in (0, slice(1, None)))
  return jax.lax.scan(add, of(first), rest)[0]
