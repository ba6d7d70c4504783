#!/usr/bin/env bash
# A SLURM job that saves and requeues itself before its time limit, until the training is done:
#
#   sbatch --nodes 128 examples/slurm.sh PRESET DATA SAVE [flags of pretrain_mlra.py ...]
#
#SBATCH --job-name=mlra
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Ten minutes before the limit, to this script alone: time for a step and a checkpoint.
#SBATCH --signal=B:USR1@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 3 ] || fail "usage: sbatch examples/slurm.sh PRESET DATA SAVE [flags ...]"
preset=$1 data=$2 save=$3
shift 3

# Crash-loop guard: this many starts in a row without a new checkpoint, and the job stays down.
most_crashes=${MOST_CRASHES:-3}
mkdir -p "$save"
tracker=$save/latest_checkpointed_iteration.txt
guard=$save/starts_without_progress.txt
step() { cat "$tracker" 2>/dev/null || echo none; }
read -r last crashes < <(cat "$guard" 2>/dev/null || echo "new 0") || true
[ "$last" = "$(step)" ] || crashes=0
if [ "$crashes" -ge "$most_crashes" ]; then
  fail "$crashes starts in a row made no progress beyond step $(step); look at $save, then remove $guard"
fi
echo "$(step) $((crashes + 1))" >"$guard.partial" && mv "$guard.partial" "$guard"

NODES=${SLURM_JOB_NUM_NODES:-1}
if [ "$NODES" -gt 1 ]; then
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export RDZV_ENDPOINT=$first:$((20000 + SLURM_JOB_ID % 20000))
fi
export NODES GPUS_PER_NODE=${GPUS_PER_NODE:-8} RDZV_ID=${SLURM_JOB_ID:-mlra}

requeue=no
on_limit() {
  requeue=yes
  echo "time is nearly up: saving, then requeueing"
  kill -TERM "$job" # srun hands it to launch.sh on every node
}
trap on_limit USR1
trap 'kill -TERM "$job"' TERM

srun --kill-on-bad-exit=1 examples/launch.sh "$preset" "$save" --data-path "$data" "$@" &
job=$!
code=0
wait "$job" || code=$?
# A trapped signal ends `wait`, not the job.
while kill -0 "$job" 2>/dev/null; do
  code=0
  wait "$job" || code=$?
done

if [ "$requeue" = yes ] || [ "$code" -ne 0 ]; then
  echo "ended with $code at step $(step); requeueing"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
rm -f "$guard"
