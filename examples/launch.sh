#!/usr/bin/env bash
# Start one node's processes of a run, for any preset and number of nodes. Resumes from SAVE.
#
# Usage: examples/launch.sh PRESET SAVE [flags of pretrain_mlra.py ...]
#   PRESET   a name that `mlra presets` lists (mlra4_70b) or a path
#   SAVE     the run's folder, seen by all nodes: checkpoints are read from and written to it
# Paths are relative to the folder this is called from.
# Environment:
#   PYTHON          the Python that has torch (.venv/bin/python of this checkout, else python)
#   NODES           how many nodes (1)
#   GPUS_PER_NODE   processes on this node (what SLURM gives the job, else the GPUs that there are,
#                   or 1 process on a CPU)
#   RDZV_ENDPOINT   host:port of the first node, where all meet
#   RDZV_ID         one name for all nodes of a job (the name of SAVE)
#   NODE_RANK       this node's number, by which ranks are ordered (SLURM's, else by addresses)
#   LOCAL_ADDR      this node's address for the others, where its own name does not say
#   MAX_RESTARTS    restarts of a node's processes before the node gives up (3)
#   JOIN_TIMEOUT    seconds within which all nodes must join (900)
#   STOPPED_CODE    exit code after a signal that stopped the run in order (0)
# Exit code: 0 done, 2 refused (a command line or an input; nothing was restarted), 130 ended at once
#   by a second Ctrl-C, 1 failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

nodes=${NODES:-1}
fail() {
  local where=
  [ "$nodes" = 1 ] || where="host $(hostname): "
  echo "error: $where$*" >&2
  # The other hosts wait for this one. Any Python will do to tell them.
  local teller
  [ "$nodes" = 1 ] || [ -z "${RDZV_ENDPOINT:-}" ] ||
    for teller in "${PYTHON:-$root/.venv/bin/python}" python3 python; do
      ! "$teller" "$root/megatron_mlra/launch/call.py" "$RDZV_ENDPOINT" "$nodes" \
        "${RDZV_ID:-$(basename "${save:-}")}" "$*" 2>/dev/null || break
    done
  exit 2
}
# Text is compared as text: within (( )) and [[ -ge ]] bash would run code that stands in it.
number() { [[ $2 =~ ^[0-9]{1,6}$ ]] || fail "$1 is '$2'; $3"; }
[ $# -ge 2 ] || fail "usage: examples/launch.sh PRESET SAVE [flags of pretrain_mlra.py ...]"
preset=$1 save=$2
shift 2
# A file that is called as one of the package's presets is this file by its path alone.
if [ -f "$preset" ] && [[ $preset != /* ]]; then preset=./$preset; fi
[ -f "$preset" ] || preset=$root/megatron_mlra/presets/$preset.yaml
[ -f "$preset" ] || fail "there is no preset ${preset#"$root/"}; see megatron_mlra/presets"

python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
command -v "$python" >/dev/null ||
  fail "there is no $python; set PYTHON to the Python of the environment that has torch"
# An older one ends in the package's first lines, as a crash that is started again.
old='import sys; v = sys.version_info; print("%d.%d" % v[:2] if v < (3, 12) else "")'
old=$("$python" -S -c "$old" 2>/dev/null || true)
[[ ! $old =~ ^[0-9]+\.[0-9]+$ ]] ||
  fail "$python is Python $old; set PYTHON to the Python, 3.12 or newer, of the environment that has torch"
number NODES "$nodes" "give one number; a number of nodes that changes is not supported"
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | grep -c . || true)}}
number GPUS_PER_NODE "$gpus" "give the number of processes on this node"
[ "$gpus" -ge 1 ] || gpus=1
number MAX_RESTARTS "${MAX_RESTARTS:-3}" "give a number of restarts"
number JOIN_TIMEOUT "${JOIN_TIMEOUT:-900}" "give seconds"
node=${NODE_RANK:-${SLURM_NODEID:-0}}
number NODE_RANK "$node" "give this node's number, from 0"
number STOPPED_CODE "${STOPPED_CODE:-0}" "give an exit code"

# A rank that hangs is named after --hang-timeout-seconds. Should that fail, a collective ends the job
# after --distributed-timeout-minutes, and the flight recorder says which ranks were missing.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}
unset TORCH_NCCL_TRACE_BUFFER_SIZE # its former name, of which torch warns
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Megatron's overlap of tensor-parallel traffic relies on kernels being queued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Set where a node's network has other names: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME
# (rendezvous), NCCL_IB_HCA (data).

# torchrun's own variables, as operators of Kubernetes set them for its flags: all is said here.
# shellcheck disable=SC2086
unset ${!PET_@}
if [ "$nodes" -eq 1 ]; then
  where=(--standalone --nproc-per-node "$gpus")
else
  [ -n "${RDZV_ENDPOINT:-}" ] || fail "NODES is $nodes; set RDZV_ENDPOINT to host:port of the first"
  where=(--nnodes "$nodes" --node-rank "$node" --nproc-per-node "$gpus" --rdzv-backend c10d
    --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-$(basename "$save")}"
    --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-900}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"})
fi

# SIGTERM and SIGUSR1 stop the run in order, in every phase (docs/scale.md).
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m megatron_mlra.launch "${where[@]}" --max-restarts "${MAX_RESTARTS:-3}" \
  "$root/pretrain_mlra.py" --config "$preset" --save "$save" --load "$save" "$@"
