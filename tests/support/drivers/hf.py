"""Write Megatron's logits and gradients of the export tests' models, and their Megatron folders.

Usage: python -m support.drivers.hf FOLDER
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from support.hf_cases import CASES


def main(folder: Path) -> None:
    import megatron_mlra.layers.specs  # noqa: F401  (loaded before the fork)
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support.world import run_world

    enable_cpu_backend()
    logging.disable(logging.WARNING)
    run_world(1, lambda _: _run(folder), folder / "world")


def _run(folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel

    from megatron_mlra.checkpoint.megatron.writer import write_megatron
    from megatron_mlra.description.tensors import VOCABULARY
    from megatron_mlra.layers.from_description import to_config
    from megatron_mlra.layers.specs import block_spec
    from support.random_checkpoint import RandomFolder
    from support.tiny import Layout

    Layout().initialize()
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    generator = torch.Generator().manual_seed(3)
    for name, description in CASES.items():
        write_megatron(RandomFolder(description), folder / name, progress=False)
        config = to_config(
            description,
            use_cpu_initialization=True,
            transformer_impl="local",
            attention_dropout=0.0,
            hidden_dropout=0.0,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            persist_layer_norm=False,
            moe_token_dispatcher_type="alltoall",
        )
        rows = -(-description.vocab_size // 128) * 128
        model = GPTModel(
            config,
            block_spec(config),
            rows,
            description.max_position_embeddings,
            share_embeddings_and_output_weights=description.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=description.rotary_base,
        )
        wanted = model.sharded_state_dict(metadata=metadata)
        loaded = dist_checkpointing.load(wanted, str(folder / name / "release"))
        model.load_state_dict(loaded, strict=False)
        tokens = torch.randint(description.vocab_size, (3, 40), generator=generator)
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        logits = model(tokens, positions, None)[..., : description.vocab_size]
        direction = torch.randn(logits.shape, generator=generator)
        (logits * direction).mean().backward()
        gradients = {
            key.replace("local_experts", "experts"): param.grad[: description.vocab_size]
            if key in VOCABULARY
            else param.grad
            for key, param in model.named_parameters()
        }
        result = {"tokens": tokens, "logits": logits.detach(), "direction": direction}
        torch.save(result | {"gradients": gradients}, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
