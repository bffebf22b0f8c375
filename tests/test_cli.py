from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipflow_jax import cli, commands, config_file
from clipflow_jax.errors import UserError
from clipflow_jax.inference.pipeline import ClipFlow
from configs import quickstart
from tests import tiny_runs

ROOT = Path(__file__).parents[1]
COMMANDS = (
  "quickstart",
  "train",
  "draw",
  "chat",
  "serve",
  "demo",
  "evaluate",
  "prepare",
  "cache-features",
  "plan",
  "import",
  "export",
  "bench",
  "info",
)


def fails(capsys, *argv: str) -> str:
  """The one line that a bad command says."""
  assert cli.main([str(arg) for arg in argv]) == 2
  _, error = capsys.readouterr()
  assert error.count("\n") == 1 and error.startswith("clipflow: ") and "Traceback" not in error, error
  return error


def run(*argv: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "clipflow_jax.cli", *argv]
  return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_with_an_example(capsys, command):
  with pytest.raises(SystemExit) as stop:
    cli.main([command, "--help"])
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert f"example: clipflow {command} " in out
  assert out.startswith(f"usage: clipflow {command}")


def test_help_names_every_command(capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main(["--help"])
  assert stop.value.code == 0
  out = capsys.readouterr().out
  assert re.findall(r"\n    ([\w-]+)", out) == list(COMMANDS)  # each with its summary beside or below it


def test_no_command_shows_the_help(capsys):
  assert cli.main([]) == 2
  assert "COMMAND" in capsys.readouterr().out


# Configs.


def test_any_key_of_a_config_can_be_overridden():
  overrides = ["--config.steps=7", "--config.data.source.size=32", "--config.optimizer.name=adamw"]
  config = config_file.load("configs/contrastive.py", overrides)
  assert (config.steps, config.data.source.size, config.optimizer.name) == (7, 32, "adamw")
  nested = config_file.load("configs/quickstart.py", ["--config.stages.decoder.steps=3"])
  assert nested.stages.decoder.steps == 3


@pytest.mark.parametrize("value", ["1", "true"])
def test_a_config_takes_arguments_behind_a_colon(value):
  config = config_file.load(f"configs/quickstart.py:fast={value},seed=9", [])
  assert {stage.seed for stage in config.stages.values()} == {9}
  slow = config_file.load("configs/quickstart.py", [])
  assert all(config.stages[name].steps < slow.stages[name].steps for name in slow.order)


def test_a_config_may_lie_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = config_file.load("configs/contrastive.py:model=small", [])  # beside the package
  assert (config.name, config.file) == ("contrastive", "configs/contrastive.py:model=small")
  Path("mine.py").write_text("from configs import contrastive\nget_config = contrastive.get_config\n")
  assert config_file.load("mine.py", ["--config.steps=3"]).steps == 3


@pytest.mark.parametrize(
  ("config", "override", "says"),
  [
    ("configs/contrastive.py", "--config.stebs=3", "unknown key stebs; Did you mean steps"),
    ("configs/contrastive.py", "--config.modle.width=3", "unknown key modle"),
    ("configs/contrastive.py", "--config.data.source.colour=3", "unknown key colour"),
    ("configs/contrastive.py", "--config.steps=many", "many"),
    ("configs/contrastive.py", "--config.steps=1.5", "1.5"),
    ("configs/contrastive.py", "--config.steps", "value"),
    ("configs/nowhere.py", "--config.steps=3", "config file 'configs/nowhere.py' does not exist"),
    (
      "configs/contrastive.py:fast=1",
      "--config.steps=3",
      "argument 'fast' is unknown; there are model, hardware, data, tower, size, from",
    ),
    ("configs/quickstart.py:fats=1", "--config.order=1", "argument 'fats' is unknown; there are fast, seed"),
    ("configs/quickstart.py:seed=x", "--config.order=1", "'x' is not like 0"),
    ("configs/quickstart.py:seed=1.5", "--config.order=1", "'1.5' is not like 0"),
    ("configs/quickstart.py:fast=2", "--config.order=1", "'2' is not like False"),
  ],
)
def test_a_config_that_is_wrong_is_told_in_one_line(capsys, tmp_path, config, override, says):
  said = fails(capsys, "train", f"--config={config}", f"--workdir={tmp_path / 'run'}", override)
  assert says in said
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("written", "says"),
  [
    ("def get_config(:", "invalid syntax"),
    ("def get_config(arg=''):\n  return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
    ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    ("get_config = undefined", "name 'undefined' is not defined"),
    ("def get_config():\n  1 / 0", "division by zero"),
    ("def get_config():\n  pass", "get_config returns None, which is no ConfigDict"),
  ],
)
def test_a_config_file_that_fails_is_told_in_one_line(capsys, tmp_path, written, says):
  (tmp_path / "mine.py").write_text(written)
  said = fails(capsys, "info", f"--config={tmp_path / 'mine.py'}")
  assert said.startswith(f"clipflow: config {tmp_path / 'mine.py'}: ") and says in said


# Arguments.


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (("paint",), "invalid choice: 'paint'"),
    (("draw",), "the following arguments are required: --workdir"),
    (("draw", "--workdir=x", "--steps=many"), "argument --steps: invalid int value: 'many'"),
    (("draw", "--workdir=x", "--promt=a star"), "unknown argument '--promt=a star'; see clipflow draw --help"),
    (("draw", "--workdir=x", "--config.steps=3"), "unknown argument"),
    (("train", "--workdir=x"), "the following arguments are required: --config"),
    (("info", "--config.steps", "3"), "unknown argument '--config.steps'"),
    (("evaluate", "--workdir=x", "--n=1"), "argument --n: '1' is no whole number of 2 or more"),
    (("evaluate", "--workdir=x", "--per-category=0"), "argument --per-category: '0' is no whole number of 1 or more"),
    (("evaluate", "--workdir=x", "--tasks=all", "--n=5", "--seed=1"), "--n, --seed are of the report without --tasks"),
    (("evaluate", "--real=x", "--fake=x", "--per-category=5"), "--per-category are of the report without --tasks"),
    (("evaluate", "--workdir=x", "--config.seed=1"), "'--config.seed=1' overrides what --tasks=... of a --workdir"),
    (("info", "--workdir=x", "--config.seed=1"), "'--config.seed=1': --workdir shows a run as it was"),
    (("evaluate", "--workdir=x", "--seed=-1"), "argument --seed: '-1' is no whole number of 0 or more"),
    (("evaluate", "--workdir=x", "--seed=one"), "argument --seed: 'one' is no whole number"),
    (("evaluate", "--workdir=x", "--json=no/x.json"), "argument --json: 'no/x.json' cannot be written: give a file in"),
    (("evaluate", "--real=x", "--statistics=no/x.npz"), "argument --statistics: 'no/x.npz' cannot be written"),
    (("evaluate", "--workdir=x", "--statistics=x.npz"), "--statistics=x.npz needs --real=DIR"),
    (("evaluate", "--workdir=x", "--tasks=all", "--config=configs/joint.py"), "configs/joint.py has no tasks"),
    (("bench", "data", "--rounds=0"), "argument --rounds: '0' is no whole number of 1 or more"),
    (("bench", "data", "--json=no/x.json"), "argument --json: 'no/x.json' cannot be written"),
  ],
)
def test_arguments_that_are_wrong_are_told_in_one_line(capsys, argv, says):
  assert says in fails(capsys, *argv)


