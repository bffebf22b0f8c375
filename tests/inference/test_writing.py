from __future__ import annotations

import itertools

import numpy as np
import pytest

from clipflow_jax.errors import UserError
from clipflow_jax.inference import writing
from clipflow_jax.inference.pipeline import ClipFlow
from tests import tiny_runs

HOW = [{"role": "user", "content": "how?"}]
WHERE = [{"role": "user", "content": "where is it, and what stands beside it, and above it?"}]


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  return tiny_runs.lively(ClipFlow.from_checkpoint(trained))


def written(model: ClipFlow, *talks, new=64, temperature=0.0, seed=0, every=8) -> list[list]:
  n = len(talks)
  how = dict(new=[new] * n, temperature=[temperature] * n, seeds=[seed] * n, every=every)
  found = list(writing.stream(model, talks, **how))
  return [[step[i] for step in found] for i in range(n)]


def test_what_is_streamed_without_heat_is_what_chat_says(model):
  (steps,) = written(model, HOW, new=64)
  assert steps[-1].text == model.chat(HOW) and len(steps[-1].text) > 10
  assert steps[-1].finish == "length" and steps[-1].tokens == 64
  for before, after in itertools.pairwise(steps):
    assert after.text.startswith(before.text) and after.tokens > before.tokens and not before.finish


def test_words_are_the_same_alone_and_in_any_company_at_any_heat(model):
  (alone,) = written(model, HOW, temperature=1.0, seed=7)
  longer, beside = written(model, WHERE, HOW, temperature=1.0, seed=7)
  assert beside[-1] == alone[-1] != longer[-1]
  assert alone[-1].text == model.chat(HOW, temperature=1.0, seed=7)
  (other,) = written(model, HOW, temperature=1.0, seed=8)
  (cold,) = written(model, HOW)
  assert len({alone[-1].text, other[-1].text, cold[-1].text}) == 3


def test_each_writes_as_much_as_it_may_and_stops_where_the_model_does(model):
  how = dict(temperature=[0.0] * 2, seeds=[0] * 2)
  short, long = list(writing.stream(model, [WHERE, WHERE], new=[3, 64], **how))[-1]
  assert (short.tokens, short.finish) == (3, "length") and long.text.startswith(short.text)
  chat = model.tokenizer
  assert writing.written_of(chat, [5, 6, chat.end, 7], 16) == writing.written_of(chat, [5, 6, chat.end], 4)
  assert writing.written_of(chat, [5, 6, chat.end], 4).finish == "stop"
  assert writing.written_of(chat, [5, 6], 4).finish == ""


def test_a_character_is_not_told_before_it_is_whole(model):
  chat = model.tokenizer
  ids = list(chat.encode("caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}"))
  texts = [writing.written_of(chat, ids[:i], 99).text for i in range(len(ids) + 1)]
  assert texts[-1] == "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}"
  assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
  assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
  cut = writing.written_of(chat, ids[:-1], len(ids) - 1)
  assert cut.text.endswith("\N{REPLACEMENT CHARACTER}")  # nothing more will come


def test_a_picture_of_a_seed_is_the_same_beside_those_of_others(model):
  alone = model.draw(["red"], seed=6)
  both = model.draw(["blue", "red"], seed=[5, 6])
  assert np.abs(alone[0].astype(int) - both[1]).max() <= 1
  assert np.abs(alone[0].astype(int) - model.draw(["red"], seed=7)[0]).max() > 1
  with pytest.raises(UserError, match="2 seeds for 1 items"):
    model.draw(["red"], seed=[5, 6])


def test_what_is_asked_is_measured_before_it_is_done(model):
  picture = {"type": "image", "image": np.zeros((24, 24, 3), np.uint8)}
  with_picture = [{"role": "user", "content": [picture, {"type": "text", "text": "how?"}]}]
  assert model.slots(with_picture) == model.slots(HOW) + 1 + 4  # its word and its tokens
  assert model.slots("a star") > 0
  for long in ("why " * 1000, [{"role": "user", "content": "why " * 1000}]):
    with pytest.raises(UserError, match="does not fit"):
      model.slots(long)
