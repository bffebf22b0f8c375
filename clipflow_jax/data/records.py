"""One line of captions.jsonl to the texts of one picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from clipflow_jax.data.example import BadRecord

IMAGE_MARKER = "<image>"  # where LLaVA's conversations put the picture
ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Record:
  """The texts of one picture."""

  id: str
  file: str  # relative to the folder of captions.jsonl
  captions: tuple[str, ...]  # at least one
  questions: tuple[tuple[str, str], ...]  # (question, answer)


def parse(line: bytes, folder: Path, number: int) -> Record:
  """Reads {"file": ..., and "caption": ..., "captions": [...] or "conversations": [...]}, "id" if it has one.

  Conversations are turns in LLaVA's form, {"from": "human" or "gpt", "value": ...}, or {"role": "user" or
  "assistant", "content": ...}; each question with its answer stands alone. Without captions the first answer
  is the caption. Other keys are ignored. Raises BadRecord, named by file and line number.
  """
  where = f"{folder}/captions.jsonl:{number}"
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise BadRecord(where, f"not JSON: {error}") from error
  if not isinstance(record, dict):
    raise BadRecord(where, "not an object: write one {...} a line")
  file = record.get("file")
  if not isinstance(file, str) or not file or file != _encodable(file):
    raise BadRecord(where, "no file: 'file' must be the path of a picture")
  turns = _turns(record.get("conversations", []), where)
  captions = _captions(record, where) or [answer for _, answer in turns[:1]]
  if not captions:
    raise BadRecord(where, "no caption: give 'caption', 'captions' or 'conversations' with an answer")
  questions = tuple((question, answer) for question, answer in turns if question)
  id = record.get("id")
  id = f"{folder.resolve().name}/{_clean(file)}" if id is None else _clean(str(id))
  return Record(id, file, tuple(captions), questions)


def _captions(record: dict[str, Any], where: str) -> list[str]:
  texts = [record["caption"]] if "caption" in record else []
  more = record.get("captions", [])
  if not isinstance(more, list) or not all(isinstance(text, str) for text in texts + more):
    raise BadRecord(where, "caption not text: 'caption' is a string, 'captions' a list of strings")
  # A caption is one line to be drawn from.
  return [text for text in (" ".join(_clean(text).split()) for text in texts + more) if text]


def _turns(conversation: Any, where: str) -> list[tuple[str, str]]:
  """Pairs (question, answer); the question is empty where only the picture was shown."""
  if not isinstance(conversation, list):
    raise BadRecord(where, "conversation not a list of turns")
  pairs, question = [], None
  for turn in conversation:
    turn = turn if isinstance(turn, dict) else {}
    role = ROLES.get(str(turn.get("from", turn.get("role"))))
    text = turn.get("value", turn.get("content"))
    if role is None or not isinstance(text, str):
      raise BadRecord(where, f"conversation not understood: a turn has a role of {', '.join(ROLES)} and a text")
    text = _clean(text)
    if role == "question":
      question = text
    elif role == "answer" and question is not None and text:
      pairs.append((question, text))
      question = None
  return pairs


def _clean(text: str) -> str:
  """Without picture markers and outer space."""
  return _encodable(text).replace(IMAGE_MARKER, "").strip()


def _encodable(text: str) -> str:
  """Without the halves of surrogate pairs, which JSON can write and no tokenizer can encode."""
  return text.encode("utf-8", "ignore").decode("utf-8")
