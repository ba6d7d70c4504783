"""The training benchmark's path from cases to its tables, on the CPU with tiny models.

Usage: python -m support.drivers.training_benchmark FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

MODEL = """
base: {preset}
num_layers: 2
hidden_size: 32
ffn_hidden_size: 48
num_attention_heads: 4
q_lora_rank: 16
kv_lora_rank: 32
qk_nope_head_dim: 16
qk_rope_head_dim: 8
v_head_dim: 16
init_method_std: 0.2
"""
EXPERTS = """
num_experts: 4
moe_layer_freq: ([0]+[1]*3)
moe_ffn_hidden_size: 32
moe_router_topk: 2
moe_token_dispatcher_type: alltoall
expert_model_parallel_size: 8
"""


def main(folder: Path) -> None:
    from megatron_mlra.training.cli import has_gpu

    has_gpu()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_mlra.benchmarks.training import gate, measure, report
    from megatron_mlra.benchmarks.training.case import Case, Load
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support import CONFIGS

    enable_cpu_backend()
    dense, experts = folder / "dense.yaml", folder / "experts.yaml"
    dense.write_text(MODEL.format(preset=CONFIGS / "debug.yaml"))
    experts.write_text(MODEL.format(preset=CONFIGS / "debug.yaml") + EXPERTS)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    load = Load(num_layers=2, tokens=64)
    rows = []
    for case in (
        Case(str(dense), "bf16", "absorbed", 32),
        Case(str(dense), "bf16", "materialized", 32),
        Case(str(experts), "bf16", "auto", 32),
    ):
        rows.append(measure.measure(case, load, gate.check(case, load), 1.0, 2, 1, None))
    report.write(rows, 1.0, {"num_layers": 2}, folder)
    print(report.memory_table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
