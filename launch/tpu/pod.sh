#!/usr/bin/env bash
# A run on a Cloud TPU VM pod with gcloud: makes the pod, installs clipflow_jax on every host, starts the run on all.
#
#   bash launch/tpu/pod.sh create            a queued resource with the pod
#   bash launch/tpu/pod.sh install           this checkout and its packages, on every host
#   bash launch/tpu/pod.sh run COMMAND...    COMMAND on every host; output of each, until all have ended
#   bash launch/tpu/pod.sh delete            the pod, and what it costs
#
# NAME=clipflow  ZONE=us-east5-a  TYPE=v5p-64  RUNTIME=v2-alpha-tpuv5  PROJECT=...
# BUCKET=gs://... is mounted at /mnt/bucket by `install`: all hosts must see one workdir, as in
#   bash launch/tpu/pod.sh run clipflow train --config=configs/joint.py:model=8b,hardware=v5p-64 \
#     --workdir=/mnt/bucket/runs/joint --config.init_from=/mnt/bucket/runs/decoder
# where hardware is TYPE, or the topology of one that configs/hardware.py does not name.
#
# RUNTIME by TYPE: v4 tpu-ubuntu2204-base, v5e v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5, v6e v2-alpha-tpuv6e.
# The processes find each other through the VMs' metadata. A preempted or maintained host gets SIGTERM: all save at the
# same step, and the same command goes on.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/environment.sh
source "$ROOT/launch/environment.sh"

NAME=${NAME:-clipflow}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-64}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
BUCKET=${BUCKET:-}
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command "$1"; }

action=${1:-}
shift || true
case $action in
  create)
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id "$NAME" \
      --accelerator-type "$TYPE" --runtime-version "$RUNTIME"
    say "queued; wait until its state is ACTIVE: gcloud compute tpus queued-resources describe $NAME ${where[*]}"
    ;;
  install)
    # Only what git tracks: no environment and no runs travel.
    archive=$(mktemp -d)/clipflow_jax.tar.gz
    git -C "$ROOT" archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:clipflow_jax.tar.gz" "${where[@]}" --worker=all
    rm -r "$(dirname "$archive")"
    # The images' Ubuntu 22.04 has Python 3.10, and clipflow_jax wants 3.11: uv brings a newer one.
    on_all "set -eu
      mkdir -p clipflow_jax && tar -xzf clipflow_jax.tar.gz -C clipflow_jax
      if [ ! -x clipflow_venv/bin/pip ]; then
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --clear --seed --python 3.12 clipflow_venv
      fi
      clipflow_venv/bin/pip install --quiet --constraint clipflow_jax/requirements.txt './clipflow_jax[tpu]'"
    if [[ $BUCKET ]]; then
      on_all "set -eu
        sudo mkdir -p /mnt/bucket && sudo chown \"\$USER\" /mnt/bucket
        mountpoint --quiet /mnt/bucket || gcsfuse --implicit-dirs --rename-dir-limit=100000 '${BUCKET#gs://}' /mnt/bucket"
    fi
    ;;
  run)
    (($#)) || fail "run what? usage: pod.sh run COMMAND..."
    printf -v command '%q ' "$@"
    on_all "cd clipflow_jax && PATH=\"\$HOME/clipflow_venv/bin:\$PATH\" $command"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
    ;;
  *) fail "usage: pod.sh create | install | run COMMAND... | delete" ;;
esac
