"""The launch scripts: they pass shellcheck, and run with stand-ins for what is not here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipflow_jax.training.faults import HUNG

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
LOCAL = LAUNCH / "local_processes.sh"
SHELLCHECK = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_passes_shellcheck(script):
  command = [SHELLCHECK, "--external-sources", "--source-path", ROOT, script]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


# Processes on one machine.


def run(count: int, program: str, **environment: str) -> subprocess.CompletedProcess:
  command = ["bash", LOCAL, str(count), "bash", "-c", program]
  return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60, check=False)


def test_every_process_knows_its_number_how_many_there_are_and_where_they_meet():
  done = run(3, "echo $CLIPFLOW_PROCESS of $CLIPFLOW_PROCESSES at $CLIPFLOW_COORDINATOR")
  lines = sorted(done.stdout.splitlines())
  assert done.returncode == 0 and len(lines) == 3
  (place,) = {line.split()[-1] for line in lines}
  assert re.fullmatch(r"127\.0\.0\.1:\d+", place)
  assert [line.removesuffix(f" at {place}") for line in lines] == ["[0] 0 of 3", "[1] 1 of 3", "[2] 2 of 3"]


def test_when_one_fails_it_is_named_and_the_others_are_killed():
  done = run(3, "[[ $CLIPFLOW_PROCESS == 1 ]] && exit 7; sleep 600", GRACE="0")
  assert done.returncode == 7
  assert re.search(r"process 1 of 3 \(pid \d+\) ended with code 7: ends the others", done.stderr)
  assert len(re.findall(r"kills process [02] of 3 .*, which has not ended", done.stderr)) == 2


def test_a_killed_process_is_named_with_its_signal_and_the_others_may_say_their_last_words():
  program = "[[ $CLIPFLOW_PROCESS == 0 ]] && kill -9 $$; sleep 0.5; echo goodbye"
  done = run(2, program, GRACE="30")
  assert done.returncode == 128 + signal.SIGKILL
  assert re.search(r"process 0 of 2 \(pid \d+\) was killed by signal 9", done.stderr)
  assert "[1] goodbye" in done.stdout and "has not ended" not in done.stderr


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["alone", "group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_reaches_all_and_the_script_ends_behind_them(number, send):
  program = "trap 'sleep 0.5; echo stopped; exit 0' TERM; echo ready; for i in {1..200}; do sleep 0.1; done"
  heeds = ["env", "--default-signal=INT"]  # also where pytest itself does not
  command = [*heeds, "bash", LOCAL, "2", "bash", "-c", program]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
    assert {process.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    send(process.pid, number)
    assert {"[0] stopped", "[1] stopped"} <= set(process.stdout.read().splitlines())
  assert process.returncode == 0


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["two", "true"]])
def test_without_a_number_and_a_command_it_says_how_it_is_used(arguments):
  done = subprocess.run(["bash", LOCAL, *arguments], capture_output=True, text=True, check=False)
  assert done.returncode == 2 and "usage: local_processes.sh N COMMAND..." in done.stderr


# Where a cluster is needed: what would be asked of it.


def stand_in(folder: Path, name: str, body: str = "") -> None:
  """A program that writes its arguments, one call a line, to FOLDER/calls."""
  script = folder / name
  script.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $(printf "%q " "$@")" >>{folder}/calls\n{body}\n')
  script.chmod(0o755)


def with_stand_ins(folder: Path, *command: object, **environment: str) -> tuple[subprocess.CompletedProcess, str]:
  paths = {"PATH": f"{folder}:{os.environ['PATH']}"}
  run_with = os.environ | paths | environment
  done = subprocess.run(["bash", *command], capture_output=True, text=True, env=run_with, timeout=60, check=False)
  calls = folder / "calls"
  return done, calls.read_text() if calls.exists() else ""


POD = LAUNCH / "tpu" / "pod.sh"


def test_a_command_reaches_all_hosts_of_a_pod_word_for_word(tmp_path):
  stand_in(tmp_path, "gcloud", 'bash -c "cd() { :; }; ${!#}"')  # runs it here, as each host would there
  stand_in(tmp_path, "clipflow")
  done, calls = with_stand_ins(
    tmp_path, POD, "run", "clipflow", "train", "--config.name=two words", NAME="pod", ZONE="z", PROJECT="p"
  )
  assert done.returncode == 0, done.stderr
  first, second = calls.splitlines()
  assert first.startswith("gcloud compute tpus tpu-vm ssh pod --zone z --project p --worker=all --command ")
  assert second == r"clipflow train --config.name=two\ words "


def test_a_pod_whose_python_is_too_old_gets_a_newer_one_once(tmp_path):
  stand_in(tmp_path, "gcloud", f'if [[ $4 == ssh ]]; then cd {tmp_path} && bash -c "${{!#}}"; fi')
  for name in ("git", "tar"):
    stand_in(tmp_path, name)
  (tmp_path / "clipflow_venv" / "bin").mkdir(parents=True)  # as of an install that was interrupted
  stand_in(tmp_path, "pip")
  stand_in(tmp_path, "python3", f"if [[ $3 == venv ]]; then mv {tmp_path}/pip {tmp_path}/clipflow_venv/bin; fi")
  done, calls = with_stand_ins(tmp_path, POD, "install")
  assert done.returncode == 0, done.stderr
  here = [line for line in calls.splitlines() if line.startswith(("python3", "pip"))]
  assert here[0] == "python3 -m pip install --quiet --user uv "
  assert here[1].startswith("python3 -m uv venv ") and here[1].endswith(" --python 3.12 clipflow_venv ")
  assert here[2].startswith("pip install ") and "clipflow_jax" in here[2]
  with_stand_ins(tmp_path, POD, "install")
  assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()].count("python3") == 2


@pytest.mark.parametrize(
  ("action", "asked"),
  [
    ("create", "queued-resources create clipflow --zone us-east5-a --node-id clipflow --accelerator-type v6e-256"),
    ("delete", "queued-resources delete clipflow --zone us-east5-a --force"),
  ],
)
def test_a_pod_is_asked_for_and_given_back(tmp_path, action, asked):
  stand_in(tmp_path, "gcloud")
  done, calls = with_stand_ins(tmp_path, POD, action, TYPE="v6e-256", RUNTIME="v2-alpha-tpuv6e")
  assert done.returncode == 0 and f"gcloud compute tpus {asked}" in calls


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"]])
def test_a_pod_that_is_asked_for_nothing_says_how_it_is_used(tmp_path, arguments):
  stand_in(tmp_path, "gcloud")
  done, calls = with_stand_ins(tmp_path, POD, *arguments)
  assert done.returncode == 2 and "usage: pod.sh" in done.stderr and not calls


SBATCH = LAUNCH / "slurm" / "train.sbatch"


def slurm(folder: Path, srun: str, **environment: str) -> tuple[subprocess.CompletedProcess, str]:
  stand_in(folder, "srun", srun)
  for name in ("scancel", "scontrol"):
    stand_in(folder, name)
  (folder / "venv" / "bin").mkdir(parents=True)
  stand_in(folder / "venv" / "bin", "clipflow")
  variables = dict(SLURM_JOB_ID="12", SLURM_SUBMIT_DIR=str(folder), CLIPFLOW_VENV=str(folder / "venv"))
  variables["SLURM_CPUS_PER_TASK"] = "12"
  return with_stand_ins(folder, SBATCH, "--config=configs/joint.py", "--workdir=w", **variables, **environment)


def test_a_job_trains_with_its_arguments_on_all_tasks_and_has_their_code(tmp_path):
  done, calls = slurm(tmp_path, "exit 3")
  assert done.returncode == 3
  (call,) = calls.splitlines()
  assert "srun --kill-on-bad-exit=1 --cpus-per-task=12 " in call
  assert call.endswith(f"{tmp_path}/venv/bin/clipflow train --config=configs/joint.py --workdir=w ")


def test_a_job_whose_time_is_up_stops_its_tasks_and_queues_itself_again(tmp_path):
  done, calls = slurm(tmp_path, "kill -TERM $PPID; sleep 1; exit 0")
  assert done.returncode == 0, done.stderr
  assert calls.splitlines()[1:] == ["scancel --signal=TERM 12.0 ", "scontrol requeue 12 "]


@pytest.mark.parametrize(
  ("restarts", "again"), [({}, 1), ({"SLURM_RESTART_COUNT": "19"}, 1), ({"SLURM_RESTART_COUNT": "20"}, 0)]
)
def test_a_job_whose_step_hung_queues_itself_again_but_not_for_ever(tmp_path, restarts, again):
  done, calls = slurm(tmp_path, f"exit {HUNG}", **restarts)
  assert done.returncode == HUNG
  assert calls.splitlines()[1:] == ["scontrol requeue 12 "] * again


def test_a_job_without_an_environment_says_where_one_is_sought(tmp_path):
  variables = dict(SLURM_JOB_ID="12", SLURM_SUBMIT_DIR=str(tmp_path), CLIPFLOW_VENV="")
  done, _ = with_stand_ins(tmp_path, SBATCH, **variables)
  assert done.returncode == 2 and f"no clipflow in {tmp_path}/.venv" in done.stderr
