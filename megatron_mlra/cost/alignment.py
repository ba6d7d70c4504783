"""Sizes of an MLP whose part on a tensor-parallel rank does not suit the GPU's matrix kernels."""

from __future__ import annotations

from megatron_mlra.description.model import ModelDescription

COLUMNS = 8
"""2-byte numbers in 16 bytes, to which cuBLAS's fast kernels want rows aligned."""


def unaligned_mlps(shape: ModelDescription, tp: int, expert_tp: int | None = None) -> str:
    """One line on MLP sizes whose part on a rank is no multiple of 8, with the next that are.

    Args:
        tp: tensor-parallel ranks; without more than one nothing is cut, and nothing is said.
        expert_tp: those of routed experts, if others.

    Returns:
        the line, empty if all sizes suit.
    """
    sizes = []
    if not shape.num_experts or 0 in shape.moe_layer_pattern:
        sizes.append(("--ffn-hidden-size", shape.ffn_hidden_size, tp))
    if shape.num_experts:
        sizes += [
            ("--moe-ffn-hidden-size", shape.moe_ffn_hidden_size, expert_tp or tp),
            (
                "--moe-shared-expert-intermediate-size",
                shape.moe_shared_expert_intermediate_size,
                tp,
            ),
        ]
    said = []
    for flag, size, ranks in sizes:
        step = COLUMNS * ranks
        # A size that the ranks do not divide is refused elsewhere.
        if ranks > 1 and size % ranks == 0 and size % step:
            said.append(
                f"{flag} {size} is {size // ranks} on each of {ranks} ranks, no multiple of"
                f" {COLUMNS}, which GPUs multiply slower; {-(-size // step) * step} suits"
            )
    return f"note: {'; '.join(said)}" if said else ""
