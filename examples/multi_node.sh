#!/usr/bin/env bash
# The same command on every node: examples/multi_node.sh NODES HOST PRESET DATA SAVE [flags ...]
#   HOST   the first node's name; its port 29500 is where all meet (RDZV_PORT changes it)
#   SAVE   a folder that every node sees
# For example, on each of 128 nodes: examples/multi_node.sh 128 node001 mlra4_70b data/web runs/70b
set -euo pipefail
[ $# -ge 5 ] || {
  echo "error: usage: examples/multi_node.sh NODES HOST PRESET DATA SAVE [flags ...]" >&2
  exit 2
}
export NODES=$1 RDZV_ENDPOINT=$2:${RDZV_PORT:-29500}
preset=$3 data=$4 save=$5
shift 5
exec "$(dirname "$0")/launch.sh" "$preset" "$save" --data-path "$data" "$@"
