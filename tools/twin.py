"""Write the preset of another attention at the same number of parameters (docs/evidence.md).

python tools/twin.py examples/configs/mlra4_2.9b.yaml --attention gqa --output gqa_twin.yaml
"""

from megatron_mlra.command_line import run
from megatron_mlra.planner.twin_cli import main

if __name__ == "__main__":
    run(main)
