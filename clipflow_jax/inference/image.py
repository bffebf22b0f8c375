"""Drawing: from prompts to features in one compiled scan, guided in one batch."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from clipflow_jax.batch import TARGET, Batch
from clipflow_jax.errors import UserError
from clipflow_jax.flow import guidance, path, solvers
from clipflow_jax.models.clipflow import ClipFlow, Given, Place
from clipflow_jax.models.layers import to_pixels

DECODER_STEPS = 10  # of a flow decoder: given the features little is left to decide
DECODER_KEY = 2**31 - 1  # folded into a row's key for its noise: features have the key's own, steps that of 0, 1, ...


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to draw. guide: away from what. "text": the empty prompt, two passes a step; "null": a separate drawer's
  condition all zeros, two passes; "early": the early head, one pass. guidance: how far, 0 or more (1: not at all).
  eta: fresh noise at each step, from none at 0 to all at 1. interval: the times, of 0 to 1, that are guided.
  UserError for a value that makes no sense.
  """

  steps: int = 40
  guidance: float = 1.5
  eta: float = 1.0
  method: str = "euler"
  interval: tuple[float, float] = (0.0, 1.0)
  guide: str = "text"

  def __post_init__(self):
    object.__setattr__(self, "interval", tuple(self.interval))
    if not isinstance(self.steps, numbers.Integral) or self.steps < 1:
      raise UserError(f"sampling steps {self.steps}: give a whole number, at least 1")
    if self.method not in solvers.METHODS:
      raise UserError(f"sampling method {self.method!r} is unknown; choose one of {', '.join(solvers.METHODS)}")
    if self.guide not in ("text", "null", "early"):
      raise UserError(f"sampling guide {self.guide!r} is unknown; choose text, null or early")
    if not 0 <= self.guidance < math.inf:
      raise UserError(f"sampling guidance {self.guidance}: give a number from 0, or 1 for none")
    if not 0 <= self.eta <= 1:
      raise UserError(f"sampling eta {self.eta}: give a number from 0, no fresh noise, to 1")
    if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
      raise UserError(f"sampling interval {self.interval}: give two times from 0 to 1, the lower first")


class Drawing(flax.struct.PyTreeNode):
  """Rows that are being drawn, and all that the next steps need."""

  x: jax.Array  # f32[B,1,T,C] at the time of `step`
  step: jax.Array  # i32[]
  given: Given  # what to draw, and behind it where guided by text or nothing, away from what


def draw(model: ClipFlow, params, prompts: Batch, empty: Batch, keys: jax.Array, sampling: Sampling) -> jax.Array:
  """Standardised features f32[B,T,C] of B rows: where `walk` ends."""
  return walk(model, params, prompts, empty, keys, sampling)[0]


