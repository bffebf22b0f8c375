"""What happens while a model draws and reads: the way from noise, the fields along it, words left out, attention.

Everything is in standardised features; `ClipFlow.decode` makes pictures of them, and `show` plots of the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.batch import Batch
from clipflow_jax.data import sequence
from clipflow_jax.errors import UserError
from clipflow_jax.flow import path
from clipflow_jax.inference import image
from clipflow_jax.inference.batching import jitted, keys_of, seeds_of
from clipflow_jax.inference.image import Sampling
from clipflow_jax.inference.pipeline import ClipFlow
from clipflow_jax.models.clipflow import ClipFlow as Model
from clipflow_jax.models.clipflow import Place

PICTURE = "▣"  # stands for a picture's token among words


@dataclasses.dataclass(frozen=True, eq=False)
class Fields:
  """Velocities f32[N,T,C] at the same x_t: those of the prompt, of no prompt, and of the early head (or None)."""

  prompted: np.ndarray
  unprompted: np.ndarray
  early: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Looks:
  """How much each query takes of each key, f32[L,h,Q,K], in every layer and head; what queries and keys are.

  answer: which of the queries are the words of an answer, and its end.
  """

  weights: np.ndarray
  queries: list[str]
  keys: list[str]
  answer: list[int] = dataclasses.field(default_factory=list)


class Inside:
  """A model with a flow expert, taken apart. It compiles each question once for each number of rows."""

  def __init__(self, model: ClipFlow):
    if not model.model.draws or model.model.drawer:
      raise UserError("to look inside the flow a model needs a flow expert; train a joint or a generation stage")
    self._model = model
    self._walk = jitted(functools.partial(_walk, model.model), static_argnames="sampling")
    self._predict = jitted(functools.partial(_predict, model.model))
    self._look = jitted(functools.partial(_look, model.model))
    self._read = jitted(functools.partial(_read, model.model))

  # Drawing.

  def trajectory(
    self, prompts: Sequence[str], steps: int | None = None, guidance: float | None = None, seed: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """How `ClipFlow.draw_features` gets there: times f32[n+1] from 1 to 0, and x_t f32[n+1,N,T,C] at each."""
    n = len(prompts)
    sampling, rows, empty = self._model.to_draw(prompts, steps, guidance)
    empty = jax.tree.map(lambda x: np.repeat(x, n, axis=0), empty)
    keys = keys_of(jnp.asarray(seeds_of(n, seed)))
    end, way = self._walk(self._model.params, rows, empty, keys, sampling=sampling)
    times = path.grid(sampling.steps, self._model.model.alpha)
    return np.asarray(times), np.concatenate([way, np.asarray(end)[None]])

  def fields(self, prompts: Sequence[str], x_t: np.ndarray, t: float) -> Fields:
    """The velocities at x_t f32[N,T,C] of N prompts, at time t. Guidance goes along prompted - unprompted."""
    rows, empty = self._rows(prompts)
    both = jax.tree.map(lambda *x: np.concatenate(x), rows, empty)
    full, early = self._predict(self._model.params, both, np.concatenate([x_t, x_t]), np.float32(t))
    n = len(prompts)
    return Fields(np.asarray(full[:n]), np.asarray(full[n:]), None if early is None else np.asarray(early[:n]))

  def losses(
    self, prompts: Sequence[str], pictures: np.ndarray, times: Sequence[float], seed: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error of the velocity of N pictures u8[N,H,W,3] at each time, f32[times,N]: prompted, unprompted.

    It is the training loss at one time instead of times by chance, without what it has of the early head.
    """
    x = jnp.asarray(self._model.encode(pictures))
    noise = jnp.asarray(np.random.default_rng(seed).normal(size=x.shape), jnp.float32)
    found = []
    for t in times:
      x_t = path.interpolate(x, noise, jnp.full(len(x), t))
      truth = np.asarray(path.velocity(x, x_t, jnp.full(len(x), t)))  # capped near t=0 as the network's is
      fields = self.fields(prompts, np.asarray(x_t), t)
      found.append([np.square(v - truth).mean(axis=(1, 2)) for v in (fields.prompted, fields.unprompted)])
    prompted, unprompted = np.array(found).swapaxes(0, 1)
    return prompted, unprompted

  def ablate(self, prompt: str, x_t: np.ndarray, t: float) -> tuple[list[str], np.ndarray]:
    """What each token of the prompt does at x_t f32[T,C]: its W tokens, and predicted clean features f32[W+1,T,C].

    The first prediction is of the whole prompt, each other one without a token: its slot becomes padding, which no
    other slot sees, and the others stay in their places.
    """
    row, _ = self._rows([prompt])
    slots = np.flatnonzero(row.segments[0])
    rows = jax.tree.map(lambda x: np.repeat(x, len(slots) + 1, axis=0), row)
    rows.segments[1 + np.arange(len(slots)), slots] = 0
    x = np.broadcast_to(x_t, (len(slots) + 1, *x_t.shape))
    v, _ = self._predict(self._model.params, rows, x, np.float32(t))
    clean = path.clean(v, jnp.asarray(x), jnp.full(len(x), np.float32(t)))
    return self._words(row)[: len(slots)], np.asarray(clean)

  # Attention.

  def look_drawing(self, prompt: str, x_t: np.ndarray, t: float) -> Looks:
    """Where the tokens of a picture in the making look: at the prompt's words and at each other; x_t f32[T,C]."""
    row, _ = self._rows([prompt])
    sown = self._look(self._model.params, row, x_t[None], np.float32(t))
    own = sown["flow"]
    weights = np.concatenate([sown["flow_early"], own]) if "flow_early" in sown else np.asarray(own)
    tokens, slots = len(x_t), row.segments.shape[1]
    times = weights.shape[-1] - slots - tokens  # tokens that tell the time stand before the picture's
    seen = [*np.flatnonzero(row.segments[0]), *range(slots, weights.shape[-1])]
    keys = [*self._words(row), *["t"] * times, *[PICTURE] * tokens]
    return Looks(weights[:, 0, times:].transpose(0, 2, 1, 3)[..., seen], [PICTURE] * tokens, keys)

  def look_reading(self, picture: np.ndarray, question: str, answer: str) -> Looks:
    """Where each slot of a question about a picture u8[H,W,3] and of its answer looks: at pictures and words before."""
    model = self._model
    row = model.rows([sequence.read(picture, ((question, answer),), model.wording.ask)])
    weights = self._read(model.params, row, model.encode(picture[None])[:, None])["text"]
    slots = np.flatnonzero(row.segments[0])
    words = self._words(row)
    answered = np.flatnonzero(row.loss_weights[0, slots]).tolist()  # a weight for each word that is the model's
    return Looks(np.asarray(weights)[:, 0].transpose(0, 2, 1, 3)[:, :, slots][..., slots], words, words, answered)

  def _rows(self, prompts: Sequence[str]) -> tuple[Batch, Batch]:
    """The prompts as rows, and as many without a prompt, all of one length."""
    rows = self._model.prompt_rows([*prompts, *[""] * len(prompts)])
    n = len(prompts)
    return jax.tree.map(lambda x: x[:n], rows), jax.tree.map(lambda x: x[n:], rows)

  def _words(self, row: Batch) -> list[str]:
    """What stands in each slot of a row."""
    used = row.segments[0] > 0
    names = self._model.tokenizer.tokenizer.convert_ids_to_tokens(row.tokens[0][used].tolist())
    words = [name.replace("Ġ", "") for name in names]  # byte-level tokenizers write spaces so
    return [PICTURE if index >= 0 else word for word, index in zip(words, row.image_index[0][used], strict=True)]


