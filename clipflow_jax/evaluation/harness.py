"""Our model as lm-evaluation-harness and lmms-eval call one. Neither is a dependency: who measures with it has it.

  import lm_eval
  from clipflow_jax.evaluation import harness
  lm_eval.simple_evaluate(harness.language(ClipFlow.from_checkpoint("runs/joint")), tasks=["arc_easy"])

A context is the user's turn and what follows it the assistant's, by the model's own chat template. Of a context that is
longer than the model's rows the end is kept, as the harness's own models do. Settings that count are `until`,
`max_gen_toks` or `max_new_tokens`, and with `do_sample` the `temperature`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipflow_jax.data import sequence
from clipflow_jax.data.images import square
from clipflow_jax.errors import UserError
from clipflow_jax.inference import writing

if TYPE_CHECKING:
  from clipflow_jax.inference.messages import Message
  from clipflow_jax.inference.pipeline import ClipFlow

log = logging.getLogger(__name__)

_NEW = 256  # tokens of an answer at most where a task does not say, as in lm_eval
_SPARE = 8  # tokens by which a text may grow where it is cut


def language(model: ClipFlow) -> Any:
  """An lm_eval.api.model.LM for tasks of words alone. UserError where lm_eval is not installed."""
  try:
    from lm_eval.api.model import LM
  except ImportError as error:
    raise UserError('lm-evaluation-harness is not installed: pip install "clipflow_jax[harness]"') from error
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
    empty = sequence.talked((("", ""),), np.zeros((0, 0, 3), np.uint8))
    self.room = model.longest - int(model.rows([empty]).segments.sum()) - _SPARE  # for words

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(log-probability, whether greedy decoding writes it) of each continuation; args: (context, continuation)."""
    continuations = [continuation.strip() for _, continuation in _args(requests)]
    contexts = [
      self._end(context, self.room - len(self._starts(continuation)))
      for (context, _), continuation in zip(_args(requests), continuations, strict=True)
    ]
    found = self.model.likelihood(contexts, continuations, end=False)
    return list(zip(map(float, found.log_p), map(bool, found.greedy), strict=True))

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """The log-probability of each text after an empty turn of the user; args: (text,).

    A text that is longer than a row is cut into pieces, each told without the others.
    """
    cut = [self._pieces(text) for (text,) in _args(requests)]
    pieces = [piece for own in cut for piece in own]
    log_p = self.model.likelihood([""] * len(pieces), pieces, end=False).log_p
    ends = np.cumsum([len(own) for own in cut])[:-1]
    return [float(part.sum()) for part in np.split(np.asarray(log_p, np.float64), ends)]

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """The answer to each context, up to the first of its `until`; args: (context, settings)."""
    talks = [_turn(self._end(context, self.room), []) for context, _ in _args(requests)]
    return _write(self.model, talks, [settings for _, settings in _args(requests)])

  def _starts(self, text: str) -> list[int]:
    """Where in a text its tokens start."""
    told = self.model.tokenizer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [start for start, _ in told["offset_mapping"]]

  def _end(self, text: str, tokens: int) -> str:
    """The last so many tokens of a text."""
    starts = self._starts(text)
    if len(starts) <= tokens:
      return text
    log.warning("a context of %d tokens is cut to its last %d", len(starts), tokens)
    return text[starts[-max(1, tokens)] :]

  def _pieces(self, text: str) -> list[str]:
    cuts = self._starts(text)[:: self.room] or [0]
    return [text[a:b] for a, b in zip([0, *cuts[1:]], [*cuts[1:], len(text)], strict=True)]


class Pictures:
  """The calls of lmms_eval, which hands out pictures by a function of a task's document.

  args: (context, settings, doc_to_visual, document, task, split), and for likelihoods doc_to_target for settings.
  """

  task_dict: Any  # {task: {split: documents}}, which lmms_eval sets

  def __init__(self, model: ClipFlow):
    super().__init__()
    self.model = model

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """The answer about each request's pictures, up to the first of its `until`."""
    talks = [
      _turn(context, visual(self.task_dict[task][split][document]))
      for context, _, visual, document, task, split in _args(requests)
    ]
    return _write(self.model, talks, [settings for _, settings, *_ in _args(requests)])

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(minus the mean log-probability per token, whether greedy decoding writes it), as lmms_eval's models return.

    lmms_eval 0.7.3 itself makes a text of each such pair and then fails to score it, whatever the model; tasks whose
    answers are written are not concerned. UserError for a request with more or fewer than one picture.
    """
    contexts, targets, images = [], [], []
    for context, target, visual, number, task, split in _args(requests):
      document = self.task_dict[task][split][number]
      shown = visual(document)
      if len(shown) != 1:
        raise UserError(f"{task}: likelihoods are told of one picture, document {number} has {len(shown)}")
      contexts.append(context)
      targets.append((target if isinstance(target, str) else target(document)).strip())
      images.append(square(shown[0], self.model.image_size))
    found = self.model.likelihood(contexts, targets, np.stack(images), end=False)
    losses = -found.log_p / np.maximum(found.tokens, 1)
    return list(zip(map(float, losses), map(bool, found.greedy), strict=True))

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    raise UserError("tasks of several rounds are not supported")


def _args(requests: Sequence[Any]) -> list[tuple[Any, ...]]:
  return [request.args for request in requests]


def _turn(context: str, images: Sequence[Any]) -> list[Message]:
  parts = [{"type": "image", "image": image} for image in images]
  return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]


def _write(model: ClipFlow, talks: Sequence[list[Message]], settings: Sequence[dict[str, Any]]) -> list[str]:
  """What the model answers, in batches of its size."""
  answers: list[str] = []
  for start in range(0, len(talks), model.batch_size):
    asked = settings[start : start + model.batch_size]
    *_, written = writing.stream(
      model,
      talks[start : start + model.batch_size],
      new=[int(one.get("max_gen_toks") or one.get("max_new_tokens") or _NEW) for one in asked],
      temperature=[float(one.get("temperature") or 0) if one.get("do_sample") else 0.0 for one in asked],
      seeds=list(range(start, start + len(asked))),
    )
    answers += [_until(one.text, own) for one, own in zip(written, asked, strict=True)]
  return answers


def _until(text: str, settings: dict[str, Any]) -> str:
  """The text up to the first of the settings' ends."""
  ends = settings.get("until") or []
  for end in [ends] if isinstance(ends, str) else ends:
    text = text.split(end)[0] if end else text
  return text
