#!/usr/bin/env bash
#SBATCH --job-name=llava-mini
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Trains on GPUs under SLURM, a process per GPU, which JAX finds by itself.
#
#   sbatch launch/slurm.sh --config=configs/llava_mini_vicuna_7b.py:stage2 --workdir=/shared/run
#   sbatch --nodes=4 launch/slurm.sh ...   # sbatch's own flags go first and overrule those above
#
# --requeue starts the job again after a preemption: the run resumes. Five minutes before its time is up it gets SIGTERM,
# saves, ends with status 75 and is put back into the queue. DRY_RUN=1 bash launch/slurm.sh ... prints the
# command of every task and does nothing. Run it from the repository, installed with `pip install -e '.[cuda]'` in
# .venv; data and workdir lie on a file system that all nodes share.
set -euo pipefail

# A process sees all GPUs of its node and takes the one of its number; do not add --gpus-per-task, which hides the others.
train=(.venv/bin/python launch/train.py "$@")

if [ -n "${DRY_RUN:-}" ]; then
  nodes="${SLURM_JOB_NUM_NODES:-2}" per_node="${SLURM_NTASKS_PER_NODE:-8}"
  for ((task = 0; task < nodes * per_node; task++)); do
    printf 'node %d task %d:' "$((task / per_node))" "$task"
    printf ' %q' "${train[@]}" && echo
  done
else
  cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
  # One task that fails ends the others, which would wait for it.
  status=0
  srun --kill-on-bad-exit=1 "${train[@]}" || status=$?
  if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi # told to end, and saved
  exit "$status"
fi
