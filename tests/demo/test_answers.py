"""What the page shows of a run beside the model's answers."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict
from PIL import Image

from clipflow_jax.demo import answers
from clipflow_jax.errors import UserError


def suggested(config: dict) -> tuple[list[str], list[str]]:
  return answers.suggestions(SimpleNamespace(config=ConfigDict(config)), 4)


def test_what_is_suggested_is_what_its_data_says():
  prompts, questions = suggested({"data": {"source": {"kind": "shapes", "size": 24, "questions": 1}}})
  assert len(set(prompts)) == len(prompts) > 1 and all(prompt.startswith(("a", "t", "f")) for prompt in prompts)
  assert questions and all(question.endswith("?") for question in questions)


def test_nothing_is_suggested_where_there_is_no_data(tmp_path):
  assert suggested({}) == ([], [])
  assert suggested({"data": {"source": {"kind": "folder", "path": str(tmp_path / "moved"), "size": 24}}}) == ([], [])


def test_a_walk_without_an_end_is_refused_before_anything_is_drawn():
  page = answers.Answers(SimpleNamespace(image_size=24))
  with pytest.raises(UserError, match="a walk needs two ends"):
    page.walk(answers.End("", None), answers.End("a star", None), seed=0, stops=3)


def test_samples_are_the_newest_pictures_of_a_run_and_no_plots(tmp_path):
  for i, place in enumerate(("samples/1.png", "joint/samples/2.png", "report/samples.png", "report/curves.png")):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / place)
    os.utime(tmp_path / place, (i, i))
  assert [name for _, name in answers.samples(tmp_path, 2)] == ["report/samples.png", "joint/samples/2.png"]
  (tmp_path / "report" / "samples.png").write_bytes(b"")  # that is being written
  assert [name for _, name in answers.samples(tmp_path, 2)] == ["joint/samples/2.png"]
