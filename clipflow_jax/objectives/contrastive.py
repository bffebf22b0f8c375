"""Contrastive image-text loss with its two side losses: captions and a linear read-out of pixels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from clipflow_jax.batch import Batch
from clipflow_jax.errors import UserError
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.models.layers import to_patches, to_unit
from clipflow_jax.models.vision import Seen
from clipflow_jax.objectives import language
from clipflow_jax.parallel.sharding import shard

Sums = dict[str, jax.Array]


def match(
  images: jax.Array, texts: jax.Array, scale: jax.Array, chunk: int = 0, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """InfoNCE (Radford et al. 2021) of unit embeddings f32[B,E]: (loss f32[B], image found text bool[B]).

  bias: added to the similarities, of which each pair is then judged alone (SigLIP, Zhai et al. 2023).
  chunk: compare with so many texts at a time, forwards and backwards, so that the B x B similarities are never there at
  once (0, or as many as there are: all at once). Over a mesh each chip holds its own images' rows of them. UserError if
  chunk does not divide a larger B.
  """
  rows = len(images)
  if not chunk or rows <= chunk:
    logits = scale * images @ texts.T
    diagonal, found = jnp.diagonal(logits), logits.argmax(axis=1) == jnp.arange(rows)
    if bias is not None:
      # -log sigmoid(x) of its own text is softplus(x) - x, -log sigmoid(-x) of the others softplus(x).
      return jax.nn.softplus(logits + bias).sum(axis=1) - diagonal - bias, found
    loss = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2 * diagonal
    return loss / 2, found
  if rows % chunk:
    raise UserError(f"objective.contrastive_chunk {chunk} does not divide the batch of {rows}; choose one that does")

  @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan's body: nothing to protect from being merged
  def compare(found, part):
    of_image, best, where = found
    texts, first = part
    logits = shard(scale * images @ texts.T, "batch")
    largest = logits.max(axis=1)
    where = jnp.where(largest > best, first + logits.argmax(axis=1), where)
    best = jnp.maximum(best, largest)
    if bias is not None:
      return (of_image + jax.nn.softplus(logits + bias).sum(axis=1), best, where), None
    of_image = jnp.logaddexp(of_image, jax.nn.logsumexp(logits, axis=1))
    return (of_image, best, where), jax.nn.logsumexp(logits, axis=0)

  every = shard(texts, None)  # a vector a text is little beside what is computed with it
  parts = every.reshape(-1, chunk, every.shape[-1]), jnp.arange(0, rows, chunk)
  lowest = jnp.full(rows, -jnp.inf)
  begin = lowest if bias is None else jnp.zeros(rows)
  (of_image, _, where), of_text = jax.lax.scan(compare, (begin, lowest, jnp.zeros(rows, jnp.int32)), parts)
  diagonal, found = scale * (images * texts).sum(axis=1), where == jnp.arange(rows)
  if bias is not None:
    return of_image - diagonal - bias, found
  return (of_image + of_text.reshape(rows) - 2 * diagonal) / 2, found


def losses(
  model: ClipFlow, batch: Batch, weights: dict[str, float], *, chunk: int = 0, vocabulary_chunk: int = 0
) -> Sums:
  """Sums over rows, one example and picture each, of those of contrastive, caption, readout with a weight.

  chunk: as in `match`; vocabulary_chunk: as `chunk` of `language.predict_next`.
  """
  clip = model.clip_model
  aside = weights.get("caption") or weights.get("readout")
  seen: Seen = clip.see(batch.images[:, 0], "tokens" if aside else "embedding")
  sums: Sums = {}
  if weights.get("contrastive"):
    # Only the caption's own words: to their mean what frames it in the stream says nothing.
    texts = clip.embed_text(batch.tokens, batch.loss_weights > 0)
    bias = clip.logit_bias if clip.pairwise else None
    loss, found = match(seen.embedding, texts, clip.temperature(), chunk, bias)
    sums |= {"contrastive": loss.sum(), "contrastive_accuracy": found.sum()}
  if weights.get("caption"):
    hidden = clip.caption(batch.tokens, seen.tokens, batch.segments)
    matrix = clip.caption_model.unembedding()
    words = language.predict_next(
      hidden, matrix, batch.tokens, batch.segments, batch.loss_weights, chunk=vocabulary_chunk, axes=("rows", None)
    )
    sums |= {"caption": words.loss, "caption_accuracy": words.right}
  if weights.get("readout"):
    truth = to_patches(to_unit(batch.images[:, 0]), model.clip["vision"]["patch_size"])
    sums["readout"] = jnp.square(clip.read_pixels(seen.tokens) - truth).mean(axis=(1, 2)).sum()
  return sums