# The compiled questions; model and sampling are closed over.


def _walk(model: Model, params: Any, rows: Batch, empty: Batch, keys: jax.Array, *, sampling: Sampling):
  return image.walk(model, params, rows, empty, keys, sampling)


def _at(bound: Model, rows: Batch, x_t: jax.Array, t: jax.Array):
  """(full, early) velocities f32[B,T,C] of the rows' pictures at x_t f32[B,T,C] and one t."""
  _, context = bound.read(rows, None)
  place = Place(rows.image_segments[:, :1], rows.image_order[:, :1], rows.image_positions[:, :1])
  full, early = bound.predict(x_t[:, None], jnp.full((len(x_t), 1), t), bound.conditioning(context, place))
  return full[:, 0], None if early is None else early[:, 0]


def _predict(model: Model, params: Any, rows: Batch, x_t: jax.Array, t: jax.Array):
  return model.apply({"params": params}, method=lambda bound: _at(bound, rows, x_t, t))


def _look(model: Model, params: Any, rows: Batch, x_t: jax.Array, t: jax.Array) -> dict[str, jax.Array]:
  _, sown = model.apply({"params": params}, method=lambda bound: _at(bound, rows, x_t, t), mutable=["intermediates"])
  return _looks(sown)


def _read(model: Model, params: Any, rows: Batch, features: jax.Array) -> dict[str, jax.Array]:
  _, sown = model.apply({"params": params}, rows, features, method="read", mutable=["intermediates"])
  return _looks(sown)


def _looks(sown: Any) -> dict[str, jax.Array]:
  """{stack: f32[L,B,Q,h,K]} of what `models.attention` leaves behind."""
  stacks = sown["intermediates"]["language_model"]
  return {name: stack["layers"]["attention"]["looks"][0] for name, stack in stacks.items() if "layers" in stack}
