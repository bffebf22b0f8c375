from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipflow_jax.data.prepare import prepare
from clipflow_jax.data.sources import FolderSource
from clipflow_jax.errors import UserError


@pytest.fixture
def pictures(tmp_path) -> Path:
  """Twelve good pictures, one of them with questions; one damaged, one missing, one with a short caption."""
  folder = tmp_path / "pictures"
  folder.mkdir()
  rng = np.random.default_rng(0)
  records = []
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
    records.append({"file": f"{i}.png", "captions": [f"picture number {i}", "x"]})
  records[3]["conversations"] = [
    {"from": "human", "value": "Which?"},
    {"from": "gpt", "value": "The fourth."},
  ]
  (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:70])
  Image.new("L", (8, 8)).save(folder / "short.png")
  records[5:5] = [
    {"file": "damaged.png", "caption": "damaged"},
    {"file": "missing.png", "caption": "missing"},
    {"file": "short.png", "caption": "x"},
  ]
  lines = [json.dumps(record) for record in records]
  (folder / "captions.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
  return folder


def quiet(_: str) -> None:
  pass


def test_the_result_is_the_clean_part_of_the_input(pictures, tmp_path):
  output = tmp_path / "out"
  statistics = prepare(pictures, output, size=16, min_caption=2, say=quiet)
  source, prepared = FolderSource(pictures, 16, "all"), FolderSource(output, 16, "all")
  good = [i for i in range(len(source)) if i not in (5, 6, 7, 15)]
  assert len(prepared) == len(good) == 12
  for i, j in enumerate(good):
    a, b = prepared[i], source[j]
    np.testing.assert_array_equal(a.image, b.image)
    assert (a.id, a.description, a.questions) == (b.id, b.description, b.questions)
    assert a.captions == b.captions[:1]  # "x" is too short
  assert statistics["records"] == 16
  assert statistics["bad"] == {
    "cannot be decoded": 1,
    "missing file": 1,
    "short caption": 1,
    "not JSON": 1,
  }
  errors = [json.loads(line)["name"] for line in (output / "data_errors.jsonl").read_text().splitlines()]
  expected = [f"{pictures}/damaged.png", f"{pictures}/missing.png", "pictures/short.png"]
  assert sorted(errors) == sorted([*expected, f"{pictures}/captions.jsonl:16"])


def test_the_test_split_of_the_result_is_that_of_the_input(pictures, tmp_path):
  prepare(pictures, tmp_path / "renamed", size=16, min_caption=2, say=quiet)

  def ids(path: Path) -> set[str]:
    source = FolderSource(path, split="test", test_fraction=0.5)
    return {source.record(i).id for i in range(len(source)) if "broken" not in str(i)}

  prepared = ids(tmp_path / "renamed")
  assert prepared
  whole = FolderSource(pictures, split="all")
  good = {whole.record(i).id for i in range(15) if i not in (5, 6, 7)}
  source = FolderSource(pictures, split="train", test_fraction=0.5)
  train = {source.record(i).id for i in range(len(source) - 1)}
  assert prepared <= good and not prepared & train


def test_statistics_are_those_of_what_was_written(pictures, tmp_path):
  statistics = prepare(pictures, tmp_path / "out", size=16, min_caption=2, say=quiet)
  pixels = np.stack([FolderSource(tmp_path / "out", 16, "all")[i].image for i in range(12)]) / 255
  np.testing.assert_allclose(statistics["pixel_mean"], pixels.mean((0, 1, 2)), atol=1e-4)
  np.testing.assert_allclose(statistics["pixel_std"], pixels.std((0, 1, 2)), atol=1e-4)
  assert (statistics["written"], statistics["captions"], statistics["questions"]) == (12, 12, 1)
  assert statistics["caption_words"] == {"min": 3, "mean": 3.0, "max": 3}
  assert statistics["distinct_words"] == 2 + 12
  assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == statistics
  with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
    assert sheet.width == 8 * 128 and sheet.height > 2 * 128


def test_several_folders_become_one_in_the_same_bytes_each_time(pictures, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  Image.new("RGB", (9, 9), "red").save(other / "0.png")
  (other / "captions.jsonl").write_text('{"file": "0.png", "caption": "all réd"}\n', encoding="utf-8")
  files = []
  for name, workers in (("one", 1), ("two", 4)):
    prepare(f"{pictures},{other}", tmp_path / name, size=16, workers=workers, say=quiet)
    files.append({path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*.*")})
  assert files[0].keys() == files[1].keys()
  for path, a in files[0].items():
    assert a.read_bytes() == files[1][path].read_bytes()
  source = FolderSource(tmp_path / "one", 16, "all")
  assert source[len(source) - 1].captions == ("all réd",)


def test_a_finished_output_of_the_same_request_is_kept_and_any_other_is_refused(pictures, tmp_path):
  said: list[str] = []
  output = tmp_path / "out"
  first = prepare(pictures, output, size=16, say=said.append)
  stamp = (output / "captions.jsonl").stat().st_mtime_ns
  assert prepare([pictures], output, size=16, say=said.append) == first
  assert "already holds" in said[-1]
  assert (output / "captions.jsonl").stat().st_mtime_ns == stamp
  with pytest.raises(UserError, match="prepared from other inputs or settings"):
    prepare(pictures, output, size=24, say=quiet)
  with pytest.raises(UserError, match="pictures exists: give another output"):
    prepare(pictures, pictures, size=16, say=quiet)


def test_an_interrupted_run_leaves_no_output_and_is_begun_again(pictures, tmp_path):
  output = tmp_path / "out"

  def interrupt(_: str) -> None:
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    prepare(pictures, output, size=16, say=interrupt)
  assert not output.exists()
  assert (tmp_path / "out.partial").exists()
  assert prepare(pictures, output, size=16, say=quiet)["written"] == 13
  assert not (tmp_path / "out.partial").exists()


def test_a_strange_folder_in_the_way_is_left_alone(pictures, tmp_path):
  precious = tmp_path / "out.partial" / "thesis.txt"
  precious.parent.mkdir()
  precious.write_text("years of work")
  with pytest.raises(UserError, match="was not written by prepare"):
    prepare(pictures, tmp_path / "out", size=16, say=quiet)
  assert precious.exists()


def test_an_empty_output_folder_is_filled(pictures, tmp_path):
  (tmp_path / "out").mkdir()
  assert prepare(pictures, tmp_path / "out", size=16, say=quiet)["written"] == 13


def test_inputs_without_a_good_picture_are_an_error_that_names_them(pictures, tmp_path):
  for picture in pictures.glob("*.png"):
    picture.unlink()
  with pytest.raises(UserError, match="nothing to prepare: 16 of 16 records are bad .*15 missing file.*0.png"):
    prepare(pictures, tmp_path / "out", size=16, say=quiet)
  assert not list(tmp_path.glob("out*"))
