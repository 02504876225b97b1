#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk; pip install xpk).
#
#   CLUSTER=my-cluster ZONE=us-east5-b IMAGE=gcr.io/project/llava-mini \
#     ./launch/gke_xpk.sh --config=configs/llava_mini_vicuna_7b.py:stage2 --workdir=/shared/run
#
# DRY_RUN=1 prints what would run, and the command of every host, and does nothing.
# NAME (llava-mini), TYPE (v5litepod-64), HOSTS_PER_SLICE (16, for the printed list alone) and SLICES (1). With several
# slices `data` goes over the network between them: --config.train.slices and the mesh are set for that.
# IMAGE holds this repository in its working directory, installed with `pip install -e '.[tpu]'`. Data and workdir lie on
# a file system that all hosts mount; a bucket through Cloud Storage FUSE. --config comes first.
set -euo pipefail

CLUSTER="${CLUSTER:?set CLUSTER to the name of the GKE cluster}"
ZONE="${ZONE:?set ZONE to its zone}"
IMAGE="${IMAGE:?set IMAGE to a container image with this repository}"
NAME="${NAME:-llava-mini}"
TYPE="${TYPE:-v5litepod-64}"
SLICES="${SLICES:-1}"
HOSTS_PER_SLICE="${HOSTS_PER_SLICE:-16}"

# GKE tells every host its number and its neighbours (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, MEGASCALE_*).
words=("$@")
if [ "$SLICES" -gt 1 ]; then # before the others, of which the last counts
  words=("$1" "--config.train.slices=$SLICES" "--config.train.mesh=($SLICES,-1,1)" "${@:2}")
fi
train="python launch/train.py$(printf ' %q' "${words[@]}")"
submit=(xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --workload="$NAME" --tpu-type="$TYPE"
  --num-slices="$SLICES" --docker-image="$IMAGE" --command="$train")

if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${submit[@]}" && echo
  for ((slice = 0; slice < SLICES; slice++)); do
    for ((host = 0; host < HOSTS_PER_SLICE; host++)); do
      echo "slice $slice host $host: $train"
    done
  done
else
  exec "${submit[@]}"
fi
