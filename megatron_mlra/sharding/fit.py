"""The tensor-parallel sizes that the latent family's dimensions allow. Pure Python."""

from __future__ import annotations

from typing import Any


def misfit(tp: int, layout: str, model: Any) -> tuple[str, str] | None:
    """Why a tensor-parallel size does not work; None if it does.

    Args:
        layout: 'head' or 'latent'.
        model: a description of kind 'mlra', or a configuration with its sizes.

    Returns:
        (the reason, an alternative to another size or ''), parts of a message.
    """
    L, N = model.num_latent_heads, model.num_branches
    G = L // N
    for name in ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"):
        value = getattr(model, name)
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
