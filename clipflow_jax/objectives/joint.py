"""The loss of a stage: a weighted sum of objectives, each computed only where it has a weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from clipflow_jax.batch import Batch
from clipflow_jax.errors import UserError, resolve
from clipflow_jax.models.clipflow import ClipFlow
from clipflow_jax.objectives import contrastive, flow, language, pixels

NAMES = ("contrastive", "caption", "readout", "language", "flow", "pixels")
PAIRED = {"contrastive", "caption", "readout"}  # of one picture and its caption a row


@dataclasses.dataclass(frozen=True)
class Objective:
  """weights: name -> weight, of NAMES and `own`. The other fields are those objectives' own settings.

  own: name -> "module:function" of an objective of yours, (bound model, batch, key[B]) -> each row's loss f32[B].
  """

  weights: dict[str, float]
  own: dict[str, str] = dataclasses.field(default_factory=dict)
  levels: int = 1
  early: float = 0.0
  targets: int = 0
  drop_condition: float = 0.0  # share of pictures whose separate drawer is told nothing
  decoder_noise: float = 0.5
  decoder_edges: float = 10.0
  stop_text: bool = False  # the text expert is frozen: its keys and values carry no gradient
  z_loss: float = 0.0  # weight within "language" of keeping the softmax's denominator near 1
  vocabulary_chunk: int = 0  # slots of a row whose logits are there at once (0: all)
  contrastive_chunk: int = 0  # texts that the batch's images are compared with at once (0: all)

  def __post_init__(self):
    unknown = set(self.weights) - set(NAMES) - set(self.own)
    if unknown or not any(self.weights.values()):
      known = ", ".join((*NAMES, *self.own))
      raise UserError(f"objective.weights {dict(self.weights)} must name at least one of {known}, and no other")
    if not all(0 <= weight < math.inf for weight in self.weights.values()):
      raise UserError(f"objective.weights {dict(self.weights)}: give numbers from 0")
    least = dict(levels=1) | dict.fromkeys(("targets", "vocabulary_chunk", "contrastive_chunk", "early", "z_loss"), 0)
    for name, low in (least | dict(drop_condition=0, decoder_noise=0, decoder_edges=0)).items():
      if not low <= getattr(self, name) < math.inf:
        raise UserError(f"objective.{name} is {getattr(self, name)}: give {low} or more")
    if self.drop_condition > 1:
      raise UserError(f"objective.drop_condition is {self.drop_condition}: give a share from 0 to 1")
    for name in self.own:
      if name in NAMES or "_" in name:
        raise UserError(f"objective.own.{name}: choose a name without underscore that is none of {', '.join(NAMES)}")
      self._of_own(name)

  def _of_own(self, name: str) -> Callable[[ClipFlow, Batch, jax.Array], jax.Array]:
    return resolve(f"objective.own.{name}", self.own[name])

  def counts(self, batch: Batch) -> dict[str, jax.Array]:
    """How many things each sum of `sums` adds up in this batch, at least 1."""
    rows = jnp.float32(batch.tokens.shape[0])
    words = language.weight(batch.segments, batch.loss_weights)
    counts = {"contrastive": rows, "caption": words, "readout": rows, "language": words}
    counts["flow"] = flow.count(batch, self.targets)
    counts["pixels"] = (batch.image_roles > 0).sum()
    counts |= dict.fromkeys(self.own, rows)
    return {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in counts.items()}

  def check(self, model: ClipFlow, batch: Batch) -> None:
    """UserError where the model, or a batch of these shapes, has not what an objective with a weight is made of."""
    on = {name for name, weight in self.weights.items() if weight}
    if not model.clip:
      raise UserError("model.clip is empty, which is for talking alone: give it a tower, as small as you like")
    if "flow" in on and self.early and not (model.transformer or {}).get("early_layer"):
      raise UserError("objective.early needs model.transformer.early_layer: set that, or early to 0")
    if batch.images is None and (blind := sorted(on - {"language", "flow", *self.own})):
      raise UserError(f"objective.weights: {', '.join(blind)} need pictures, and data.features has none; unset one")
    text, captioner = model.clip.get("text"), ("model.clip.captioner", model.clip.get("captioner"))
    made_of = {
      "contrastive": ("model.clip.text, which an import brings only with its tokenizer", text),
      "caption": captioner,
      "readout": captioner,
      "language": ("model.transformer", model.transformer),
      "flow": ("model.transformer.flow_width or model.drawer", model.draws),
      "pixels": ("model.pixel_decoder", model.pixel_decoder),
    }
    for name, (part, there) in made_of.items():
      if name in on and not there:
        raise UserError(f"objective.weights: {name} needs {part}; unset the weight, or give the model that part")
    pictures, words = batch.image_roles.shape[1], batch.tokens.shape[1]
    if on & PAIRED and pictures != 1:
      raise UserError(
        f"objective.weights: for {', '.join(sorted(on & PAIRED))} a row is one picture and its caption; "
        f"set data.images_per_row to 1, not {pictures}"
      )
    if "contrastive" in on and words > text["length"]:
      raise UserError(
        f"data.length {words} is more than the {text['length']} words that model.clip.text reads; "
        f"lower it to {text['length']}, or raise model.clip.text.length"
      )

  def sums(self, model: ClipFlow, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
    """Each objective's sum over the batch, and its metrics' (objective_metric). model: bound; keys key[B]."""
    self.check(model, batch)
    on = {name for name, weight in self.weights.items() if weight}
    sums: dict[str, jax.Array] = {}
    if on & PAIRED:
      sums |= contrastive.losses(
        model, batch, self.weights, chunk=self.contrastive_chunk, vocabulary_chunk=self.vocabulary_chunk
      )
    if on & {"language", "flow", "pixels"}:
      features = model.features(batch)
    if on & {"language", "flow"}:
      hidden, context = model.read(batch, features)
      if "language" in on:
        found = language.predict_next(
          hidden,
          model.language_model.unembedding(),
          batch.tokens,
          batch.segments,
          batch.loss_weights,
          z_loss=self.z_loss,
          chunk=self.vocabulary_chunk,
        )
        sums |= {"language": found.loss, "language_accuracy": found.right}
        if self.z_loss:
          sums["language_z"] = found.z
      if "flow" in on:
        context = jax.lax.stop_gradient(context) if self.stop_text else context
        sums |= flow.losses(
          model,
          batch,
          features,
          context,
          keys,
          levels=self.levels,
          early=self.early,
          targets=self.targets,
          drop=self.drop_condition,
        )
    if "pixels" in on:
      side = model.pixel_decoder["image_size"]  # less than the pictures' where the tower leaves out a margin
      flat = batch.images.reshape(-1, *batch.images.shape[2:])[:, :side, :side]
      each = jax.vmap(lambda key: jax.random.split(key, batch.images.shape[1]))(keys).reshape(-1)
      sums |= pixels.losses(
        model,
        flat,
        features.reshape(-1, *features.shape[2:]),
        batch.image_roles.reshape(-1) > 0,
        each,
        noise=self.decoder_noise,
        edges=self.decoder_edges,
      )
    for name in sorted(on & set(self.own)):
      sums[name] = self._of_own(name)(model, batch, keys).sum()
    return sums

  def loss(self, sums: dict[str, jax.Array], counts: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(weighted loss, all metrics as means). With the counts of a larger batch, its parts' losses add up."""
    means = {name: value / counts[name.split("_")[0]] for name, value in sums.items()}
    total = sum((weight * means[name] for name, weight in self.weights.items() if weight), jnp.float32(0))
    return total, means | {"loss": total}
