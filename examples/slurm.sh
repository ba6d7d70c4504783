#!/usr/bin/env bash
# A SLURM job that saves and requeues itself before its time limit, until the training is done:
#
#   sbatch --nodes 128 examples/slurm.sh PRESET DATA SAVE [flags of pretrain_mlra.py ...]
#
# Paths are relative to the folder sbatch is called in. Environment: that of examples/launch.sh, and
#   MOST_CRASHES   starts in a row without a new checkpoint, after which the job stays down (3)
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

fail() { echo "error: $*" >&2; exit 2; }
number() { [[ $1 =~ ^[0-9]{1,9}$ ]]; }
[ $# -ge 3 ] || fail "usage: sbatch examples/slurm.sh PRESET DATA SAVE [flags ...]"
preset=$1 data=$2 save=$3
shift 3
id=${SLURM_JOB_ID:-}
number "$id" || fail "this is a SLURM job: sbatch examples/slurm.sh PRESET DATA SAVE [flags ...]"

# One task of an array has the array's own number, by which scontrol means all tasks. SLURM is asked,
# since a job that another job submits has the variables of that one's array.
task="s/^JobId=$id ArrayJobId=\([0-9]*\) ArrayTaskId=\([0-9]*\) .*/\1_\2/p"
self=$(scontrol show job -o "$id" | sed -n "$task")
self=${self:-$id}
# No `head` behind scontrol: it would end by SIGPIPE where it has more to say.
field() { scontrol show job "$self" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p"; }
# SLURM runs a copy of this script from a folder of its own; it knows where the script was.
here=$(scontrol show job "$self" | sed -n 's/^ *Command=//p')
root=${here%%/examples/slurm.sh*}
[ -x "$root/examples/launch.sh" ] || root=${SLURM_SUBMIT_DIR:-.}
[ -x "$root/examples/launch.sh" ] ||
  fail "there is no examples/launch.sh in $root; submit the script by its path: sbatch CHECKOUT/examples/slurm.sh ..."

# One task of a node: launch.sh starts a process for each of its GPUs.
[ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] ||
  fail "--ntasks-per-node is $SLURM_NTASKS_PER_NODE; leave it out, as each node's one task starts a process for each GPU"
[ -z "$(field HetJobId)" ] ||
  fail "job $id is a part of a heterogeneous job, and all nodes of a run are alike; submit without ' : '"

# Crash-loop guard. The file may be anybody's: only digits of it are used.
most_crashes=${MOST_CRASHES:-3}
number "$most_crashes" || fail "MOST_CRASHES is '$most_crashes'; give a number"
mkdir -p "$save" || fail "the folder $save cannot be made"
tracker=$save/latest_checkpointed_iteration.txt
guard=$save/starts_without_progress.txt
# Of a file alone: a pipe that lies there would be waited for, now or once a file was seen.
first_line() { [ -f "$1" ] && timeout 60 head -c 200 -- "$1" | head -n 1; }
step() {
  local found=
  read -r found < <(first_line "$tracker") || true
  if number "$found"; then echo "$found"; else echo none; fi
} 2>/dev/null
crashes=0
{ read -r last crashes < <(first_line "$guard") || true; } 2>/dev/null
last=${last:-new}
number "$crashes" && [ "$last" = "$(step)" ] || crashes=0
if [ "$crashes" -ge "$most_crashes" ]; then
  fail "$crashes starts in a row made no progress beyond step $(step); look at $save, then remove $guard"
fi
# By a new file that is renamed: nothing is written where a link in a shared folder points.
note() {
  local new=
  if ! { new=$(mktemp "$save/.starts.XXXXXX") && chmod +rw "$new" && echo "$*" >"$new" &&
    mv -fT "$new" "$guard"; }; then
    echo "slurm.sh: $guard cannot be written" >&2
    rm -f "$new"
  fi
}
# Where a start was no crash.
uncount() { if [ "$last" = new ]; then rm -f "$guard"; else note "$last" "$crashes"; fi; }
note "$(step)" "$((10#$crashes + 1))"

NODES=${SLURM_JOB_NUM_NODES:-1}
if [ "$NODES" != 1 ]; then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Below 32768, from where on Linux gives ports to outgoing connections.
  export RDZV_ENDPOINT=${hosts%%$'\n'*}:$((20000 + 10#$id % 12000))
fi
export NODES RDZV_ID=$id
# Told from 0, so that a run which was only stopped does not count as done.
export STOPPED_CODE=75

why='' told=no heard=no job=''
# Not SLURM_RESTART_COUNT: a job that another job submits has the other's count.
before=$(field Restarts) limit=$(field TimeLimit)
# srun hands SIGUSR1 on to every process of the step; at SIGTERM it would kill the step.
# Two signals may come at once: the traps are so plain that one may interrupt the other.
trap 'heard=yes; kill -USR1 "$job" 2>/dev/null || true' USR1
trap 'told=yes heard=yes; kill -USR1 "$job" 2>/dev/null || true' TERM

# What follows from a signal is said at once: SLURM may kill this script before the end.
heed() {
  local restarts
  kill -USR1 "$job" 2>/dev/null || true # again, if there was no step yet
  if [ "$told" = no ]; then
    why=limit
    # SLURM warns at once where the whole limit is shorter than the warning. The end of
    # this script ends the step, which may not have begun.
    if [ "$SECONDS" -lt 60 ] && [ "$(field TimeLimit)" = "$limit" ]; then
      uncount
      fail "the time limit of $limit is not longer than the warning ahead of it; give a longer --time, or a later warning, as --signal=B:USR1@60"
    fi
    echo "slurm.sh: the time is nearly up; saving, then requeueing"
    return
  fi
  restarts=$(field Restarts)
  if number "$restarts" && number "$before" && [ "$restarts" -gt "$before" ]; then
    why=requeued
    echo "slurm.sh: SLURM requeues this job; saving first if a step has begun"
  elif [ "$(field Reason)" = TimeLimit ]; then
    # Now and not at the end: a scancel that comes in between must hold.
    why=requeued
    echo "slurm.sh: the time limit is over; requeueing, and saving first if a step has begun"
    scontrol requeue "$self" || why=limit
  else
    why=ended
    echo "slurm.sh: SLURM ends this job (scancel); saving first if a step has begun"
  fi
}

# All of the environment, whatever --export said: a part of it is set above.
export SLURM_KILL_BAD_EXIT=1 # as a variable, which launchers read
srun --export=ALL --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 \
  "$root/examples/launch.sh" "$preset" "$save" --data-path "$data" "$@" &
job=$!
code=0
while true; do
  if [ "$heard" = yes ]; then
    heard=no
    heed
  fi
  # A trapped signal ends `wait`, not the step. 127: its code was taken already.
  now=0
  wait "$job" || now=$?
  [ "$now" -eq 127 ] || code=$now
  [ "$heard" = yes ] || break
done

case $why in
  ended) echo "slurm.sh: ended by SLURM at step $(step); sbatch again to go on"; exit "$code" ;;
  requeued) echo "slurm.sh: stopped at step $(step); SLURM starts this job again"; exit "$code" ;;
esac
if [ "$code" -eq 2 ]; then
  # Not a crash: the count is as it was, a second launch into the folder of a running job included.
  uncount
  fail "the command line or the input was refused; see above. Not requeued: it would end alike"
fi
if [ "$why" = limit ] || [ "$code" -ne 0 ]; then
  echo "slurm.sh: ended with $code at step $(step); requeueing"
  ! scontrol requeue "$self" || exit 0
  echo "slurm.sh: SLURM does not requeue this job (--no-requeue?); sbatch again to go on"
  exit "$code"
fi
rm -f "$guard"
