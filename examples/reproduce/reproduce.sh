#!/usr/bin/env bash
# From text to figures: corpus, tokens, tasks, the runs of the ladder and beyond the loss, tables, plots, results page.
# Usage: examples/reproduce/reproduce.sh PYTHON FOLDER [--rehearsal] [FLAGS of run_ladder.py, such as --minutes 60]
#   FOLDER gets the books, packages, text, tokens and checkpoints (about 12 GB); results go to docs/results/evidence.
#   --rehearsal: the whole chain with miniature sources and two tiny models, on a CPU, all of it in FOLDER.
# A second run continues the first: finished files are kept.
set -euo pipefail
python=${1:?usage: reproduce.sh PYTHON FOLDER [--rehearsal] [FLAGS]} folder=${2:?name a folder}
shift 2
here=$(cd "$(dirname "$0")" && pwd)
ladder=$here/ladder.yaml results=$here/../../docs/results/evidence docs=$here/../../docs vocabulary=16384
tasks=()
mkdir -p "$folder"

if [ "${1-}" = --rehearsal ]; then
  shift
  ladder=$here/rehearsal/ladder.yaml results=$folder/docs/results/evidence docs=$folder/docs vocabulary=512
  tasks=(--lengths 512 --items 2 --words 8 60)
  [ -d "$folder/books" ] || "$python" "$here/rehearsal/sources.py" "$folder"
  mkdir -p "$docs"
  cp "$here/../../docs/evidence.md" "$docs/"
else
  if [ ! -d "$folder/books" ]; then
    echo "error: $folder/books is missing; clone the GitHub repository mlschmitt/classic-books-markdown there" >&2
    exit 2
  fi
  bash "$here/get_packages.sh" "$folder/packages"
fi
if [ ! -f "$folder/text/corpus.json" ]; then
  "$python" "$here/corpus.py" --books "$folder/books" --packages "$folder/packages" --out "$folder/text"
fi
if [ ! -f "$folder/tokens/tokens.json" ]; then
  "$python" "$here/tokenized.py" --text "$folder/text" --out "$folder/tokens" --vocab-size "$vocabulary"
fi
if [ ! -f "$folder/tokens/tasks/tasks.json" ]; then
  "$python" "$here/make_tasks.py" --text "$folder/text" --tokens "$folder/tokens" --out "$folder/tokens/tasks" "${tasks[@]}"
fi
"$python" "$here/run_ladder.py" --ladder "$ladder" --tokens "$folder/tokens" --results "$results" \
  --work "$folder/work" "$@"
"$python" "$here/report.py" --ladder "$ladder" --results "$results" --docs "$docs"
