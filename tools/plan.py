"""Plan a run before it is launched: memory, time, traffic, layouts, decoding.

python tools/plan.py --config examples/configs/mlra4_70b.yaml --gpus 1024 --gpu h100
"""

from megatron_mlra.command_line.parser import run
from megatron_mlra.planner.cli import main

if __name__ == "__main__":
    run(main)
