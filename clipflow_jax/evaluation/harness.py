"""Our model as lm-evaluation-harness and lmms-eval call one. Neither is a dependency: who measures with it has it.

  import lm_eval
  from clipflow_jax.evaluation import harness
  lm_eval.simple_evaluate(harness.language(ClipFlow.from_checkpoint("runs/joint")), tasks=["arc_easy"])

A context is the user's turn and what follows it the assistant's, by the model's own chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipflow_jax.data.images import square
from clipflow_jax.errors import UserError

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow


def language(model: ClipFlow) -> Any:
  """An lm_eval.api.model.LM for tasks of words alone. UserError where lm_eval is not installed."""
  try:
    from lm_eval.api.model import LM
  except ImportError as error:
    raise UserError("lm-evaluation-harness is not installed: pip install lm_eval") from error
  return type("ClipFlowLanguage", (Words, LM), {})(model)


def pictures(model: ClipFlow) -> Any:
  """An lmms_eval.api.model.lmms for tasks with pictures. UserError where lmms_eval is not installed."""
  try:
    from lmms_eval.api.model import lmms
  except ImportError as error:
    raise UserError("lmms-eval is not installed: pip install lmms_eval") from error
  return type("ClipFlowPictures", (Pictures, lmms), {})(model)


class Words:
  """The three calls of lm_eval. A request's `args` are what it asks."""

  def __init__(self, model: ClipFlow):
    super().__init__()
    self.model = model

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(log-probability, whether greedy decoding writes it) of each continuation; args: (context, continuation)."""
    contexts, continuations = zip(*(request.args for request in requests), strict=True)
    found = self.model.likelihood(list(contexts), [text.strip() for text in continuations], end=False)
    return list(zip(map(float, found.log_p), map(bool, found.greedy), strict=True))

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """The log-probability of each text after an empty turn of the user; args: (text,)."""
    texts = [request.args[0] for request in requests]
    return list(map(float, self.model.likelihood([""] * len(texts), texts, end=False).log_p))

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """The greedy answer to each context, up to the first of its `until`; args: (context, {"until": [...]})."""
    return [_until(self.model.chat(_turn(context, [])), settings) for context, settings in _args(requests)]


class Pictures:
  """The calls of lmms_eval, which hands out pictures by a function of a task's document.

  args: (context, settings, doc_to_visual, document, task, split), and for likelihoods doc_to_target for settings.
  """

  task_dict: Any  # {task: {split: documents}}, which lmms_eval sets

  def __init__(self, model: ClipFlow):
    super().__init__()
    self.model = model

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """The greedy answer about each request's pictures."""
    return [
      _until(self.model.chat(_turn(context, visual(self.task_dict[task][split][document]))), settings)
      for context, settings, visual, document, task, split in _args(requests)
    ]

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(minus the mean log-probability per token, whether greedy decoding writes it), as lmms_eval's models return.

    UserError for a request with more or fewer than one picture.
    """
    contexts, targets, images = [], [], []
    for context, target, visual, number, task, split in _args(requests):
      document = self.task_dict[task][split][number]
      shown = visual(document)
      if len(shown) != 1:
        raise UserError(f"{task}: likelihoods are told of one picture, document {number} has {len(shown)}")
      contexts.append(context)
      targets.append(target if isinstance(target, str) else target(document))
      images.append(square(shown[0], self.model.image_size))
    found = self.model.likelihood(contexts, targets, np.stack(images), end=False)
    losses = -found.log_p / np.maximum(found.tokens, 1)
    return list(zip(map(float, losses), map(bool, found.greedy), strict=True))

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    raise UserError("tasks of several rounds are not supported")


def _args(requests: Sequence[Any]) -> list[tuple[Any, ...]]:
  return [request.args for request in requests]


def _turn(context: str, images: Sequence[Any]) -> list[dict[str, Any]]:
  parts = [{"type": "image", "image": image} for image in images]
  return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]


def _until(text: str, settings: dict[str, Any]) -> str:
  """The text up to the first of the settings' ends."""
  ends = settings.get("until") or []
  for end in [ends] if isinstance(ends, str) else ends:
    text = text.split(end)[0] if end else text
  return text