def options_of_paths() -> list[tuple[str, str]]:
  """(command, option) of every path that can be said."""
  (subparsers,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
  kinds = (cli._local, cli._path, cli._folder, cli._written)
  found = [(name, action) for name, sub in subparsers.choices.items() for action in sub._actions]
  assert not [(name, action.option_strings) for name, action in found if action.type is Path]  # as they are read there
  return [(name, action.option_strings[0]) for name, action in found if action.type in kinds]


def test_an_address_in_place_of_a_path_is_told_in_one_line(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  options = options_of_paths()
  assert {("train", "--workdir"), ("draw", "--output"), ("import", "--from"), ("prepare", "--input")} <= set(options)
  for command, option in options:
    said = fails(capsys, command, f"{option}=gs://bucket/run")
    assert f"argument {option}: gs://bucket/run is an address, not a path: mount" in said and "gcsfuse" in said
  assert list(tmp_path.iterdir()) == []
  assert cli._path("runs/gs:/x") == Path("runs/gs:/x")


@pytest.mark.parametrize(
  ("config", "override", "says"),
  [
    ("configs/joint.py", "init_from=runs/a,gs://b/c", "config.init_from: gs://b/c is an address"),
    ("configs/joint.py", "data.features=s3://b/c", "config.data.features: s3://b/c is an address"),
    ("configs/folder.py:path=gs://b/c", "order=('contrastive',)", "gs://b/c is an address"),
    ("configs/finetune.py:from=gs://b/c", "steps=1", "gs://b/c is an address"),
    (
      "configs/evaluate.py",
      "tasks.zero_shot.classes=https://a.b/c",
      "config.tasks.zero_shot.classes: https://a.b/c is",
    ),
  ],
)
def test_an_address_in_a_config_is_told_in_one_line(capsys, tmp_path, config, override, says):
  assert says in fails(capsys, "train", f"--config={config}", f"--config.{override}", f"--workdir={tmp_path / 'run'}")
  assert not (tmp_path / "run").exists()


def test_what_jax_or_a_source_of_ones_own_reads_may_be_an_address(tmp_path):
  assert config_file.load("configs/joint.py", ["--config.compilation_cache=gs://b/c"]).compilation_cache == "gs://b/c"
  (tmp_path / "mine.py").write_text(
    "from configs import joint\n\ndef get_config(arg=''):\n  config = joint.get_config(arg)\n"
    "  config.data.source = dict(kind='mine:Far', path='gs://b/c')\n  return config\n"
  )
  assert config_file.load(str(tmp_path / "mine.py"), []).data.source.path == "gs://b/c"


def test_a_workdir_that_is_missing_or_empty_is_told_in_one_line(capsys, tmp_path):
  missing = tmp_path / "nowhere"
  for argv in (("draw",), ("chat", "--message=how?"), ("serve", "--port=0"), ("evaluate",)):
    assert f"workdir {missing} does not exist" in fails(capsys, *argv, f"--workdir={missing}")
    assert f"no checkpoint in {tmp_path}" in fails(capsys, *argv, f"--workdir={tmp_path}")
  assert f"{missing} holds no run" in fails(capsys, "info", f"--workdir={missing}")


def test_a_folder_to_prepare_that_is_missing_is_told_in_one_line(capsys, tmp_path):
  said = fails(capsys, "prepare", f"--input={tmp_path / 'nowhere'}", f"--output={tmp_path / 'out'}")
  assert "nowhere" in said


def test_a_checkpoint_that_cannot_be_read_is_told_in_one_line(capsys, trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  for file in (tmp_path / "run" / "checkpoints" / "2").rglob("*"):
    if file.is_file():
      file.write_bytes(b"\\0" * 10)
  said = fails(capsys, "draw", f"--workdir={tmp_path / 'run'}", "--prompt=a star")
  assert "no readable checkpoint" in said and "restore the files from a copy" in said


def test_files_that_cannot_be_read_or_written_are_told_in_one_line(capsys, trained, tmp_path):
  assert "cannot read" in fails(capsys, "draw", f"--workdir={trained}", f"--prompts={tmp_path / 'none.txt'}")
  (tmp_path / "broken.png").write_bytes(b"no picture")
  for name in ("none.png", "broken.png"):
    argv = ("chat", f"--workdir={trained}", f"--image={tmp_path / name}", "--message=how?")
    assert f"cannot read the picture {tmp_path / name}" in fails(capsys, *argv)


def test_a_prompt_that_is_too_long_is_told_in_one_line(capsys, trained):
  said = fails(capsys, "draw", f"--workdir={trained}", f"--prompt={'a star ' * 1000}")
  assert "does not fit" in said
  assert "does not fit" in fails(capsys, "chat", f"--workdir={trained}", f"--message={'how? ' * 1000}")


@pytest.mark.parametrize(
  ("option", "says"),
  [
    ("--output=no/folder.png", "cannot write no/folder.png: there is no folder no"),
    ("--output=drawn.txt", "no picture ends in '.txt'; choose .png, or .npy for features"),
    ("--output=drawn", "no picture ends in ''"),
    ("--seed=-1", "-1 is no seed; choose one of 0 to 4294967295"),
    (f"--seed={2**32}", "4294967296 is no seed"),
    ("--steps=0", "give a whole number, at least 1"),
    ("--best-of=0", "the best of 0 candidates is none"),
    ("--judge=me", "judge 'me' is unknown"),
    ("--count=0", "--count=0 draws nothing"),
    ("--prompts=empty.txt", "empty.txt has no prompts"),
  ],
)
def test_what_cannot_be_drawn_is_told_before_a_model_is_loaded(capsys, tmp_path, monkeypatch, option, says):
  monkeypatch.chdir(tmp_path)
  Path("empty.txt").write_text("\n \n")
  assert says in fails(capsys, "draw", "--workdir=nowhere", option)


# Commands that do something.


def test_a_picture_is_changed_by_a_model_that_was_taught_to(capsys, trained, tmp_path):
  picture, argv = tmp_path / "a.png", ("draw", f"--workdir={trained}", f"--image={tmp_path / 'a.png'}")
  assert "--image wants a --prompt that says what shall become of it" in fails(capsys, *argv)
  assert "cannot read the picture" in fails(capsys, *argv, "--prompt=make it red")
  Image.new("RGB", (30, 20), "red").save(picture)
  assert "this model was not taught to change pictures" in fails(capsys, *argv, "--prompt=make it red")


def test_one_picture_is_written_as_it_is_to_be_shown_to_the_model_again(trained, tmp_path):
  argv = ["draw", f"--workdir={trained}", "--prompt=a star", "--guidance=1", f"--output={tmp_path / 'one.png'}"]
  assert cli.main(argv) == 0
  assert Image.open(tmp_path / "one.png").size == (tiny_runs.SIZE, tiny_runs.SIZE)


def test_draw_writes_a_picture(capsys, trained, tmp_path):
  output = tmp_path / "drawn.png"
  argv = ["draw", f"--workdir={trained}", "--prompt=a star", "--count=2", "--guidance=1", f"--output={output}"]
  assert cli.main(argv) == 0
  assert f"drew 2 picture(s) into {output}" in capsys.readouterr().out
  assert Image.open(output).size[0] > 2 * 24


def test_draw_reads_prompts_from_a_file(trained, tmp_path):
  (tmp_path / "prompts.txt").write_text("a star\n\na red circle\n", encoding="utf-8-sig")
  output = tmp_path / "drawn.npy"
  argv = ["draw", f"--workdir={trained}", f"--prompts={tmp_path / 'prompts.txt'}", "--guidance=1", f"--output={output}"]
  assert cli.main(argv) == 0
  expected = ClipFlow.from_checkpoint(trained).draw_features(["a star", "a red circle"], guidance=1)
  np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


def test_chat_answers_a_question_about_a_picture(capsys, trained, tmp_path):
  Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
  assert cli.main(["chat", f"--workdir={trained}", f"--image={tmp_path / 'red.png'}", "--message=what colour?"]) == 0
  assert capsys.readouterr().out.endswith("\n")


def test_an_empty_message_is_one_too(capsys, trained, monkeypatch):
  monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked for another"))
  assert cli.main(["chat", f"--workdir={trained}", "--message="]) == 0


def test_a_message_that_is_no_text_is_told_in_one_line(capsys, trained, monkeypatch):
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"how \xff?\n"), "utf-8"))
  assert "cannot read the message: 'utf-8' codec" in fails(capsys, "chat", f"--workdir={trained}")


