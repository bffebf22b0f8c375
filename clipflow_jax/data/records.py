"""The texts of one picture, from whatever fields a data set keeps them in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipflow_jax.data.example import BadRecord

IMAGE_MARKER = "<image>"  # where LLaVA's conversations put the picture
ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}
CAPTION_KEYS = ("caption", "txt", "text")  # ours, BLIP3o's and WebDataset's, that of many others


@dataclasses.dataclass(frozen=True)
class Record:
  """One captioned picture as it is stored."""

  id: str
  captions: tuple[str, ...]  # at least one
  questions: tuple[tuple[str, str], ...]  # (question, answer)
  picture: bytes | Path  # an encoded picture, or where one is
  name: str  # where the picture lies, for messages
  before: bytes | Path | None = None  # as picture: of an edit, the one that the captions tell how to change


def parse(line: bytes | str, where: str) -> dict[str, Any]:
  """One line of JSON to its fields. Raises BadRecord(where, ...)."""
  try:
    fields = json.loads(line)
  except UnicodeDecodeError as error:
    raise BadRecord(where, f"not UTF-8: {error}") from error
  except (ValueError, RecursionError) as error:
    raise BadRecord(where, f"not JSON: {error}") from error
  if not isinstance(fields, dict):
    raise BadRecord(where, "not an object: write one {...} a line")
  return fields


def decode_text(data: bytes, where: str) -> str:
  """UTF-8 to text. Raises BadRecord(where, ...)."""
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise BadRecord(where, f"not UTF-8: {error}") from error


def texts(fields: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
  """(captions, questions) of {"caption": ..., "captions": [...] or "conversations": [...]}.

  "txt" and "text" are captions too. Conversations are turns in LLaVA's form, {"from": "human" or "gpt", "value": ...},
  or {"role": "user" or "assistant", "content": ...}; each question with its answer stands alone. Without captions the
  first answer is the caption. Other keys are ignored. Raises BadRecord(where, ...).
  """
  turns = _turns(fields.get("conversations"), where)
  captions = _captions(fields, where) or [answer for _, answer in turns[:1]]
  if not captions:
    raise BadRecord(where, "no caption: give 'caption', 'captions' or 'conversations' with an answer")
  return tuple(captions), tuple((question, answer) for question, answer in turns if question)


def clean(text: str) -> str:
  """Without picture markers and outer space."""
  return encodable(text).replace(IMAGE_MARKER, "").strip()


def encodable(text: str) -> str:
  """Without the halves of surrogate pairs, which JSON can write and no tokenizer can encode."""
  return text.encode("utf-8", "ignore").decode("utf-8")


def _captions(fields: Mapping[str, Any], where: str) -> list[str]:
  single = [fields[key] for key in CAPTION_KEYS if fields.get(key) is not None]
  more = fields.get("captions") or []
  if not isinstance(more, list) or not all(isinstance(text, str) for text in single + more):
    raise BadRecord(where, "caption not text: 'caption' is a string, 'captions' a list of strings")
  # A caption is one line to be drawn from.
  return [text for text in (" ".join(clean(text).split()) for text in single + more) if text]


def _turns(conversation: Any, where: str) -> list[tuple[str, str]]:
  """Pairs (question, answer); the question is empty where only the picture was shown."""
  if conversation is None:
    return []
  if not isinstance(conversation, list):
    raise BadRecord(where, "conversation not a list of turns")
  pairs, question = [], None
  for turn in conversation:
    turn = turn if isinstance(turn, dict) else {}
    role = ROLES.get(str(turn.get("from", turn.get("role"))))
    text = turn.get("value", turn.get("content"))
    if role is None or not isinstance(text, str):
      raise BadRecord(where, f"conversation not understood: a turn has a role of {', '.join(ROLES)} and a text")
    text = clean(text)
    if role == "question":
      question = text
    elif role == "answer" and question is not None and text:
      pairs.append((question, text))
      question = None
  return pairs
