"""Best of N: candidates are drawn as features and judged as features; only the best becomes pixels.

The model reads the features it draws, so judging costs a read, not a decoding (Scale-RAE, 2026, calls it latent
test-time scaling). CLIP alone may have to look at pictures: where the features are not all that it reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import linen as nn

from clipflow_jax.data.mixture import DESCRIBE
from clipflow_jax.errors import UserError
from clipflow_jax.inference.batching import seeds_of
from clipflow_jax.models.clipflow import ClipFlow as Model
from clipflow_jax.models.layers import Linear
from clipflow_jax.models.vision import AttentionPool, raw_features, unit

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

ASK = "does the picture show {}? answer yes or no."


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
  """N drawings of each of P prompts."""

  features: np.ndarray  # f32[P,N,T,C]
  scores: np.ndarray  # f32[P,N], higher is better; comparable within a prompt only

  @property
  def best(self) -> np.ndarray:
    """Features f32[P,T,C] of each prompt's best candidate."""
    return self.features[np.arange(len(self.scores)), self.scores.argmax(axis=1)]


def draw(
  model: ClipFlow,
  prompts: Sequence[str],
  n: int,
  *,
  judge: str = "caption",
  seed: int | Sequence[int] = 0,
  **sampling: Any,
) -> Candidates:
  """Draws n candidates of every prompt and has them judged by one of JUDGES.

  seed, sampling: as `ClipFlow.draw_features`; of one seed for each prompt its candidates are drawn as with it alone.
  """
  check(n, judge)
  repeated = [prompt for prompt in prompts for _ in range(n)]
  seeds: Any = seed
  if not isinstance(seed, int | np.integer):
    seeds = np.repeat(seeds_of(len(prompts), seed), n, axis=0)
    seeds[:, 1] = np.tile(np.arange(n), len(prompts))
  features = model.draw_features(repeated, seed=seeds, **sampling)
  scores = JUDGES[judge](model, features, repeated)
  return Candidates(features.reshape(len(prompts), n, *features.shape[1:]), scores.reshape(len(prompts), n))


def check(n: int, judge: str) -> None:
  """UserError where one of JUDGES cannot choose the best of n."""
  if n < 1:
    raise UserError(f"the best of {n} candidates is none; choose 1 or more")
  if judge not in JUDGES:
    raise UserError(f"judge {judge!r} is unknown; choose one of {', '.join(JUDGES)}")


def by_caption(model: ClipFlow, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
  """f32[N]: how likely the language model describes each drawing by its prompt."""
  return np.asarray(model.likelihood([DESCRIBE] * len(prompts), prompts, features=features).log_p)


def by_yes(model: ClipFlow, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
  """f32[N]: how much likelier yes is than no, when asked whether the drawing shows its prompt."""
  asked = [ASK.format(prompt) for prompt in prompts]
  yes, no = (model.likelihood(asked, [word] * len(asked), features=features).log_p for word in ("yes", "no"))
  return np.asarray(yes - no)


def by_clip(model: ClipFlow, features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
  """f32[N]: cosine of each drawing and its prompt in CLIP's space; of what `clip_reads` not, each is decoded for it."""
  if clip_reads(model.model):
    seen = model.batched(("embed_features",), functools.partial(embed_features, model.model), (features,))
  else:
    seen = model.embed_image(model.decode(features))
  return np.sum(seen * model.embed_text(prompts), axis=1)


JUDGES: dict[str, Callable[[ClipFlow, np.ndarray, Sequence[str]], np.ndarray]] = {
  "caption": by_caption,
  "yes": by_yes,
  "clip": by_clip,
}


def clip_reads(model: Model) -> bool:
  """Whether the features are what CLIP's embedding is made of: its last layer's, of every token that it pools."""
  tower = model.clip["vision"]
  last = tuple(tower.get("feature_layers", ())) == (tower["layers"],) or tower["layers"] == 1
  pools_them = tower.get("pooling", "mean") != "class" and not tower.get("has_class")
  return last and pools_them and tower.get("feature_pool", 1) == 1


def embed_features(model: Model, params: Any, features: jax.Array) -> jax.Array:
  """CLIP embeddings f32[N,E] of standardised features f32[N,T,C] that `clip_reads`, by what its tower does last."""
  tower = model.clip["vision"]
  eps = tower.get("norm_eps", 1e-6)
  held = params["clip_model"]["vision_tower"]
  x = raw_features(features, params["statistics"])
  x = nn.LayerNorm(eps).apply({"params": held["out_norm"]}, x)
  if tower.get("pooling", "mean") == "attention":
    pool = AttentionPool(tower["heads"], tower["mlp"], tower.get("activation", "gelu_tanh"), eps)
    x = pool.apply({"params": held["pool"]}, x)
  else:
    x = x.mean(axis=1)
  if tower["embedding"]:
    x = Linear(tower["embedding"], tower.get("projection_bias", False)).apply({"params": held["projection"]}, x)
  return unit(x)