def test_info_shows_what_the_model_will_see_of_its_data(capsys, tmp_path):
  overrides = ["--config.tokenizer.examples=50", "--config.data.batch_size=2"]
  argv = ["info", "--data", "--config=configs/generation.py", f"--output={tmp_path / 'seen'}", *overrides]
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  assert "generation: 16 rows: 1.0 examples each, slots " in out and str(tmp_path / "seen") in out
  assert sorted(file.name for file in (tmp_path / "seen").iterdir()) == ["generation.html", "generation.png"]
  argv = ("info", "--data", f"--output={tmp_path / 'none'}")
  assert "takes the config of a stage or of a run" in fails(capsys, *argv, "--config=configs/evaluate.py")
  said = fails(capsys, *argv, "--config=configs/generation.py", "--config.data.source.size=48")
  assert "data.source: size is 48, but the model's tower sees 60 pixels: set data.source.size" in said


def test_features_are_cached_for_the_config_of_one_stage(capsys, tmp_path):
  argv = ("cache-features", f"--workdir={tmp_path}", f"--output={tmp_path / 'out'}")
  assert "takes the config of one stage" in fails(capsys, *argv, "--config=configs/quickstart.py")
  assert f"no checkpoint in {tmp_path}" in fails(capsys, *argv, "--config=configs/joint.py")


