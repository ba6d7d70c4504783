# shellcheck shell=bash
# What the scripts of this folder share: sets gpus, rehearse and `start`.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
command -v "$python" >/dev/null || {
  echo "error: there is no $python; set PYTHON to the Python of the environment that has torch" >&2
  exit 2
}
rehearse=${REHEARSE:-0}
# A host without GPUs rehearses on four processes.
gpus=${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | grep -c . || true)}
if [ "$rehearse" = 1 ] && [ "${gpus:-0}" = 0 ]; then gpus=4; fi
if ! [[ $gpus =~ ^[1-9][0-9]{0,2}$ ]] || [ "$gpus" = 1 ]; then
  echo "error: GPUS is '$gpus'; these scripts need at least 2 GPUs of one host, or REHEARSE=1" >&2
  exit 2
fi

# Run a command of `mlra` on every GPU.
start() {
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
    -m megatron_mlra.command_line "$@"
}
