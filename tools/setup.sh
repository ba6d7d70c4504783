#!/usr/bin/env bash
# Create a virtual environment with everything the demo, the tests and the linters need.
# Usage: tools/setup.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/setup.sh FOLDER}
wanted=$(cat .python-version)

fail() { echo "error: $*" >&2; exit 1; }

# An activated environment of another Python, or pyenv's shims, may stand in front of the right one.
python=
for candidate in "python$wanted" python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$wanted".*/bin/python; do
  if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$wanted" ]; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "Python $wanted was not found; install it (for example: pyenv install $wanted, or your system's python$wanted and python$wanted-venv)"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "Python $wanted lacks venv; install your system's python$wanted-venv"

if [ ! -x "$venv/bin/python" ]; then
  # Digits alone: within (( )) bash would run code that stands in a device's name.
  kilobytes=$(df -Pk . | awk 'NR == 2 {print $4}' | tr -cd 0-9)
  free=$((10#${kilobytes:-0} / 1048576))
  [ "$free" -ge 12 ] || fail "$free GB are free here and PyTorch with its CUDA libraries needs 12; free some or move the checkout"
  echo "1/3 creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
echo "2/3 packages of kernels and project into $venv (about 5 GB, minutes the first time)"
# Not compiled here: pip would compile all 300 MB of sources, and one after another.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
  -e ./kernels -e ".[dev]"
echo "3/3 compiling Python files of Megatron and torch"
# Megatron's first import would print its warnings about syntax; where PYTHONDONTWRITEBYTECODE is set,
# as containers often do, every command would compile all of torch that it imports.
"$venv/bin/python" -W ignore -m compileall -q -j 0 "$venv"/lib/python*/site-packages/{megatron,torch,transformers} || true
if command -v nvidia-smi >/dev/null && ! "$venv/bin/python" -c 'import transformer_engine' 2>/dev/null; then
  echo "note: there is a GPU but no Transformer Engine; $venv/bin/pip install -c constraints.txt -e ./kernels -e '.[te]' adds it (compiles for some minutes)"
fi
touch "$venv/.installed"
