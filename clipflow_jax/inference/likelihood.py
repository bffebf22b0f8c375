"""How likely are given words? One compiled pass over prompt and words together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from clipflow_jax.batch import Batch
from clipflow_jax.data import sequence
from clipflow_jax.errors import UserError
from clipflow_jax.inference.batching import listed
from clipflow_jax.models.clipflow import ClipFlow as Model

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow


@flax.struct.dataclass
class Likelihood:
  """Of the words that are to be predicted in each row; arrays [B]."""

  log_p: jax.Array  # f32 the sum of the logarithms of their probabilities
  tokens: jax.Array  # i32 how many they are
  greedy: jax.Array  # bool whether each is the likeliest: what greedy decoding would write


def likelihood(model: Model, params, rows: Batch, features: jax.Array | None, *, end: int | None) -> Likelihood:
  """Likelihood of the words with loss_weights > 0 in rows of one example each; features f32[B,N,T,C] of their pictures.

  end: a token that is not counted although it has weight, as the end of a turn in comparisons with other programs; None
  counts all. Pure; jit it with model and end closed over.
  """

  def run(bound: Model) -> Likelihood:
    hidden, _ = bound.read(rows, features)
    logits = bound.logits(hidden[:, :-1])
    targets = rows.tokens[:, 1:]
    counted = (rows.segments[:, 1:] > 0) & (rows.loss_weights[:, 1:] > 0)
    if end is not None:
      counted &= targets != end
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    likeliest = logits.argmax(axis=-1) == targets
    return Likelihood(
      jnp.where(counted, taken, 0.0).sum(axis=1), counted.sum(axis=1), jnp.all(likeliest | ~counted, axis=1)
    )

  return model.apply({"params": params}, method=run)


def told(
  model: ClipFlow,
  questions: Sequence[str],
  answers: Sequence[str],
  images: np.ndarray | None,
  *,
  features: np.ndarray | None,
  end: bool,
) -> Likelihood:
  """As `ClipFlow.likelihood`: the questions with their answers as rows, through one program."""
  model.need("transformer", "tell how likely words are")
  questions = listed("questions", questions)
  answers = listed("answers", answers, len(questions))
  for what, given in (("pictures", images), ("pictures' features", features)):
    if given is not None and len(given) != len(questions):
      raise UserError(f"{len(given)} {what} for {len(questions)} questions: give one for each")
  # In the place of pictures that are not looked at: where their features are given no pixels are needed.
  blank = model.blank() if features is None else np.zeros((0, 0, 3), np.uint8)
  looked = [blank] * len(questions) if images is None else model.checked(images)
  pairs = zip(looked, questions, answers, strict=True)
  if images is None and features is None:
    rows = model.rows([sequence.talked(((q, a),), x) for x, q, a in pairs])
  else:
    rows = model.rows([sequence.read(x, ((q, a),), model.wording.ask) for x, q, a in pairs])
  if features is not None:
    rows = dataclasses.replace(rows, images=None, features=np.asarray(features, np.float32)[:, None])
  not_counted = None if end else model.tokenizer.end

  def run(params, rows):
    seen = model.model.apply({"params": params}, rows, method="features") if rows.image_roles.shape[1] else None
    found = likelihood(model.model, params, rows, seen, end=not_counted)
    return jnp.stack([found.log_p, found.tokens, found.greedy], axis=1)

  log_p, tokens, greedy = model.batched(("likelihood", end), run, (rows,)).T
  return Likelihood(log_p, tokens.astype(np.int32), greedy > 0)
