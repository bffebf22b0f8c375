"""Contrastive image-text loss with its two side losses: captions and a linear read-out of pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipflow_jax.batch import Batch
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.models.layers import to_patches, to_unit
from clipflow_jax.models.vision import Seen
from clipflow_jax.objectives import language

Sums = dict[str, jax.Array]


def match(images: jax.Array, texts: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """InfoNCE (Radford et al. 2021) of unit embeddings f32[B,E]: (loss f32[B], image found text bool[B])."""
  logits = scale * images @ texts.T
  diagonal = jnp.diagonal(logits)
  loss = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2 * diagonal
  return loss / 2, logits.argmax(axis=1) == jnp.arange(len(logits))


def losses(model: ClipFlow, batch: Batch, weights: dict[str, float]) -> Sums:
  """Sums over rows, one example and picture each, of those of contrastive, caption, readout with a weight."""
  clip = model.clip_model
  seen: Seen = clip.see(batch.images[:, 0], with_features=False)
  sums: Sums = {}
  if weights.get("contrastive"):
    # Only the caption's own words: what frames it in the stream says nothing.
    texts = clip.embed_text(batch.tokens, batch.loss_weights > 0)
    loss, found = match(seen.embedding, texts, clip.temperature())
    sums |= {"contrastive": loss.sum(), "contrastive_accuracy": found.sum()}
  if weights.get("caption"):
    logits = clip.caption_logits(batch.tokens, seen.tokens, batch.segments)
    loss, right = language.predict_next(logits, batch.tokens, batch.segments, batch.loss_weights)
    sums |= {"caption": loss, "caption_accuracy": right}
  if weights.get("readout"):
    truth = to_patches(to_unit(batch.images[:, 0]), model.clip["vision"]["patch_size"])
    sums["readout"] = jnp.square(clip.read_pixels(seen.tokens) - truth).mean(axis=(1, 2)).sum()
  return sums
