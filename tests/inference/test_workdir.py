from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from PIL import Image

from clipflow_jax.errors import UserError
from clipflow_jax.inference import workdir, workdir_page
from clipflow_jax.training import checkpoint, stages, state
from tests import tiny_runs
from tests.inference.test_info import row

FILE = "configs/of_mine.py:size=1"


def nothing(file: str) -> ConfigDict:
  raise UserError(f"config file {file!r} does not exist")


def told(path: Path, load: workdir.Load = nothing) -> str:
  return workdir.describe(workdir.look(path, load))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
  shutil.copytree(trained, tmp_path / "run")
  return tmp_path / "run"


def rewrite_meta(run: Path, **fields: object) -> None:
  file = run / "checkpoints" / "2" / "meta" / "data.json"
  meta = json.loads(file.read_text())
  meta["config"] |= fields
  file.write_text(json.dumps(meta))


def test_a_stage_tells_its_step_its_metrics_and_its_samples(run: Path):
  (run / "samples" / "decoder_000002_note.txt").write_text("")
  text = told(run)
  assert row(text, "decoder")[1] == "step 2 of 2"
  assert re.search(r"step 2: .*loss [\d.]+", text)
  assert "1 samples, the last" in text and "decoder_000002_note.txt" in text.replace("\n", "").replace(" ", "")
  assert "report" not in text


def test_a_stage_tells_its_parameters_by_part(trained: Path):
  (stage,) = workdir.look(trained, nothing).stages
  parts = checkpoint.load(trained, ("trained", "frozen")).state
  sizes = {name: sum(leaf.size for leaf in state.flatten(tree).values()) for name, tree in parts.items()}
  assert stage.parameters["decoder"] == (sizes["trained"],) * 2
  assert sum(whole for _, whole in stage.parameters.values()) == sum(sizes.values())
  assert f"decoder: {sizes['trained']:,} of {sizes['trained']:,} trained" in told(trained)


def test_a_stage_tells_how_far_it_is_in_its_data_and_what_it_saved(trained: Path):
  (stage,) = workdir.look(trained, nothing).stages
  assert stage.data[:2] == ["shapes data, 2 batches of 4 rows", "1 shard(s) of the stream, at item 8"]
  assert stage.data[2] == "2,147,483,647 records of data.source"
  (line,) = stage.checkpoints
  assert re.fullmatch(r"2: \d\.\d MB, \d{4}-\d\d-\d\d \d\d:\d\d", line)


def test_bad_records_are_counted(run: Path):
  (run / "data_errors.jsonl").write_text('{"name": "a"}\n{"name": "b"}\n')
  assert "2 bad records named in data_errors*.jsonl" in told(run)


def test_what_differs_from_the_configs_file_is_shown(run: Path):
  rewrite_meta(run, file=FILE)
  there = tiny_runs.decoder_stage(model=tiny_runs.model(), steps=7)
  there.optimizer.warmup = 3

  def load(file: str) -> ConfigDict:
    assert file == FILE
    return there

  (stage,) = workdir.look(run, load).stages
  assert stage.changes == [workdir.Change("optimizer.warmup", "3", "1"), workdir.Change("steps", "7", "2")]
  assert "steps: 2 (there 7)" in told(run, load)
  there.update(steps=2)
  there.optimizer.warmup = 1
  assert row(told(run, load), "  config")[-1] == f"{FILE}, as it is"


def test_a_stage_of_several_is_compared_with_the_one_of_its_name(run: Path):
  rewrite_meta(run, file=FILE)
  stage = tiny_runs.decoder_stage(model=tiny_runs.model(), steps=3)
  several = ConfigDict(dict(stages={"decoder": stage}, order=("decoder",)))
  assert "steps: 2 (there 3)" in told(run, lambda file: several)
  assert "no stage 'decoder'" in told(run, lambda file: ConfigDict(dict(stages={}, order=("other",))))


def test_a_file_that_is_gone_is_a_note(run: Path):
  rewrite_meta(run, file=FILE)
  text = " ".join(told(run).split())
  assert "does not exist" in text and "as it is" not in text


def test_a_run_tells_of_every_stage_and_of_the_report(trained: Path, tmp_path: Path):
  (tmp_path / "decoder").symlink_to(trained)
  (tmp_path / stages.ORDER).write_text(json.dumps(["decoder", "generation"]))
  (tmp_path / "report").mkdir()
  metrics = {"question_accuracy": 0.123456, "by_category": {"one": 1.0}, "seed": 3, "commit": "abc"}
  (tmp_path / "report" / "metrics.json").write_text(json.dumps(metrics))
  text = told(tmp_path)
  assert row(text, "decoder")[1] == "step 2 of 2"
  assert row(text, "generation")[1] == "no checkpoint yet"
  assert row(text, "question_accuracy") == ["question_accuracy", "0.1235"]
  assert row(text, "seed")[1] == "3" and row(text, "commit")[1] == "abc"
  assert "by_category" not in text


def test_what_is_damaged_is_told_and_not_fatal(run: Path):
  for file in (run / "checkpoints" / "2" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  (run / "metrics.jsonl").write_bytes(b"\xff\xfe{")
  (run / "samples" / "a.png").write_text("no picture")
  (run / "report").mkdir()
  (run / "report" / "metrics.json").write_text("{")
  found = workdir.look(run, nothing)
  text = "".join(workdir.describe(found).split())  # as lines end where the terminal does
  for note in ("noreadablecheckpoint", "metrics.jsonlcannotberead", "metrics.jsoncannotberead"):
    assert note in text
  assert "a.png cannot be read" in workdir_page.page(found)


def test_metrics_cut_off_by_a_kill_are_those_of_the_line_before(tmp_path: Path):
  (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 7, "loss": 1.5, "mfu": null}\n{"stage": "a", "st')
  text = told(tmp_path)
  assert "no checkpoint yet" in text and "step 7: loss 1.5, mfu None" in text


def test_a_folder_without_a_run_is_an_error(tmp_path: Path):
  for path in (tmp_path, tmp_path / "nowhere"):
    with pytest.raises(UserError, match=f"{path} holds no run"):
      told(path)


def test_the_page_shows_every_part_and_needs_nothing_beside_it(run: Path):
  rewrite_meta(run, file=FILE)
  (run / "samples" / "decoder_000002_captions.txt").write_text("a <red> circle")
  Image.new("RGB", (8, 8), "red").save(run / "samples" / "decoder_000002_drawn.png")
  there = tiny_runs.decoder_stage(model=tiny_runs.model(), steps=7)
  html = workdir_page.page(workdir.look(run, lambda file: there))
  for part in ("step 2 of 2", FILE, "<td>steps</td><td>7</td><td>2</td>", "<td>decoder</td>", "loss", "shapes data"):
    assert part in html
  assert "a &lt;red&gt; circle" in html and "decoder_000002_drawn.png" in html
  sources = re.findall(r'(?:src|href)="([^"]{0,22})', html)
  assert len(sources) == 2 and set(sources) == {"data:image/png;base64,"}
