"""Drawings as a folder: a source of data, gone on with where it was stopped, each picture that of its seed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipflow_jax import cli, commands
from clipflow_jax.data import sources
from clipflow_jax.evaluation import folders
from clipflow_jax.inference import drawings
from clipflow_jax.inference.pipeline import ClipFlow

PROMPTS = ["a star", "a red circle", "a star", "a blue square"]


@pytest.fixture(scope="module")
def model(trained) -> ClipFlow:
  return ClipFlow.from_checkpoint(trained, batch_size=2)


@pytest.fixture
def draw(model, trained, monkeypatch, tmp_path):
  """Runs `clipflow draw` on PROMPTS into tmp_path/drawn; returns the exit code."""
  monkeypatch.setattr(commands, "_load", lambda options: model)
  (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

  def run(*options: str) -> int:
    argv = [f"--workdir={trained}", f"--prompts={tmp_path / 'prompts.txt'}", "--guidance=1", "--steps=2"]
    return cli.main(["draw", *argv, f"--output={tmp_path / 'drawn'}/", *options])

  return run


def pixels(file: Path) -> np.ndarray:
  return np.asarray(Image.open(file))


def lines(folder: Path) -> list[dict]:
  return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def test_every_picture_is_that_of_its_caption_and_seed(draw, model, tmp_path, capsys):
  assert draw("--seed=5") == 0
  assert f"drew 4 picture(s) into {tmp_path / 'drawn'}" in capsys.readouterr().out
  told = lines(tmp_path / "drawn")
  assert [(line["caption"], line["seed"]) for line in told] == [(words, 5 + i) for i, words in enumerate(PROMPTS)]
  for line in told:
    alone = model.draw([line["caption"]], steps=2, guidance=1, seed=line["seed"])[0]
    assert np.abs(pixels(tmp_path / "drawn" / line["file"]) - alone.astype(int)).max() <= 1
  names = {line["file"] for line in told} | {"captions.jsonl", drawings.HOW}
  assert {file.name for file in (tmp_path / "drawn").iterdir()} == names  # nothing half-written is left


def test_the_folder_is_a_source_of_data_and_one_to_evaluate(draw, tmp_path):
  assert draw() == 0
  source = sources.make(dict(kind="folder", path=str(tmp_path / "drawn"), size=24), "all")
  assert [source[i].captions[0] for i in range(len(source))] == PROMPTS
  assert len(folders.list_pictures(tmp_path / "drawn")) == 4


def test_a_stopped_one_goes_on_to_the_same_pictures(draw, model, tmp_path, monkeypatch, capsys):
  assert draw() == 0
  whole = {file.name: file.read_bytes() for file in (tmp_path / "drawn").iterdir()}
  (tmp_path / "drawn").rename(tmp_path / "whole")
  replace = os.replace

  def killed(partial, file):
    if str(file).endswith("000003.png"):
      raise KeyboardInterrupt
    replace(partial, file)

  monkeypatch.setattr(os, "replace", killed)
  assert draw() == 130
  assert [line["file"] for line in lines(tmp_path / "drawn")] == ["000000.png", "000001.png"]
  monkeypatch.setattr(os, "replace", replace)
  asked = []
  monkeypatch.setattr(
    model, "draw", lambda prompts, **how: asked.append(prompts) or ClipFlow.draw(model, prompts, **how)
  )
  assert draw() == 0
  assert asked == [PROMPTS[2:]] and "drew 2 picture(s)" in capsys.readouterr().out
  assert {file.name: file.read_bytes() for file in (tmp_path / "drawn").iterdir()} == whole
  assert draw() == 0 and len(asked) == 1


def test_more_prompts_and_other_seeds_come_beside_what_is_there(draw, tmp_path):
  assert draw() == 0
  before = pixels(tmp_path / "drawn" / "000000.png")
  assert draw("--prompts=" + str(tmp_path / "more.txt")) == 2  # not there
  (tmp_path / "more.txt").write_text("\n".join([*PROMPTS, "a square"]))
  assert draw("--prompts=" + str(tmp_path / "more.txt")) == 0 and draw("--seed=100") == 0
  assert [line["seed"] for line in lines(tmp_path / "drawn")] == [0, 1, 2, 3, 4, 100, 101, 102, 103]
  np.testing.assert_array_equal(pixels(tmp_path / "drawn" / "000000.png"), before)


@pytest.mark.parametrize(
  ("option", "says"),
  [
    ("--prompt=another", "000000.png is of 'a star', not of 'another'"),
    ("--steps=3", "drawn otherwise (steps 2 there, 3 here)"),
    ("--guidance=2", "drawn otherwise (guidance 1.0 there, 2.0 here)"),
    ("--image=x.png", "--image changes a picture, of which no prompt is the caption"),
    (f"--seed={2**32 - 2}", "4294967296 is no seed"),
  ],
)
def test_what_does_not_belong_into_a_folder_of_drawings_is_refused(draw, tmp_path, capsys, option, says):
  assert draw() == 0
  there = {file: file.read_bytes() for file in (tmp_path / "drawn").iterdir()}
  assert draw(option) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("clipflow: ") and says in error
  assert {file: file.read_bytes() for file in (tmp_path / "drawn").iterdir()} == there


def test_a_folder_whose_notes_are_damaged_is_refused(draw, tmp_path, capsys):
  assert draw() == 0
  for name, damage in (("captions.jsonl", '{"caption": "a star"}\n'), ("captions.jsonl", "{"), (drawings.HOW, "3")):
    kept = (tmp_path / "drawn" / name).read_bytes()
    (tmp_path / "drawn" / name).write_text(damage)
    assert draw() == 2 and f"{tmp_path / 'drawn' / name} cannot be read" in capsys.readouterr().err
    (tmp_path / "drawn" / name).write_bytes(kept)


def test_nothing_is_drawn_among_things_of_others_or_where_a_prompt_does_not_fit(draw, tmp_path, capsys):
  (tmp_path / "drawn").mkdir()
  (tmp_path / "drawn" / "000000.png").write_bytes(b"mine")
  assert draw() == 2 and "holds other things than drawings" in capsys.readouterr().err
  assert (tmp_path / "drawn" / "000000.png").read_bytes() == b"mine"
  (tmp_path / "drawn").rename(tmp_path / "mine")
  (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a star " * 1000]))
  assert draw() == 2 and "does not fit" in capsys.readouterr().err and not (tmp_path / "drawn").exists()