def walk(
  model: ClipFlow, params, prompts: Batch, empty: Batch, keys: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
  """(Standardised features f32[B,T,C] of B rows, x_t f32[steps,B,T,C] on the way there, from noise at t=1).

  prompts: rows with one target, other pictures of which are read; empty: the target alone, without text; keys key[B]. A
  row's picture is a function of its prompt and key alone. Pure; jit it with model and sampling closed over.
  """

  def run(bound: ClipFlow) -> tuple[jax.Array, jax.Array]:
    velocity = _velocity(bound, _given(bound, prompts, empty, sampling), sampling, sampling.guidance)
    noise = solvers.start(keys, (1, *bound.feature_shape))
    times = path.grid(sampling.steps, bound.alpha)
    end, way = solvers.walk(velocity, noise, times, method=sampling.method, eta=sampling.eta, keys=keys)
    return end[:, 0], way[:, :, 0]

  return model.apply({"params": params}, method=run)


def begin(model: ClipFlow, params, prompts: Batch, empty: Batch, keys: jax.Array, sampling: Sampling) -> Drawing:
  """What `draw` begins with; arguments as there."""

  def run(bound: ClipFlow) -> Drawing:
    noise = solvers.start(keys, (1, *bound.feature_shape))
    return Drawing(noise, jnp.int32(0), _given(bound, prompts, empty, sampling))

  return model.apply({"params": params}, method=run)


def go_on(
  model: ClipFlow,
  params,
  drawing: Drawing,
  keys: jax.Array,
  times: jax.Array,
  last: jax.Array,
  scale: jax.Array,
  *,
  sampling: Sampling,
) -> tuple[Drawing, jax.Array]:
  """Draws on to times[last]: also the features f32[B,T,C] as they are foreseen there, from the last time above 0 drawn.

  times: as `path.grid` makes them, with any number of zeros behind; scale: of the guidance, in the place of
  sampling's, unless that is 1, which is none. So one program serves every number of steps and every guidance.
  """

  def run(bound: ClipFlow) -> tuple[Drawing, jax.Array]:
    velocity = _velocity(bound, drawing.given, sampling, scale)
    x, clean = solvers.advance(
      velocity, drawing.x, times, drawing.step, last, method=sampling.method, eta=sampling.eta, keys=keys
    )
    return drawing.replace(x=x, step=last), clean[:, 0]

  return model.apply({"params": params}, method=run)


def _given(bound: ClipFlow, prompts: Batch, empty: Batch, sampling: Sampling) -> Given:
  by_text = sampling.guide == "text" and sampling.guidance != 1.0
  batch = jax.tree.map(lambda *x: jnp.concatenate(x), prompts, empty) if by_text else prompts
  # A row's one picture is its target, of which nothing is seen.
  _, context = bound.read(batch, bound.features(batch) if batch.image_roles.shape[1] > 1 else None)
  target = jnp.argmax((batch.image_roles & TARGET) > 0, axis=1, keepdims=True)
  given = bound.conditioning(context, Place.of(batch, target))
  if sampling.guide == "null" and sampling.guidance != 1.0:
    if isinstance(given, tuple):
      raise UserError('sampling guide "null" is of a separate drawer, which this model has not; choose text or early')
    given = jnp.concatenate([given, jnp.zeros_like(given)])
  return bound.remember(given)


def _velocity(
  bound: ClipFlow, given: Given, sampling: Sampling, scale: jax.Array | float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Guided at this scale, or not at all where sampling's is 1."""
  if sampling.guidance == 1.0:
    return lambda x_t, t: bound.velocity(x_t, t, given)

  def pair(x_t, t):
    if sampling.guide == "early":
      return bound.predict(x_t, t, given)
    both = bound.velocity(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), given)
    rows = x_t.shape[0]
    return both[:rows], both[rows:]

  rule = guidance.internal if sampling.guide == "early" else guidance.classifier_free
  return rule(pair, scale, sampling.interval)


def decode(model: ClipFlow, params, features: jax.Array, keys: jax.Array) -> jax.Array:
  """Standardised features f32[B,T,C] -> pictures u8[B,H,W,3] by the model's decoder; keys key[B]: a flow's noise."""

  def run(bound: ClipFlow) -> jax.Array:
    if not bound.pixel_decoder.get("flow"):
      return bound.pixels(features)
    side = bound.pixel_decoder["image_size"]

    def velocity(x_t, t):  # pictures as [B,1,H*W,3] on the path's axes
      pictures = x_t.reshape(-1, side, side, 3)
      clean = bound.decode(features, pictures, t[:, 0]).reshape(x_t.shape)
      return path.velocity(clean, x_t, t)

    own = jax.vmap(lambda key: jax.random.fold_in(key, DECODER_KEY))(keys)
    noise = solvers.start(own, (1, side * side, 3))
    x = solvers.solve(velocity, noise, path.grid(DECODER_STEPS, 1.0), method="heun")
    return to_pixels(x.reshape(-1, side, side, 3))

  return model.apply({"params": params}, method=run)
