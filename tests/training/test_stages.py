from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from clipflow_jax import files
from clipflow_jax.errors import UserError
from clipflow_jax.parallel import distributed
from clipflow_jax.training import checkpoint, loop, settings, stages
from tests import tiny_runs


def config(**steps: int) -> ConfigDict:
  every = {name: dict(name=name, steps=count, init_from="") for name, count in steps.items()}
  return ConfigDict(dict(stages=every, order=tuple(steps)))


def finish(workdir: Path, step: int) -> None:
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  checkpoints.save(step, {"x": np.zeros(2)}, data_state={}, meta={})
  checkpoints.close()


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, str, str]]:
  """(stage, its workdir's name, init_from's last part) of every stage that was trained."""
  calls: list[tuple[str, str, str]] = []

  def train(config, workdir, sample):
    calls.append((config.name, workdir.name, Path(config.init_from).name if config.init_from else ""))
    finish(workdir, config.steps)

  monkeypatch.setattr(loop, "train", train)
  monkeypatch.setattr(settings, "check", lambda stage: None)
  monkeypatch.setattr(settings, "compare", lambda stage, workdir: None)
  return calls


def test_stages_are_trained_in_order_each_from_the_one_before(trained, tmp_path):
  stages.train(config(b=3, a=2, c=1), tmp_path / "run")
  assert trained == [("b", "b", ""), ("a", "a", "b"), ("c", "c", "a")]
  assert json.loads((tmp_path / "run" / stages.ORDER).read_text()) == ["b", "a", "c"]


def test_finished_stages_are_not_trained_again(trained, tmp_path):
  finish(tmp_path / "a", 2)
  finish(tmp_path / "b", 2)  # of 3: it was interrupted
  stages.train(config(a=2, b=3, c=1), tmp_path)
  assert trained == [("b", "b", "a"), ("c", "c", "b")]
  stages.train(config(a=2, b=3, c=1), tmp_path)
  assert len(trained) == 2


def test_a_stage_that_names_its_beginning_keeps_it_and_a_run_may_have_one_too(trained, tmp_path):
  run = config(a=1, b=1, c=1)
  run.init_from = "elsewhere"
  run.stages.c.init_from = "another"
  stages.train(run, tmp_path)
  assert trained == [("a", "a", "elsewhere"), ("b", "b", "a"), ("c", "c", "another")]


def test_a_config_without_an_order_is_one_stage(trained, tmp_path):
  stages.train(ConfigDict(dict(name="x", steps=1, init_from="")), tmp_path / "one")
  assert trained == [("x", "one", "")]
  assert not (tmp_path / "one" / stages.ORDER).exists()


def test_a_stage_is_finished_when_its_last_step_is_there(tmp_path):
  assert not stages.is_finished(tmp_path, 20)
  finish(tmp_path, 2)
  (tmp_path / "checkpoints" / "20.damaged").mkdir()
  assert not stages.is_finished(tmp_path, 20)
  finish(tmp_path, 20)
  assert stages.is_finished(tmp_path, 20)
  (tmp_path / "checkpoints" / "20" / "state" / "manifest.ocdbt").write_bytes(b"")
  assert not stages.is_finished(tmp_path, 20)  # damaged since: it goes on from step 2


def test_the_newest_is_the_last_stage_with_a_checkpoint(trained, tmp_path):
  stages.train(config(a=1, b=1), tmp_path)
  (tmp_path / stages.ORDER).write_text(json.dumps(["a", "b", "c"]))
  assert stages.newest(tmp_path) == tmp_path / "b"
  assert stages.newest(str(tmp_path / "a")) == tmp_path / "a"  # not a run of several
  for left in ("1000.orbax-checkpoint-tmp", "5.damaged"):  # of a save that was killed, and of what was set aside
    (tmp_path / "c" / "checkpoints" / left).mkdir(parents=True)
  assert stages.newest(tmp_path) == tmp_path / "b"


def test_a_run_that_has_nothing_yet_is_named(tmp_path):
  (tmp_path / stages.ORDER).write_text('["a"]')
  with pytest.raises(UserError, match=f"no stage of {tmp_path} has a checkpoint yet"):
    stages.newest(tmp_path)


def test_the_history_is_every_stages_lines_in_order(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text(
      f'{{"stage": "{name}", "step": 1}}\n{{"stage": "{name}", "step": 2}}\n'
    )
  (tmp_path / stages.ORDER).write_text('["b", "a", "c"]')
  assert [(row["stage"], row["step"]) for row in stages.history(tmp_path)] == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]
  assert [row["stage"] for row in stages.history(tmp_path / "a")] == ["a", "a"]
  assert stages.history(tmp_path / "nowhere") == []


def test_a_line_cut_off_by_a_kill_is_no_history(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
  assert stages.history(tmp_path) == [{"stage": "a", "step": 1}]


def test_a_run_that_has_gone_further_is_not_trained_again(trained, tmp_path):
  finish(tmp_path, 6)
  one = ConfigDict(dict(name="x", steps=2, init_from=""))
  stages.train(one, tmp_path)
  assert not trained
  one.steps = 7
  stages.train(one, tmp_path)
  assert trained == [("x", tmp_path.name, "")]


def test_the_settings_of_every_stage_are_checked_before_the_first_is_trained(monkeypatch, tmp_path):
  monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a stage was trained"))
  run = ConfigDict(dict(stages=dict(a=tiny_runs.decoder_stage(), b=tiny_runs.decoder_stage(steps=0)), order=("a", "b")))
  with pytest.raises(UserError, match="steps is 0: give 1 or more"):
    stages.train(run, tmp_path)


@pytest.mark.parametrize(
  "run", [config(a=1, b=1), ConfigDict(dict(name="a", steps=1, init_from=""))], ids=["several", "one"]
)
def test_nothing_is_trained_in_a_workdir_that_processes_do_not_share(run, trained, tmp_path, monkeypatch):
  def refuse(folder):
    raise UserError(f"{folder.name} is not shared")

  monkeypatch.setattr(distributed, "share", refuse)
  with pytest.raises(UserError, match="^run is not shared"):
    stages.train(run, tmp_path / "run")
  assert not trained and not list((tmp_path / "run").iterdir())


def test_a_workdir_that_is_something_else_or_in_use_is_refused(trained, tmp_path):
  stages.train(config(a=1, b=1), tmp_path / "run")
  single = config(a=1).stages.a
  with pytest.raises(UserError, match=r"run holds a run of several stages \(its stages.json\)"):
    stages.train(single, tmp_path / "run")
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "manifest.json").write_text("{}")
  for made in (single, config(a=1)):
    with pytest.raises(UserError, match=r"data holds prepared data \(its manifest.json\)"):
      stages.train(made, tmp_path / "data")
  with files.held(tmp_path / "run"), pytest.raises(UserError, match="run is in use by process"):
    stages.train(config(a=1, b=1), tmp_path / "run")
