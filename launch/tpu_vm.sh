#!/usr/bin/env bash
# Trains on a Cloud TPU VM or a pod of them: creates it if need be, installs, starts the same command on each host.
#
#   TPU=my-pod ZONE=us-east5-b HOSTS=16 \
#     ./launch/tpu_vm.sh --config=configs/llava_mini_vicuna_7b.py:stage2 --workdir=/shared/run
#
# Start it again to resume; delete a VM that was preempted first. It needs Python 3.11 or newer on the image.
# DRY_RUN=1 prints what would run, and does nothing.
# TYPE (v5litepod-64, which has 16 hosts) and VERSION (v2-alpha-tpuv5-lite) say what to create; REPOSITORY and BRANCH
# what to clone. Data and workdir lie on a file system that all hosts mount; a bucket through Cloud Storage FUSE.
set -euo pipefail

TPU="${TPU:?set TPU to the name of the TPU}"
ZONE="${ZONE:?set ZONE to its zone}"
HOSTS="${HOSTS:?set HOSTS to the number of its hosts}"
TYPE="${TYPE:-v5litepod-64}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
REPOSITORY="${REPOSITORY:-$(git config --get remote.origin.url || echo .)}"
BRANCH="${BRANCH:-main}"

run() { # the command, or with DRY_RUN a line that says it
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

on_hosts() { # COMMAND: on all at once, each into a log of its own; fails if it fails on one
  local host jobs=() failed=0
  for ((host = 0; host < HOSTS; host++)); do
    if [ -n "${DRY_RUN:-}" ]; then
      echo "host $host: $1"
    else
      gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$host" --command="$1" &>"$TPU-host$host.log" &
      jobs+=($!)
    fi
  done
  for host in "${!jobs[@]}"; do
    wait "${jobs[$host]}" || { echo "error: host $host failed; see $TPU-host$host.log" >&2; failed=1; }
  done
  return "$failed"
}

if [ -n "${DRY_RUN:-}" ] || ! gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" &>/dev/null; then
  run gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
fi
on_hosts "test -d llava_mini || git clone --depth=1 --branch=$(printf '%q %q' "$BRANCH" "$REPOSITORY") llava_mini &&
  cd llava_mini && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
# They find each other through their metadata server, so the line is the same for all.
on_hosts "cd llava_mini && .venv/bin/python launch/train.py$(printf ' %q' "$@")"
