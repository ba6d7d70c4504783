#!/usr/bin/env bash
# Create the environment of tests/vllm: vLLM for CPUs with this project's plugin.
# vLLM pins NumPy and setuptools below what the project uses, so it lives in a folder of its own.
# Usage: tools/setup_vllm.sh FOLDER PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/setup_vllm.sh FOLDER PYTHON}
python=${2:?usage: tools/setup_vllm.sh FOLDER PYTHON}
list=constraints-vllm.txt
# Packages of 5 GB that both environments have in the same version are linked, not installed again.
shared='torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z]*'

fail() { echo "error: $*" >&2; exit 1; }

have=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))') ||
  fail "$python has no torch; run 'make setup' first"
grep -qx "torch==${have%%+*}" "$list" ||
  fail "$python has torch $have and $list asks for $(grep '^torch==' "$list"); run 'make setup'"
if [ ! -x "$venv/bin/python" ]; then
  free=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
  [ "$free" -ge 3 ] || fail "$free GB are free here and vLLM's packages need 3; free some"
  echo "creating $venv"
  "$python" -m venv "$venv"
fi
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
from=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
rm -f "$site/linked.pth"
rm -rf "$venv/linked"
echo "installing vLLM into $venv (some minutes the first time)"
grep -vE "^#|^($shared)==" "$list" >"$venv/install.txt"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
  -r "$venv/install.txt"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --no-build-isolation -e ./kernels
mkdir "$venv/linked"
for name in torch torch-* torchgen functorch triton triton-* nvidia nvidia_* cuda cuda_*; do
  for path in "$from"/$name; do
    [ ! -e "$path" ] || ln -s "$path" "$venv/linked/"
  done
done
realpath "$venv/linked" >"$site/linked.pth"
# The browser that looks at the chat page.
browser=chromium-headless-shell
if ! command -v $browser chromium chromium-browser google-chrome >/dev/null; then
  echo "installing $browser"
  { [ "$(id -u)" = 0 ] && apt-get update && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends $browser; } >"$venv/apt.log" 2>&1 ||
    echo "note: tests of the chat page need a Chromium; as root: apt-get install $browser"
fi
touch "$venv/.installed"
