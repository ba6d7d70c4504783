#!/usr/bin/env bash
# Start one node's processes of a run, any preset, any number of nodes; resumes from --save.
#
# Usage: examples/launch.sh PRESET SAVE [flags of pretrain_mlra.py ...]
#   PRESET   a name in examples/configs (mlra4_70b) or a path
#   SAVE     the run's folder, seen by all nodes: checkpoints are read from and written to it
# Environment: PYTHON, NODES (1), GPUS_PER_NODE (those there are, or 1 process on a CPU),
#   RDZV_ENDPOINT host:port of the first node, RDZV_ID one name for all nodes of a job,
#   MAX_RESTARTS (3) of a node's processes before the node gives up.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 2; }
[ $# -ge 2 ] || fail "usage: examples/launch.sh PRESET SAVE [flags of pretrain_mlra.py ...]"
preset=$1 save=$2
shift 2
[ -f "$preset" ] || preset=examples/configs/$preset.yaml
[ -f "$preset" ] || fail "there is no preset $preset; see examples/configs"

python=${PYTHON:-python}
nodes=${NODES:-1}
gpus=${GPUS_PER_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | grep -c . || true)}
[ "$gpus" -ge 1 ] || gpus=1

# A rank that hangs is named after --hang-timeout-seconds. Should that fail, a collective ends the job
# after --distributed-timeout-minutes, and the flight recorder says which ranks were missing.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Megatron's overlap of tensor-parallel traffic relies on kernels being queued in order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Restarted ranks must not read the addresses of those that are gone (docs/fault_tolerance.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# Set where a node's network has other names: NCCL_SOCKET_IFNAME (rendezvous), NCCL_IB_HCA (data).

if [ "$nodes" -eq 1 ]; then
  where=(--standalone --nproc-per-node "$gpus")
else
  [ -n "${RDZV_ENDPOINT:-}" ] || fail "NODES is $nodes; set RDZV_ENDPOINT to host:port of the first"
  where=(--nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d
    --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-$(basename "$save")}"
    --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-900}")
fi

# torchrun answers SIGTERM by killing its ranks after 30 seconds, which is less than a checkpoint
# takes. So SIGTERM and SIGUSR1 go to the ranks themselves: each saves at the end of its step and
# exits with 0, and torchrun ends with them. One node's signal stops all.
# shellcheck disable=SC2329
to_ranks() {
  local ranks
  read -ra ranks <"/proc/$run/task/$run/children" || true
  [ "${#ranks[@]}" -eq 0 ] || kill -TERM "${ranks[@]}"
}
"$python" -m torch.distributed.run "${where[@]}" --max-restarts "${MAX_RESTARTS:-3}" \
  pretrain_mlra.py --config "$preset" --save "$save" --load "$save" "$@" &
run=$!
trap to_ranks TERM USR1
trap 'kill -INT "$run"' INT
# A trapped signal ends `wait`, not the run.
code=0
while kill -0 "$run" 2>/dev/null; do
  code=0
  wait "$run" || code=$?
done
exit "$code"
