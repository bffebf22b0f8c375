"""Writing for those who read along: the words of `ClipFlow.chat`, a few at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from clipflow_jax.data.text import Chat
from clipflow_jax.inference import text
from clipflow_jax.inference.batching import bucket, keys_of, padded, seeds_of
from clipflow_jax.inference.messages import Message, conversation
from clipflow_jax.inference.pipeline import ClipFlow


@dataclasses.dataclass(frozen=True)
class Written:
  """What has been written so far. finish: "stop", the model ended it; "length", it may be no longer; "", it goes on."""

  text: str
  tokens: int
  finish: str


def stream(
  model: ClipFlow,
  talks: Sequence[list[Message]],
  *,
  new: Sequence[int],
  temperature: Sequence[float],
  seeds: Sequence[int],
  every: int = 8,
  room: int = 0,
) -> Iterator[list[Written]]:
  """Goes on with conversations side by side: yields what is written in each, every few words, until all are finished.

  talks: each as in `chat`. new: words at most; temperature: 0 for the likeliest words; seeds: of each. What is
  written is a function of these alone, whatever is beside it. A character of which a part is missing is held back.
  room: words to make room for at least; the same for all calls, it spares compiling for each.
  """
  model.need("transformer", "chat")
  n = len(talks)
  part = padded(n)
  rows = model.rows([conversation(model, talks[i]) for i in part], prompt=True)
  heat, noise = np.asarray(temperature, np.float32)[part], seeds_of(n, seeds)[part]
  room = bucket(max(room, *new), every)

  def begin(params, rows, heat, noise):
    features = model.model.apply({"params": params}, rows, method="features") if rows.images.shape[1] else None
    return text.begin(model.model, params, rows, features, room=room, choose=text.sampled(heat, keys_of(noise)))

  def go_on(params, writing, heat, noise):
    chosen = text.sampled(heat, keys_of(noise))
    return text.go_on(model.model, params, writing, new=every, ends=model.tokenizer.ends, choose=chosen)

  begin = model.programs.jitted(("begin", room), begin)
  go_on = model.programs.jitted(("go_on", every), go_on, donate_argnums=1)
  writing = begin(model.params, rows, heat, noise)
  words = np.zeros((len(part), 0), np.int32)
  written: list[Written] = []
  while not written or not all(one.finish for one in written):
    writing, more = go_on(model.params, writing, heat, noise)
    words = np.concatenate([words, more], axis=1)
    written = [written_of(model.tokenizer, ids.tolist(), limit) for ids, limit in zip(words, new)]
    yield written


def written_of(tokenizer: Chat, ids: list[int], limit: int) -> Written:
  """What token ids say of which at most `limit` may be; behind an end they are nothing."""
  own = tokenizer.until_end(ids)
  tokens = min(len(own), limit)
  finish = "length" if tokens == limit else "stop" if len(own) < len(ids) else ""
  words = tokenizer.decode(own[:tokens])
  return Written(words if finish else words.rstrip("\N{REPLACEMENT CHARACTER}"), tokens, finish)
