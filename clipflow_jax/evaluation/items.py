"""What tasks ask: pictures with questions, answers, choices or class names, from a folder or a model's own test split.

A folder holds pictures and items.jsonl, one JSON object a line: {"file": "a.png", "question": "...", "answers":
["..."], "choices": ["..."], "category": "..."}, each key left out where a task has no use for it. Without items.jsonl
its folders are classes, and the pictures in one are answered by its name. Folders for known classes have their names,
however they are written, or are these in order: numbers by their value, others by the alphabet.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipflow_jax.data import images
from clipflow_jax.data.example import BadRecord, Example
from clipflow_jax.errors import UserError
from clipflow_jax.evaluation import folders

ITEMS = "items.jsonl"
KEYS = ("file", "id", "question", "answers", "choices", "category")
MORE = ("include", "exclude", "questions", "depends", "kinds")


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
  """One question to a model. picture: a file, or u8[H,W,3]; None where there is none to look at."""

  id: str
  picture: Path | np.ndarray | None = None
  question: str = ""  # or what is to be drawn
  answers: tuple[str, ...] = ()  # what is right, or what people wrote; of a classification its class name
  choices: tuple[str, ...] = ()
  category: str = ""
  label: int | None = None  # the number of its class, where folders are classes: two of ImageNet's have one name
  more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys of MORE: what one kind of task alone asks
  group: str = ""  # of items that are no choice of their own, such as several pictures of one prompt

  def look(self, size: int) -> np.ndarray:
    """The picture as u8[size,size,3]. UserError with its name where it cannot be read."""
    if isinstance(self.picture, np.ndarray):
      return self.picture
    if self.picture is None:
      raise UserError(f"item {self.id} has no picture, and this task looks at one")
    try:
      return images.decode(self.picture, size)
    except BadRecord as error:
      raise UserError(f"cannot read the picture {error}; mend it or take its line away") from error


def read(folder: Path | str, classes: Sequence[str] = ()) -> list[Item]:
  """The items of a folder, in the order of items.jsonl or of the files' names. UserError names what is wrong where."""
  folder = Path(folder)
  if not folder.is_dir():
    raise UserError(f"there is no folder {folder}: give one with pictures and {ITEMS}, or with a folder for each class")
  file = folder / ITEMS
  if file.is_file():
    return [_parse(line, file, number) for number, line in _lines(file)]
  named = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
  if classes and named and len(named) != len(classes):
    raise UserError(f"{folder} has {len(named)} folders for {len(classes)} classes: one for each is needed, in order")
  plain = {_plain(name): number for number, name in enumerate(classes)}
  known = [name for name in named if _plain(name) in plain]
  if classes and len(known) == len(named) == len(plain):
    named.sort(key=lambda name: plain[_plain(name)])
  elif known:
    strange = next(name for name in named if name not in known)
    raise UserError(f"{folder / strange} is named as no class, and {known[0]} as one: name all as classes, or none")
  elif all(name.isdecimal() for name in named):
    named.sort(key=int)
  return [
    Item(f"{name}/{path.name}", path, answers=((classes or named)[label],), category=name, label=label)
    for label, name in enumerate(named)
    for path in folders.list_pictures(folder / name)
  ]


def _plain(name: str) -> str:
  """A class's name without what file names and lists write differently."""
  return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def read_prompts(file: Path | str) -> list[Item]:
  """Prompts to draw: one a line, in a .jsonl objects with the prompt as `question`, in a .csv DPG-Bench's table.

  GenEval's own names for it and for the category, `prompt` and `tag`, do as well: its file is read as it is.
  """
  file = Path(file)
  lines = [line for _, line in _lines(file)]
  if file.suffix == ".jsonl":
    return [_parse(line, file, number) for number, line in enumerate(lines, start=1)]
  if file.suffix == ".csv":
    return _questioned(file)
  return [Item(str(number), question=line.strip()) for number, line in enumerate(lines)]


