"""A conversation in the terminal: what is typed, and the answers, shown as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from clipflow_jax.errors import UserError
from clipflow_jax.inference import untaught, writing
from clipflow_jax.inference.messages import Message
from clipflow_jax.inference.pipeline import ClipFlow


def hold(
  model: ClipFlow, message: str | None, picture: np.ndarray | None, *, new: int, temperature: float, seed: int
) -> None:
  """Answers the message on stdout, or, where it is None, whatever is typed, until that ends.

  picture: u8[H,W,3], that the first message is about. new: tokens of an answer at most; stderr tells where that cut one
  off. temperature, seed: as in `ClipFlow.chat`, whose words these are. UserError for a message that cannot be answered;
  of what is typed it is told, and the conversation goes on without it.
  """
  if new > model.longest:
    raise UserError(f"--tokens={new} is more than the {model.longest} slots of this model's rows; give fewer")
  how: dict[str, Any] = dict(new=[new], temperature=[temperature], seeds=[seed])
  messages: list[Message] = []
  seen = [] if picture is None else [{"type": "image", "image": picture}]
  for words in _typed() if message is None else [message]:
    asked = {"role": "user", "content": [*seen, {"type": "text", "text": words}]}
    try:
      answer = _show(writing.stream(model, [[*messages, asked]], **how))
    except UserError as error:
      if message is not None:
        raise
      print(f"clipflow: {error}", file=sys.stderr)
      continue
    if not messages:
      untaught.warn(model, untaught.TALKS)
    messages += [asked, {"role": "assistant", "content": answer}]
    seen = []


def _typed() -> Iterator[str]:
  while True:
    try:
      words = input("> ")
    except EOFError:
      return
    except UnicodeDecodeError as error:
      raise UserError(f"cannot read the message: {error}") from error
    yield words


def _show(answer: Iterator[list[writing.Written]]) -> str:
  """All words of the answer, each printed when it comes."""
  shown = ""
  for (written,) in answer:
    print(written.text[len(shown) :], end="", flush=True)
    shown = written.text
  print()
  if written.finish == "length":
    told = f"the answer was cut off at {written.tokens} tokens; --tokens=N lets it be longer"
    print(f"clipflow: {told}", file=sys.stderr)
  return shown
