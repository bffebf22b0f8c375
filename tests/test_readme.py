"""Every command of the README is one that exists, with options and configs that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from clipflow_jax import cli, commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
  line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]


def test_there_are_commands():
  assert any(line.startswith("bash launch/quickstart.sh") for line in LINES)
  assert any(line.startswith("bash launch/test.sh") for line in LINES)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("clipflow ")])
def test_a_command_parses_and_its_config_loads(line):
  options, rest = cli._parser().parse_known_args(shlex.split(line)[1:])
  assert options.command
  if "from=" in (getattr(options, "config", None) or ""):
    return  # a workdir that is made by an earlier line: tests/training/test_finetune.py
  if getattr(options, "config", None):
    commands.load_config(options.config, rest)
  else:
    assert not rest


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("bash ")])
def test_a_script_is_there_and_is_valid_bash(line):
  script = ROOT / shlex.split(line)[1]
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_its_pictures_are_there():
  pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
  assert pictures and all((ROOT / picture).is_file() for picture in pictures)
