#!/usr/bin/env bash
# N processes of one run on this machine, as a pod has one on each host: on its CPU, or with one GPU for each process.
#
#   bash launch/local_processes.sh N COMMAND...
#   bash launch/local_processes.sh 2 clipflow train --config=configs/contrastive.py --workdir=runs/clip
#
# Every line of output begins with the number of its process. When one of them fails, the others get GRACE seconds to
# say what they know of it and are then killed; the script names the first and ends with its code. SIGTERM and Ctrl-C go
# to all of them as SIGTERM: they save a checkpoint at the same step and end.
#
# GRACE=10                  seconds that the others have
# CLIPFLOW_COORDINATOR=...  the address at which they meet (default 127.0.0.1 and a free port)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$ROOT/launch/environment.sh"

[[ ${1:-} =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || fail "usage: local_processes.sh N COMMAND... (N processes, at least 1)"
count=$1
shift

free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)) && (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

# shellcheck disable=SC2329 # it is a trap's
stop() {
  say "passes SIGTERM on to all"
  kill -TERM "${pids[@]}" 2>/dev/null || true
}

export CLIPFLOW_COORDINATOR=${CLIPFLOW_COORDINATOR:-127.0.0.1:$(free_port)} CLIPFLOW_PROCESSES=$count
pids=()
for ((i = 0; i < count; i++)); do
  # Ctrl-C, and a signal to the whole group, reach also those that pass on what a process says: they ignore both, to be
  # there until it has ended.
  trap '' TERM INT
  exec {out}> >(sed -u "s/^/[$i] /") {err}> >(sed -u "s/^/[$i] /" >&2)
  trap stop TERM INT
  # JAX_LOCAL_DEVICE_IDS: which GPU is this process's; of no meaning on a CPU.
  CLIPFLOW_PROCESS=$i JAX_LOCAL_DEVICE_IDS=$i "$@" >&"$out" 2>&"$err" {out}>&- {err}>&- &
  pids+=($!)
  exec {out}>&- {err}>&-
done

code=0
deadline=
running=("${!pids[@]}")
while ((${#running[@]})); do
  still=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then
      still+=("$i")
      continue
    fi
    ended=0
    { wait "${pids[i]}" || ended=$?; } 2>/dev/null # bash would tell of a kill in its own words
    if ((ended && !code)); then
      code=$ended
      deadline=$((SECONDS + ${GRACE:-10}))
      how="ended with code $ended"
      ((ended > 128)) && how="was killed by signal $((ended - 128))"
      say "process $i of $count (pid ${pids[i]}) $how: ends the others" >&2
    fi
  done
  running=("${still[@]}")
  if [[ $deadline ]] && ((SECONDS >= deadline)); then
    for i in "${running[@]}"; do
      say "kills process $i of $count (pid ${pids[i]}), which has not ended" >&2
      kill -KILL "${pids[i]}" 2>/dev/null || true
    done
    deadline=
  fi
  { sleep 0.2 || true; } 2>/dev/null # a signal to the group ends it, of which bash would tell
done
exit "$code"
