"""The conversation that `clipflow chat` holds: words as they come, as many as may be, the same by the same seed."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from clipflow_jax import cli, commands
from clipflow_jax.inference import talk, writing
from clipflow_jax.inference.pipeline import ClipFlow
from tests import tiny_runs


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  return tiny_runs.lively(ClipFlow.from_checkpoint(trained))


@pytest.fixture
def chat(model, monkeypatch, capsys):
  """What `clipflow chat` with such options says on stdout and on stderr, of a model that has something to say."""
  monkeypatch.setattr(commands, "_load", lambda options: model)

  def run(*options: str) -> tuple[str, str]:
    assert cli.main(["chat", "--workdir=x", *options]) == 0
    return capsys.readouterr()

  return run


def asked(words: str) -> dict:
  return {"role": "user", "content": words}


def test_an_answer_is_as_long_as_it_may_be_and_where_it_is_cut_off_the_option_is_named(chat, model):
  out, err = chat("--message=how?", "--tokens=3")
  assert out == model.chat([asked("how?")], new=3) + "\n"
  assert err == "clipflow: the answer was cut off at 3 tokens; --tokens=N lets it be longer\n"
  longer, _ = chat("--message=how?")
  assert longer == model.chat([asked("how?")], new=64) + "\n" and longer.startswith(out[:-1]) and longer != out


def test_of_an_answer_that_the_model_ended_nothing_is_said(chat, monkeypatch):
  pieces = [[writing.Written("it is", 2, "")], [writing.Written("it is red", 3, "stop")]]
  monkeypatch.setattr(writing, "stream", lambda *args, **how: iter(pieces))
  assert chat("--message=how?", "--tokens=3") == ("it is red\n", "")


def test_words_at_a_temperature_are_those_of_the_seed(chat, model):
  heat = ("--message=how?", "--temperature=1")
  told, again, other = (chat(*heat, f"--seed={seed}")[0] for seed in (7, 7, 8))
  assert told == again != other and told == model.chat([asked("how?")], temperature=1.0, seed=7) + "\n"


def test_words_are_shown_as_they_come(model, monkeypatch):
  seen = []

  class Watched(io.StringIO):
    def flush(self):
      seen.append(self.getvalue())

  monkeypatch.setattr(sys, "stdout", Watched())
  talk.hold(model, "how?", None, new=32, temperature=0.0, seed=0)
  assert len(set(seen)) == 4  # eight tokens each
  assert seen[-1] == model.chat([asked("how?")], new=32)


def test_a_conversation_goes_on_after_what_cannot_be_answered(chat, model, monkeypatch):
  typed = iter(["how?", "why " * 1000, "where?"])
  monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or (_ for _ in ()).throw(EOFError))
  out, err = chat("--tokens=8")
  first = model.chat([asked("how?")], new=8)
  then = model.chat([asked("how?"), {"role": "assistant", "content": first}, asked("where?")], new=8)
  assert out == f"{first}\n{then}\n" and err.count("does not fit") == 1


@pytest.mark.parametrize(
  ("option", "says"),
  [
    ("--tokens=0", "0 tokens are no answer"),
    ("--temperature=-1", "temperature -1.0 chooses no words"),
    ("--temperature=nan", "temperature nan chooses no words"),
    ("--seed=-1", "-1 is no seed"),
  ],
)
def test_what_makes_no_answer_is_told_before_a_model_is_loaded(capsys, option, says):
  assert cli.main(["chat", "--workdir=nowhere", "--message=how?", option]) == 2
  assert says in capsys.readouterr().err


def test_more_tokens_than_a_row_has_slots_are_refused(model, monkeypatch, capsys):
  monkeypatch.setattr(commands, "_load", lambda options: model)
  assert cli.main(["chat", "--workdir=x", "--message=how?", "--tokens=100000"]) == 2
  assert f"more than the {model.longest} slots" in capsys.readouterr().err


def test_a_picture_is_what_the_first_message_is_about(model, capsys):
  picture = np.full((tiny_runs.SIZE, tiny_runs.SIZE, 3), 200, np.uint8)
  talk.hold(model, "how?", picture, new=8, temperature=0.0, seed=0)
  parts = [{"type": "image", "image": picture}, {"type": "text", "text": "how?"}]
  assert capsys.readouterr().out == model.chat([{"role": "user", "content": parts}], new=8) + "\n"
