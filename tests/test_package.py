from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import clipflow_jax

ROOT = Path(__file__).parents[1]
PACKAGE = Path(clipflow_jax.__file__).parent

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import clipflow_jax
FORBIDDEN = ("tensorflow", "flax.nnx", "torch", "clu.metric_writers")
names = [module.name for module in pkgutil.walk_packages(clipflow_jax.__path__, "clipflow_jax.")]
for name in names:
  if not name.endswith("__main__"):
    importlib.import_module(name)
assert len(names) > 20, names
print(" ".join(name for name in FORBIDDEN if name in sys.modules))
"""


def test_importing_everything_loads_neither_tensorflow_nor_nnx_nor_torch():
  command = [sys.executable, "-c", IMPORT_EVERYTHING]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == ""


def test_every_folder_with_code_is_a_package():
  folders = {path.parent for path in PACKAGE.rglob("*.py")}
  assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_floors_hold():
  lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
  if lint is None:
    pytest.skip("import-linter is not installed: pip install '.[test]'")
  result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
  """What setup.py tells setuptools."""
  import setuptools

  arguments: dict = {}
  original, setuptools.setup = setuptools.setup, arguments.update
  try:
    exec((ROOT / "setup.py").read_text(), {"__file__": str(ROOT / "setup.py")})
  finally:
    setuptools.setup = original
  return arguments


def test_the_extras_are_there(setup_arguments):
  extras = {
    "test",
    "finetune",
    "notebooks",
    "demo",
    "tpu",
    "gpu",
    "plan",
    "parquet",
    "tfds",
    "prepare",
    "parity",
    "serve",
    "harness",
  }
  assert setup_arguments["extras_require"].keys() == extras
  assert setup_arguments["extras_require"]["parity"][0] == "torch==2.13.0"


def test_every_dependency_has_a_lower_and_an_upper_bound(setup_arguments):
  for requirement in setup_arguments["install_requires"]:
    assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", requirement), requirement


def test_the_lock_pins_every_dependency_within_its_bounds_and_names_no_local_path(setup_arguments):
  from packaging.requirements import Requirement
  from packaging.utils import canonicalize_name

  lines = (ROOT / "requirements.txt").read_text().splitlines()
  locked = [Requirement(line) for line in lines if not line.startswith("#")]
  assert all(re.fullmatch(r"==[\w.]+", str(requirement.specifier)) for requirement in locked)
  assert not [requirement for requirement in locked if requirement.url]
  versions = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in locked}
  for text in setup_arguments["install_requires"]:
    requirement = Requirement(text)
    assert versions[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_configs_are_installed_beside_the_package(setup_arguments):
  assert {"clipflow_jax", "clipflow_jax.data", "configs"} <= set(setup_arguments["packages"])
  assert PACKAGE.parent / "configs" == ROOT / "configs"
