"""Messages in the usual form as conversations that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clipflow_jax.data import sequence
from clipflow_jax.data.images import square
from clipflow_jax.data.sequence import Conversation
from clipflow_jax.errors import UserError

if TYPE_CHECKING:
  from clipflow_jax.inference.pipeline import ClipFlow

# {"role", "content"}; content: text, or parts {"type": "text", "text"} | {"type": "image", "image"}
Message = dict[str, Any]


def conversation(model: ClipFlow, messages: Sequence[Message]) -> Conversation:
  """Messages as `ClipFlow.chat` takes them, worded as the run's data words questions. UserError for others."""
  if not len(messages):
    raise UserError("there are no messages to answer; give at least one")
  turns: list[tuple[str, str]] = []
  pictures: list[np.ndarray] = []
  for message in messages:
    try:
      role, content = message["role"], message["content"]
      parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
      shown = [part["image"] for part in parts if part["type"] == "image"]
      runs = [""]  # of words, a picture after each but the last
      for part in parts:
        if part["type"] == "image":
          runs.append("")
        else:
          runs[-1] += part["text"]
    except (TypeError, KeyError) as error:
      raise UserError(
        f'messages are a list of {{"role": "user", "content": "hello"}} and the like, not of {message!r:.60}'
      ) from error
    pictures += [_fit(picture, model.image_size) for picture in shown]
    if len(shown) == 1 and len(parts) == 2:  # a picture and what is asked of it, in whichever order
      turns.append((role, sequence.beside("".join(runs), model.wording.ask)))
    else:
      turns.append((role, sequence.spoken(*runs)))
  images = np.stack(pictures) if pictures else model.blank()[None][:0]
  return Conversation(tuple(turns), images, (1,) * len(pictures))


def _fit(picture: Any, size: int) -> np.ndarray:
  if not isinstance(picture, Image.Image):
    try:
      picture = Image.fromarray(np.asarray(picture))
    except TypeError as error:
      raise UserError(f"no picture among messages: {error}; give uint8 [H,W,3] or one of Pillow's") from error
  return square(picture, size)
