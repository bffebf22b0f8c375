#!/usr/bin/env bash
# Installs clipflow_jax with its test tools and runs every check: format, lint, types, floors, tests.
#
#   bash launch/test.sh [pytest arguments]
#
# CLIPFLOW_VENV=DIR     the virtual environment to use or make (default .venv; "$VIRTUAL_ENV" for the active one)
# CLIPFLOW_EXTRAS=a,b   the extras to install (default test; test,parity adds the comparisons with PyTorch)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=/dev/null
source "$ROOT/launch/environment.sh"
venv=${CLIPFLOW_VENV:-$ROOT/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
cd "$ROOT"

say "installs into $venv, then checks and tests; about two minutes to install, up to fifteen for the rest on two cores"
make_environment "$venv"
install "$venv" --editable ".[${CLIPFLOW_EXTRAS:-test}]"
say "installed after $SECONDS s"

export PATH="$venv/bin:$PATH" JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
say "ruff: format and lint"
ruff format --check .
ruff check .
say "mypy: types"
mypy
say "import-linter: floors"
lint-imports
say "pytest, after $SECONDS s"
# A file at a time for each core: its fixtures are made once. More than four would want more memory than most have.
# Not exec: a summary of where the time went stands above pytest's closing line.
pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --durations=10 "$@"
