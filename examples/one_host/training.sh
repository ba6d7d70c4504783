#!/usr/bin/env bash
# Training speed on two, four or eight GPUs of this host in each way to cut a model over them: tensor
# parallel in both layouts, context, pipeline and data parallel, for MLRA-4 and MLA, on random data.
#
# Usage: examples/one_host/training.sh OUT [flags of mlra pretrain ...]
#   OUT      folder for a log each (OUT/PRESET-LAYOUT.txt) and a line each in OUT/summary.txt
# Environment:
#   PYTHON   the Python that has torch (.venv/bin/python of this checkout, else python)
#   GPUS     how many (all); 2, or a multiple of 4
#   PRESETS  names that `mlra presets` lists, or paths (mlra4_2.9b mla_2.9b)
# Exit code: 0 done, 2 refused, 1 if a run failed; the others are run all the same.
set -euo pipefail
[ $# -ge 1 ] || { echo "error: usage: examples/one_host/training.sh OUT [flags]" >&2; exit 2; }
out=$1
shift
# shellcheck source=examples/one_host/host.sh
. "$(dirname "${BASH_SOURCE[0]}")/host.sh"
[ "$gpus" = 2 ] || [ $((gpus % 4)) = 0 ] || {
  echo "error: GPUS is $gpus; use 2 or a multiple of 4" >&2
  exit 2
}

read -ra presets <<<"${PRESETS:-mlra4_2.9b mla_2.9b}"
tp=--tensor-model-parallel-size cp=--context-parallel-size pp=--pipeline-model-parallel-size
# With more than four GPUs, the remaining factor is data parallel.
size=4 stages=pp2-tp2 staged="$pp 2 $tp 2 --sequence-parallel"
if [ "$gpus" = 2 ]; then size=2 stages=pp2 staged="$pp 2"; fi
declare -A layouts=(
  [tp$size-head]="$tp $size --sequence-parallel --latent-tp-layout head"
  [tp$size-latent]="$tp $size --sequence-parallel --latent-tp-layout latent"
  [cp$size]="$cp $size"
  [$stages]="$staged"
  [dp]=""
)
run=(--mock-data --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1
     --global-batch-size 32 --train-iters 30 --lr-warmup-iters 5 --eval-iters 0 --log-interval 10
     --use-distributed-optimizer)
mkdir -p "$out"
: >"$out/summary.txt"
failed=0
for preset in "${presets[@]}"; do
  for layout in tp$size-head tp$size-latent cp$size $stages dp; do
    # MLA has one latent: there is no other layout of it.
    if [[ $layout = tp*-latent && $(basename "$preset") = mla_* ]]; then continue; fi
    name=$(basename "$preset" .yaml)-$layout
    read -ra cut <<<"${layouts[$layout]}"
    echo "== $name"
    if start pretrain --config "$preset" "${run[@]}" "${cut[@]}" "$@" >"$out/$name.txt" 2>&1; then
      said=$(grep -E "tokens/s" "$out/$name.txt" | tail -1 || true)
    else
      failed=1 said="failed; see $out/$name.txt"
    fi
    echo "$name: $said" | tee -a "$out/summary.txt"
  done
done
exit "$failed"
