"""Every command of the README exists, with its options and configs, and is run by a test or marked as none can."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from clipflow_jax import cli, config_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
  line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]
MARKS = ("# needs the network", "# needs a pod", "# needs a GPU")
# A command, as `kind` writes it -> the test that runs it, or what it calls, at a small size.
RUN_BY = {
  "draw --workdir --prompt --output": "tests/test_cli.py::test_draw_writes_a_picture",
  "draw --workdir --prompts --output": (
    "tests/inference/test_drawings.py::test_every_picture_is_that_of_its_caption_and_seed"
  ),
  "draw --workdir --prompt": "tests/test_cli.py::test_draw_writes_a_picture",
  "draw --workdir --prompt --best-of": (
    "tests/inference/test_rerank.py::test_the_pipeline_decodes_the_best_of_its_candidates"
  ),
  "chat --workdir --image --message": "tests/test_cli.py::test_chat_answers_a_question_about_a_picture",
  "info --workdir": "tests/test_cli.py::test_info_describes_a_config_and_a_workdir",
  "info --workdir --output": "tests/test_cli.py::test_info_describes_a_config_and_a_workdir",
  "info --config=configs/quickstart.py": "tests/test_cli.py::test_info_describes_a_config_and_a_workdir",
  "info --config=configs/blip3o.py": "tests/test_cli.py::test_info_describes_a_config_and_a_workdir",
  "info --data --config=configs/joint.py --output": (
    "tests/test_cli.py::test_info_shows_what_the_model_will_see_of_its_data"
  ),
  "demo --workdir": "tests/demo/test_page.py::test_a_drawing_forms_and_is_the_one_that_the_command_draws",
  "serve --workdir --port": (
    "tests/demo/test_server.py::test_the_command_ends_with_0_when_what_it_was_asked_for_is_answered"
  ),
  "prepare --source=folder --input --output --size": (
    "tests/data/test_prepare.py::test_the_result_is_the_clean_part_of_the_input"
  ),
  "prepare --source=webdataset --input --output --size --format --min-side --max-aspect --dedup": (
    "tests/data/test_prepare.py::test_the_command_prepares_by_its_options"
  ),
  "prepare --source=parquet --input --output --option": "tests/data/test_prepare.py::test_every_source_can_be_prepared",
  "prepare --source=tfds --input --output --size": (
    "tests/data/test_tfds.py::test_a_named_set_is_read_with_its_own_splits_and_the_names_of_its_classes"
  ),
  "prepare --source=folder --input --output --beam": (
    "tests/data/test_beam.py::test_on_beam_the_shards_are_those_of_one_machine"
  ),
  "cache-features --config=configs/joint.py --workdir --count --output": (
    "tests/training/test_features.py::test_losses_are_those_on_pixels"
  ),
  "bench data --peer --json": "tests/bench/test_data.py::test_pictures_are_made_ready_by_either_way",
  "quickstart --config=configs/quickstart.py --workdir": (
    "tests/test_cli.py::test_quickstart_goes_from_nothing_to_a_report"
  ),
  "quickstart --config=configs/folder.py --workdir": (
    "tests/evaluation/test_report.py::test_a_folder_is_drawn_read_and_compared_without_its_bad_records"
  ),
  "train --config=configs/contrastive.py --workdir --config.steps": (
    "tests/training/test_loop.py::test_a_run_writes_metrics_and_its_last_checkpoint"
  ),
  "train --config=configs/joint.py --workdir --config.init_from --config.data.features": (
    "tests/training/test_features.py::test_a_run_on_cached_features_goes_on"
  ),
  "train --config=configs/edit.py --workdir": (
    "tests/training/test_edit.py::test_a_run_learns_edits_beside_what_it_could"
  ),
  "draw --workdir --image --prompt --output": (
    "tests/training/test_edit.py::test_a_picture_is_drawn_anew_as_the_prompt_says"
  ),
  "evaluate --config=configs/evaluate.py --workdir --tasks": "tests/training/test_edit.py::test_its_edits_are_measured",
  "train --config=configs/finetune.py --workdir": (
    "tests/training/test_finetune.py::test_a_stopped_run_goes_on_bit_for_bit"
  ),
  "bash launch/local_processes.sh": (
    "tests/faults/test_processes.py::test_a_run_is_the_same_on_one_two_or_four_processes_whatever_happens_to_them"
  ),
  "plan --config=configs/finetune.py --hardware": (
    "tests/training/test_plan.py::test_gpus_that_are_not_there_are_planned_for"
  ),
  "plan --config=configs/joint.py --hardware --json": (
    "tests/training/test_plan.py::test_a_tpu_that_is_not_there_is_planned_for"
  ),
  "evaluate --workdir --n": "tests/test_cli.py::test_quickstart_goes_from_nothing_to_a_report",
  "evaluate --workdir --tasks": (
    "tests/evaluation/test_command.py::test_tasks_of_a_trained_model_are_measured_the_same_twice"
  ),
  "evaluate --config=configs/evaluate.py --workdir --tasks --config.tasks.cifar100.data": (
    "tests/evaluation/test_suite.py::test_a_model_that_does_everything_right_scores_so"
  ),
  "evaluate --tasks --real --fake --inception --json": (
    "tests/evaluation/test_command.py::test_folders_are_compared_and_what_was_found_is_written"
  ),
  "export --workdir --output": "tests/training/test_exchange.py::test_what_was_trained_goes_out_as_it_came",
  "export --workdir --family --dtype --output": (
    "tests/training/test_handing_on.py::test_in_half_the_bits_statistics_and_norms_are_as_they_were"
  ),
  "export --workdir --adapters --output": (
    "tests/training/test_finetune.py::test_adapters_go_to_peft_and_come_back_bit_for_bit"
  ),
  "import --from --base --output": (
    "tests/training/test_finetune.py::test_adapters_go_to_peft_and_come_back_bit_for_bit"
  ),
  "import --from --output --config=configs/blip3o.py --check": (
    "tests/interop/test_blip3o.py::test_its_features_are_drawn_as_its_own_sampler_would"
  ),
}


def kind(line: str) -> str:
  """A command without the values of its options, save what config and what source it is about."""
  program, *words = shlex.split(line, comments=True)
  if program == "bash":
    return f"bash {words[0]}"
  told = [
    word.partition(":")[0] if word.startswith(("--config=", "--source=")) else word.partition("=")[0] for word in words
  ]
  return " ".join(told)


def test_there_are_commands():
  assert any(line.startswith("bash launch/quickstart.sh") for line in LINES)
  assert any(line.startswith("bash launch/test.sh") for line in LINES)


def test_each_is_run_by_a_test_or_marked_as_none_can():
  """A new one: name its test in RUN_BY, or write one of MARKS behind it."""
  unmarked = {kind(line) for line in LINES if not line.endswith(MARKS)}
  assert unmarked == RUN_BY.keys()
  for place in RUN_BY.values():
    file, _, name = place.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("clipflow ")])
def test_a_command_parses_and_its_config_loads(line):
  options, rest = cli._parser().parse_known_args(shlex.split(line, comments=True)[1:])
  assert options.command
  if re.search(r"[:,](from|tower)=", getattr(options, "config", None) or ""):
    return  # a workdir that is made by an earlier line: tests/training/test_finetune.py, test_exchange.py
  if getattr(options, "config", None):
    config_file.load(options.config, rest)
  else:
    assert not rest


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("bash ")])
def test_a_script_is_there_and_is_valid_bash(line):
  script = ROOT / shlex.split(line)[1]
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def rows(head: str) -> set[str]:
  """What stands in backticks in the first column of the table with this head."""
  table = README.partition(f"\n| {head} |")[2].partition("\n\n")[0]
  return {name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


def test_its_tables_have_every_command_and_every_config():
  (subparsers,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
  assert rows("`clipflow ...`") == set(subparsers.choices)
  configs = {path.name for path in (ROOT / "configs").glob("*.py") if "def get_config(" in path.read_text()}
  assert rows("config") == configs


def test_it_names_every_room():
  layout = README.partition("```\nclipflow_jax/")[2].partition("```")[0]
  packages = {path.parent.name for path in (ROOT / "clipflow_jax").glob("*/__init__.py")}
  assert packages | {"configs", "launch", "notebooks", "tests"} <= set(re.findall(r"(\w+)/", layout))


def test_its_pictures_are_there():
  pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
  assert pictures and all((ROOT / picture).is_file() for picture in pictures)