@pytest.mark.parametrize(
  ("argv", "said"),
  [
    (
      ("quickstart", "--config=configs/contrastive.py"),
      "takes the config of a whole run, such as configs/quickstart.py",
    ),
    (("quickstart", "--config.evaluation.n=0"), "evaluation.n is 0: give 2 or more"),
    (("train", "--config=configs/evaluate.py"), "takes the config of a stage or of a run"),
    (("train", "--config=configs/finetune.py:data=nowhere"), "data=nowhere: it is not there"),
    (("train", "--config=configs/edit.py:from=nowhere"), "no readable checkpoint in nowhere"),
    (("train", "--config=configs/quickstart.py", "--config.stages.joint.sampling.eta=5.0"), "sampling eta 5.0"),
  ],
)
def test_what_makes_no_run_is_told_before_it_begins(capsys, tmp_path, argv, said):
  assert said in fails(capsys, *argv, f"--workdir={tmp_path / 'run'}")
  assert not (tmp_path / "run").exists()


def test_a_stage_whose_tower_nobody_taught_is_refused(capsys, tmp_path):
  said = fails(capsys, "train", "--config=configs/decoder.py", f"--workdir={tmp_path / 'run'}")
  assert "freezes clip_model/vision_tower" in said and "init_from" in said and "frozen_at_random=True" in said


