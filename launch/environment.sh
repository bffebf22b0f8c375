#!/usr/bin/env bash
# Functions of the launch scripts: find a Python, make a virtual environment, install into it. Sourced, not run.

# On a CPU every step allocates its buffers anew: with huge pages the kernel clears them in far fewer pieces.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

say() { printf '[%s] %s\n' "$(basename "$0")" "$*"; }

fail() {
  printf '[%s] %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Prints the first Python >= 3.11 that can make virtual environments; $PYTHON names another one to try first.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python >= 3.11 with venv and ensurepip found: install it (Debian, Ubuntu: apt install python3-venv)" \
    "or name one, PYTHON=/path/to/python3"
}

# make_environment DIR: a virtual environment at DIR, unless one is there.
make_environment() {
  local python
  if [[ ! -x $1/bin/pip ]]; then # an interrupted one has none
    python=$(find_python)
    say "makes the virtual environment $1 with $python"
    "$python" -m venv "$1"
    # The one that Python brings needs twice the time.
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=26"
  fi
}

# install DIR ARGUMENT...: pip install of ARGUMENT... into the environment DIR, with the versions of the lock.
# Modules are compiled when they are first imported: to compile all takes as long as the rest, and most never are.
install() {
  local environment=$1
  shift
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint "$ROOT/requirements.txt" "$@"
}
