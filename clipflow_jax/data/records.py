"""The texts of pictures, from whatever fields a data set keeps them in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipflow_jax.data.example import IMAGE_MARKER, BadRecord, Turns

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CAPTION_KEYS = ("caption", "txt", "text")  # ours, BLIP3o's and WebDataset's, that of many others
TURN_KEYS = ("conversations", "messages")  # LLaVA's, that of most others


@dataclasses.dataclass(frozen=True)
class Record:
  """One captioned picture, or a conversation about one, several or none, as it is stored."""

  id: str
  captions: tuple[str, ...]
  turns: Turns  # of an `example.Dialogue`; where there is no caption, at least two
  pictures: tuple[bytes | Path, ...]  # encoded pictures, or where they are; a captioned one stands alone
  name: str  # where they lie, for messages
  before: bytes | Path | None = None  # as pictures: of an edit, the one that the captions tell how to change

  @property
  def questions(self) -> tuple[tuple[str, str], ...]:
    """The first question about a single picture, with its answer: it alone needs nothing before it."""
    if len(self.pictures) != 1 or [role for role, _ in self.turns[:2]] != ["user", "assistant"]:
      return ()
    question, answer = (text for _, text in self.turns[:2])
    return ((question, answer),) if question and IMAGE_MARKER not in question else ()


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


def talks(fields: Mapping[str, Any]) -> bool:
  """Whether there is a conversation among the fields, which may be without a picture."""
  return any(fields.get(key) for key in TURN_KEYS)


def record(
  id: str,
  fields: Mapping[str, Any],
  pictures: Sequence[bytes | Path],
  where: str,
  name: str = "",
  before: bytes | Path | None = None,
) -> Record:
  """The Record of pictures and of {"caption": ..., "captions": [...] or "conversations": [...]}.

  "txt" and "text" are captions too, "messages" are conversations: turns in LLaVA's form, {"from": "human" or "gpt",
  "value": ...}, or {"role": "user" or "assistant", "content": a text, or parts such as {"type": "text", "text": ...}
  and {"type": "image"}}, or of role "system". IMAGE_MARKERs say where the pictures stand; without any they come before
  the first words. Other keys are ignored. where: the record lies; name: its pictures do, if not there. Raises
  BadRecord(where, ...).
  """
  captions, turns = _captions(fields, where), _turns(fields, where)
  if not captions and not turns:
    raise BadRecord(where, "no caption: give 'caption', 'captions' or 'conversations' with an answer")
  if captions and len(pictures) != 1:
    raise BadRecord(where, f"a caption of {len(pictures)} pictures: it is of one")
  return Record(id, tuple(captions), _placed(turns, len(pictures), where), tuple(pictures), name or where, before)


def _placed(turns: list[tuple[str, str]], pictures: int, where: str) -> Turns:
  """The turns with a marker for each picture; with none for a single one that stands beside the first words."""
  if not turns:
    return ()
  first = [role for role, _ in turns].index("user")
  role, text = turns[first]
  marked = sum(said.count(IMAGE_MARKER) for _, said in turns)
  if pictures == 1 and marked == text.count(IMAGE_MARKER) <= 1:
    turns = [*turns[:first], (role, clean(text)), *turns[first + 1 :]]
  elif pictures and not marked:
    turns = [*turns[:first], (role, IMAGE_MARKER * pictures + text), *turns[first + 1 :]]
  elif marked != pictures:
    raise BadRecord(where, f"pictures not placed: {marked} {IMAGE_MARKER} in the words for {pictures} pictures")
  return tuple(turns)


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


def _turns(fields: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
  """(role, text) from the first of the user's on, or the system's before, up to the last answer; markers are kept.

  What one says twice in turn is one turn. An answer that is empty, or to nothing, is left out.
  """
  conversation: Any = next((fields[key] for key in TURN_KEYS if fields.get(key) is not None), [])
  if not isinstance(conversation, list):
    raise BadRecord(where, "conversation not a list of turns")
  contents = [turn.get("value", turn.get("content")) if isinstance(turn, dict) else None for turn in conversation]
  # Where pictures are parts of their own, a marker in the words is only quoted.
  placed = any(_is_picture(part) for content in contents if isinstance(content, list) for part in content)
  turns: list[tuple[str, str]] = []
  for turn, content in zip(conversation, contents, strict=True):
    turn = turn if isinstance(turn, dict) else {}
    role = ROLES.get(str(turn.get("from", turn.get("role"))))
    text = _words(content, "" if placed else IMAGE_MARKER)
    if role is None or text is None:
      raise BadRecord(where, f"conversation not understood: a turn has a role of {', '.join(ROLES)} and a text")
    text = encodable(text).strip() if role == "user" else clean(text)
    if role == "user" or (text and (role == "system" or any(role == "user" for role, _ in turns))):
      before = turns.pop()[1] if turns and turns[-1][0] == role else ""
      turns.append((role, "\n".join(filter(None, (before, text)))))
  while turns and turns[-1][0] != "assistant":
    turns.pop()
  return turns


def _words(content: Any, quoted: str) -> str | None:
  """A turn's text, or that of its parts, of which pictures are markers; None for what is neither.

  quoted: what is put in the place of a marker among the words.
  """
  words = []
  for part in content if isinstance(content, list) else [{"text": content}]:
    text = part.get("text") if isinstance(part, dict) else None
    if not _is_picture(part) and not isinstance(text, str):
      return None
    words.append(IMAGE_MARKER if _is_picture(part) else text.replace(IMAGE_MARKER, quoted))
  return "".join(words)


def _is_picture(part: Any) -> bool:
  return isinstance(part, dict) and part.get("type") == "image"