def test_a_workdir_that_cannot_be_is_told(capsys, tmp_path):
  (tmp_path / "file").touch()
  for command in (("train", "--config=configs/contrastive.py"), ("quickstart",)):
    assert "cannot write into" in fails(capsys, *command, f"--workdir={tmp_path / 'file'}")
    assert "it is empty: name a folder" in fails(capsys, *command, "--workdir=")


def test_info_describes_a_config_and_a_workdir(capsys, trained, tmp_path):
  assert cli.main(["info", "--config=configs/decoder.py", "--config.steps=77"]) == 0
  assert "77" in capsys.readouterr().out
  page = tmp_path / "run.html"
  assert cli.main(["info", f"--workdir={trained}", f"--output={page}"]) == 0
  assert "step 2 of 2" in capsys.readouterr().out and "step 2 of 2" in page.read_text()


def test_a_keyboard_interrupt_is_no_error(monkeypatch):
  def interrupt(options):
    raise KeyboardInterrupt

  monkeypatch.setattr(commands, "info", interrupt)
  interrupt.__name__ = "info"
  assert cli.main(["info"]) == 130


def test_the_program_says_one_line_too(tmp_path):
  result = run("train", "--config=configs/contrastive.py", f"--workdir={tmp_path}", "--config.stebs=3")
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr.startswith("clipflow: ") and result.stderr.count("\n") == 1


def test_a_user_error_is_one_line():
  with pytest.raises(UserError) as error:
    config_file.load("configs/nowhere.py", [])
  assert "\n" not in str(error.value)


# The quickstart's model with one layer where it has several: what takes the time here is to compile it.
SHALLOW = [
  f"--config.stages.{stage}.{key}"
  for stage in quickstart.get_config().order
  for key in (
    *(f"model.{part}.layers=1" for part in ("clip.vision", "clip.text", "transformer", "pixel_decoder")),
    "tokenizer.examples=100",
    "sampling.steps=4",
  )
]


@pytest.mark.slow
def test_quickstart_goes_from_nothing_to_a_report(tmp_path):
  workdir = tmp_path / "run"
  command = ("quickstart", "--config=configs/quickstart.py:fast=1", f"--workdir={workdir}", *SHALLOW)
  result = run(*command)
  assert result.returncode == 0, result.stderr
  metrics = json.loads((workdir / "report" / "metrics.json").read_text())
  wanted = {
    "minutes_total",
    "minutes_install",
    "peak_memory_gib",
    "compositional_one",
    "compositional_two",
    "compositional_unseen",
    "compositional_by_category",
    "question_accuracy",
    "caption_exact",
    "zero_shot_accuracy",
    "feature_distance",
    "feature_distance_real",
    "decoder_psnr",
    "versions",
    "seed",
    "commit",
  }
  assert wanted <= metrics.keys()
  assert 0 <= metrics["question_accuracy"] <= 1 and metrics["minutes_total"] > 0
  for name in ("index.html", "samples.png", "reconstructions.png", "curves.png", "captions.txt"):
    assert (workdir / "report" / name).stat().st_size > 0, name
  again = run(*command)
  assert again.returncode == 0 and "compiled the step" not in again.stderr  # finished stages are not run again
  after = json.loads((workdir / "report" / "metrics.json").read_text())
  assert after["minutes_total"] == metrics["minutes_total"]  # what the training took, not the second evaluation
