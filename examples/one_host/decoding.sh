#!/usr/bin/env bash
# Decoding on all GPUs of this host, collectives included: MLRA-4, MLA with its whole cache on every
# GPU, GLA-4 and GQA, and each with the tokens of its cache cut over the GPUs instead.
#
# Usage: examples/one_host/decoding.sh OUT [flags of mlra benchmark-decoding ...]
#   OUT      folder for decoding.json and decoding.png
# Environment:
#   PYTHON   the Python that has torch (.venv/bin/python of this checkout, else python)
#   GPUS     how many (all)
#   PRESETS  names that `mlra presets` lists, or paths (the paper's 2.9B)
#   REHEARSE 1: the same at tiny sizes by GPUS processes on CPUs (default: 4), nothing is timed
# Exit code: 0 done, 2 refused, 1 failed or a case's results were wrong.
set -euo pipefail
[ $# -ge 1 ] || { echo "error: usage: examples/one_host/decoding.sh OUT [flags]" >&2; exit 2; }
out=$1
shift
# shellcheck source=examples/one_host/host.sh
. "$(dirname "${BASH_SOURCE[0]}")/host.sh"

read -ra presets <<<"${PRESETS:-mlra4_2.9b mla_2.9b gla4_2.9b gqa_2.9b}"
cuts=(1 "$gpus")
# Four latent heads are cut over four GPUs; with eight GPUs, the remaining factor 2 cuts tokens.
if [ "$gpus" -gt 4 ] && [ $((gpus % 4)) = 0 ]; then cuts=(1 $((gpus / 4)) "$gpus"); fi
sizes=(--contexts 8192 32768 131072 524288 1048576 --batches 1 8 32 128)
if [ "$rehearse" = 1 ]; then sizes=(--rehearse --contexts 96 256 --batches 1 3); fi
mkdir -p "$out"
start benchmark-decoding --configs "${presets[@]}" --context-parallel "${cuts[@]}" "${sizes[@]}" \
  --json "$out/decoding.json" --png "$out/decoding.png" "$@"
