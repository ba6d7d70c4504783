"""Pretrain MLA, GLA, MLRA and their baselines on Megatron-core: `mlra pretrain` as a script.

python pretrain_mlra.py --config debug --data-path data/corpus
torchrun --nproc-per-node 8 pretrain_mlra.py --config mlra4_2.9b ...
"""

from megatron_mlra.command_line.entry import Answered

with Answered():
    from megatron_mlra.training.cli import has_gpu, leave, main, start

__all__ = ["has_gpu", "leave", "main", "start"]

if __name__ == "__main__":
    start()
