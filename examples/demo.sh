#!/usr/bin/env bash
# Train a small MLRA-4 on real English and code, save, resume, and show that nothing was lost.
# Usage: examples/demo.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
run=runs/demo
steps=320
resume_at=310
mlra=("$python" -m megatron_mlra.command_line)
train=(pretrain --config debug --data-path "$run/corpus"
       --split "94,5,1" --train-iters "$steps" --eval-interval 1000000)
# A run that Ctrl-C stops in order has ended well; the demo has not.
trap 'echo "the demo begins anew when it is started again" >&2; exit 130' INT
# On a busy machine threads that wait actively slow each other down many times over.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# The demo deletes what it made before. So it works only in a folder that it made itself.
if [ ! -e "$run" ] && [ ! -L "$run" ]; then
  mkdir -p "$run"
  : >"$run/.made-by-the-demo"
elif [ -L "$run" ] || [ ! -f "$run/.made-by-the-demo" ]; then
  echo "error: $run is there and was not made by this demo, which deletes folders in it; move it" >&2
  exit 2
fi
echo "== 1. a corpus that every Python carries: the standard library's sources and help texts"
if [ ! -f "$run/corpus.idx" ]; then
  "${mlra[@]}" demo-corpus "$run/corpus.jsonl" --overwrite
  "${mlra[@]}" preprocess --input "$run/corpus.jsonl" --output-prefix "$run/corpus" \
    --tokenizer byte --overwrite
fi

echo "== 2. pretraining, byte by byte"
rm -rf -- "${run:?}/checkpoint" "${run:?}/resumed"
"${mlra[@]}" "${train[@]}" --save "$run/checkpoint" --save-interval "$resume_at" \
  --eval-at-start --eval-iters 16 |
  tee -i "$run/train.txt"

echo "== 3. the same, resumed from the checkpoint of step $resume_at"
"${mlra[@]}" "${train[@]}" --load "$run/checkpoint" --ckpt-step "$resume_at" \
  --eval-iters 0 --tensorboard-dir "$run/resumed" | tee -i "$run/resume.txt"

last() { grep "^step $steps/" "$1" | grep -o "lm loss [0-9.]*"; }
if [ "$(last "$run/train.txt")" != "$(last "$run/resume.txt")" ]; then
  echo "error: resumed at $(last "$run/resume.txt"), uninterrupted $(last "$run/train.txt")" >&2
  exit 1
fi
loss() { grep "^$1 at" "$run/train.txt" | "$2" -n 1 | grep -o "lm loss [0-9.]*"; }
echo "== 4. what it has learned: the model continues three beginnings"
"${mlra[@]}" generate "$run/checkpoint" --prompt "def __init__(self" --prompt "Return the " \
  --prompt "import sys" --max-new-tokens 100 --temperature 0.5 --top-p 0.9 --seed 1

echo "== validation loss, nats per byte: $(loss validation head) before, $(loss validation tail) after"
echo "   (of 128 samples from the 5 % of the corpus that follow what it trained on)"
echo "== test loss: $(loss test tail) (of the last 1 %, which is other text: another number)"
echo "== step $steps: $(last "$run/train.txt") both ways, uninterrupted and resumed"
cat <<EOF
== what to try next, after \`source $(dirname "$python")/activate\`
  tensorboard --logdir $run             the curves
  mlra generate $run/checkpoint --prompt "class " --temperature 0.7 --top-p 0.9 --seed 1
                                        more of its writing (without a temperature
                                        so small a model repeats itself)
  mlra presets                          the paper's models, and larger ones
  mlra ${train[*]} \\
    --num-latent-heads 1 --num-branches 1                       the same model with MLA
  torchrun --nproc-per-node 2 --no-python mlra ${train[*]} \\
    --tensor-model-parallel-size 2 --sequence-parallel          the same on two processes
EOF
