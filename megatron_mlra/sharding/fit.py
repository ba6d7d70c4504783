"""The tensor-parallel sizes that the latent family's dimensions allow. Pure Python."""

from __future__ import annotations


def misfit(
    tp: int,
    layout: str,
    *,
    num_latent_heads: int,
    num_branches: int,
    num_attention_heads: int,
    q_lora_rank: int | None,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
) -> tuple[str, str] | None:
    """Why a tensor-parallel size does not work; None if it does.

    Args:
        layout: 'head' or 'latent'.

    Returns:
        (the reason, an alternative to another size or ''), parts of a message.
    """
    L, N = num_latent_heads, num_branches
    G = L // N
    for name, value in (
        ("num_attention_heads", num_attention_heads),
        ("q_lora_rank", q_lora_rank),
        ("kv_lora_rank", kv_lora_rank),
        ("qk_rope_head_dim", qk_rope_head_dim),
    ):
        if value is not None and value % tp:
            return f"does not divide {name} {value}", f" or {name} {-(-value // tp) * tp}"
    if L % tp and tp % L:
        return f"neither divides num_latent_heads {L} nor is a multiple of it", ""
    if layout == "head" and G % tp and tp % G:
        return f"does not fit {G} head groups in the head layout", ""
    if layout == "latent" and N % tp and tp % N:
        other = "" if G % tp and tp % G else " or latent_tp_layout head"
        return f"does not fit {N} branches in the latent layout", other
    return None
