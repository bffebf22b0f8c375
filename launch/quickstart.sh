#!/usr/bin/env bash
# From nothing to a picture: installs clipflow_jax, trains every stage on the built-in shapes, draws, reads, evaluates.
#
#   bash launch/quickstart.sh [DIR] [-- arguments of clipflow quickstart]
#
# Everything goes under DIR (default ./quickstart): the virtual environment venv/, checkpoints, samples and the
# report/ to open in a browser. PYTHON=/path/to/python3 chooses the Python.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=/dev/null
source "$ROOT/launch/environment.sh"

directory=quickstart
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
fi
if (($#)) && [[ $1 != -* ]]; then
  directory=$1
  shift
fi
if (($#)); then
  [[ $1 == -- ]] || fail "unexpected argument $1: usage is quickstart.sh [DIR] [-- arguments of clipflow quickstart]"
  shift
fi
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)

say "1 of 2: installs clipflow_jax into $directory/venv, about one minute"
make_environment "$directory/venv"
# The package is built from a copy: the checkout stays clean and may be read-only.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -R "$ROOT"/{setup.py,pyproject.toml,LICENSE,clipflow_jax,configs} "$copy"
install "$directory/venv" "$copy"
rm -rf "$copy"

say "2 of 2: trains, draws and evaluates, about a quarter of an hour on two cores; installation took $SECONDS s"
CLIPFLOW_INSTALL_SECONDS=$SECONDS
CLIPFLOW_COMMIT=$(git -C "$ROOT" describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || true)
export CLIPFLOW_INSTALL_SECONDS CLIPFLOW_COMMIT
exec "$directory/venv/bin/clipflow" quickstart --workdir="$directory" "$@"