def _questioned(file: Path) -> list[Item]:
  """Of a table of questions, by the columns' names: its prompts in their order, as `generation.Questioned` takes them.

  The official script passes over the first line, and so loses the first prompt; here it counts.
  """
  prompts: dict[str, list[dict[str, str]]] = {}
  made = []
  try:
    with file.open(encoding="utf-8", newline="") as opened:
      for row in csv.DictReader(opened):
        prompts.setdefault(row["item_id"], []).append(row)
    for name, rows in prompts.items():
      number = {int(row["proposition_id"]): i for i, row in enumerate(rows)}
      parents = [[int(parent) for parent in row["dependency"].split(",")] for row in rows]
      more = dict(
        questions=[row["question_natural_language"] for row in rows],
        depends=[[number[parent] for parent in each if parent] for each in parents],  # 0 is none
        kinds=[row["tuple"].split("(")[0].split("-")[0].strip() for row in rows],
      )
      made.append(Item(name, question=rows[0]["text"], more=more))
  except (KeyError, ValueError, AttributeError) as error:
    raise UserError(f"{file} is not a table of questions such as DPG-Bench's dpg_bench.csv: {error!r}") from error
  return made


def of_examples(examples: Iterable[Example], what: str) -> list[Item]:
  """Items of captioned pictures. what: "captions" (to be written), "questions" (the first of each) or "prompts"."""
  made = []
  for example in examples:
    if what == "questions" and example.questions:
      question, answer = example.questions[0]
      kind = " ".join(question.lower().split()[:2])
      made.append(Item(example.id, example.image, question, (answer,), category=kind))
    elif what == "captions" and example.description:
      made.append(Item(example.id, example.image, answers=(example.description,)))
    elif what == "prompts" and example.captions:
      made.append(Item(example.id, example.image, example.captions[0]))
  return made


def choose(items: Sequence[Item], n: int, seed: int) -> list[Item]:
  """n of the items at random, in their order; all of them for n = 0 or where there are no more."""
  if not n or n >= len(items):
    return list(items)
  return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:n])]


def fingerprint(items: Iterable[Item]) -> str:
  """A hash of everything that is asked: what RESULT.json calls `prompts`. UserError for a picture that is not there."""
  digest = hashlib.sha256()
  for item in items:
    words = [item.id, item.question, *item.answers, "", *item.choices, item.category]
    digest.update(json.dumps([words, dict(item.more)], ensure_ascii=False).encode())
    if isinstance(item.picture, np.ndarray):
      digest.update(item.picture.tobytes())
    elif item.picture is not None:
      digest.update(_digest(item.picture))
  return digest.hexdigest()[:16]


def _digest(file: Path) -> bytes:
  try:
    with file.open("rb") as opened:
      return hashlib.file_digest(opened, "sha256").digest()
  except OSError as error:
    raise UserError(f"cannot read the picture {file}: {error.strerror}; mend it or take its line away") from error


def _lines(file: Path) -> list[tuple[int, str]]:
  """(its number from 1, the line) of those that are not empty; only a newline ends one. UserError for no text."""
  try:
    lines = file.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"cannot read {file}: {error}; give a file of UTF-8") from error
  return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: str, source: Path, number: int) -> Item:
  where = f"line {number} of {source}"
  try:
    found = json.loads(line)
    found = {{"prompt": "question", "tag": "category"}.get(key, key): value for key, value in found.items()}
    unknown = sorted(found.keys() - {*KEYS, *MORE})
    if unknown:
      raise UserError(f"{where} has the key {unknown[0]!r}; there are {', '.join((*KEYS, *MORE))}")
    file = found.get("file")
    return Item(
      str(found.get("id", file or number)),
      source.parent / file if file else None,
      str(found.get("question", "")),
      _texts(found, "answers"),
      _texts(found, "choices"),
      str(found.get("category", "")),
      more={key: found[key] for key in MORE if key in found},
    )
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f"{where} is not an object of texts and lists of texts: {error}") from error


def _texts(found: dict[str, Any], key: str) -> tuple[str, ...]:
  values = found.get(key, [])
  if not isinstance(values, list):
    raise TypeError(f"{key} is not a list")
  return tuple(map(str, values))
