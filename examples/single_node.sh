#!/usr/bin/env bash
# One node, all its GPUs: examples/single_node.sh PRESET DATA [flags ...]
# For example: examples/single_node.sh mlra4_7b data/fineweb
set -euo pipefail
[ $# -ge 2 ] || { echo "error: usage: examples/single_node.sh PRESET DATA [flags ...]" >&2; exit 2; }
preset=$1 data=$2
shift 2
exec "$(dirname "$0")/launch.sh" "$preset" "runs/$(basename "$preset" .yaml)" --data-path "$data" "$@"
