"""Training FLOPs per token. Pure Python.

Letters: V vocabulary (padded), d hidden size, f MLP size, h attention heads, n layers, s sequence
length, g key/value heads of GQA and GTA, c head dim of GQA, GTA, MFA and TPA; of the latent family
L latent heads, N branches, G = L / N head groups, d_q, d_c, d_l = d_c / L, d_h, d_r, d_v. Linear
layers have no biases.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription

RECOMPUTES = (None, "core", "up_proj", "full")


class TrainFlops(NamedTuple):
    """Floating-point operations (a multiply-add is two) of one training step, per token."""

    model: float
    """FLOPs that the method needs."""
    hardware: float
    """FLOPs that the chosen form of the core executes, recomputation included."""


def train_flops_per_token(
    shape: ModelDescription,
    seq_length: int | None = None,
    recompute: str | None = None,
) -> TrainFlops:
    """Training FLOPs per token: a forward, and a backward of twice the forward.

    All matrix products are counted. A weight matrix of P parameters costs 2 P forward, the output
    layer 2 V d; TPA adds 2 h c (R_q + 2 R_kv) to assemble heads from factors. The core costs
    2 N h (score terms + value terms) k, with the **causal half** k = (s + 1) / 2, the mean number
    of keys that a query sees. Terms of a score and of a value product:

    - model FLOPs: d_h + d_r and d_v for the latent family, in all N branches, in either form;
    - hardware FLOPs: d_l + d_r and d_l in the absorbed form. Up-projecting latents costs as much as
      absorbing W_UK and applying W_UV, 2 N h d_l (d_h + d_v): the cost of the weights is the same
      in both forms.

    Each layer of multi-token prediction adds a layer like the last one, 4 d^2 and an output layer.

    Args:
        seq_length: s; default that of `shape`.
        recompute: adds a second forward to the hardware FLOPs: 'core' of the score and value
            products, 'up_proj' of the products between the compressed latents and the core (the
            query's up-projection; W_UK if absorbed, W_UK and W_UV if materialized), 'full' of all
            layers.

    Raises:
        ValueError: an argument is wrong, or `recompute` is 'up_proj' without latents.
    """
    if recompute not in RECOMPUTES:
        raise ValueError(f"recompute is {recompute!r}; use None, 'core', 'up_proj' or 'full'")
    s = shape.seq_length if seq_length is None else seq_length
    if s < 1:
        raise ValueError(f"seq_length is {s}; use at least 1")
    n, h, c, p = shape.num_layers, shape.num_attention_heads, shape.head_dim, parameters(shape)
    keys = (s + 1) / 2
    mlp = p.mlp * n
    if shape.num_experts:
        mlp = p.mlp * shape.num_dense_layers + p.moe_active * (n - shape.num_dense_layers)
    ahead = shape.mtp_num_layers
    if ahead:
        mlp += ahead * (p.moe_active if shape.is_moe(-1) else p.mlp)
        n += ahead
    layers = 2.0 * (n * sum(p.attention.values()) + mlp + ahead * 2 * shape.hidden_size**2)
    if shape.attention == "tpa":
        layers += n * 2 * h * c * (shape.tpa_q_rank + 2 * shape.tpa_kv_rank)
    output = 2.0 * p.embedding * (1 + ahead)
    heads, score, value, run_score, run_value = h, c, c, c, c
    up_proj = 0.0
    if shape.attention == "mlra":
        d_h, d_r, d_l, d_v = (
            shape.qk_nope_head_dim,
            shape.qk_rope_head_dim,
            shape.latent_dim,
            shape.v_head_dim,
        )
        heads, score, value = shape.num_branches * h, d_h + d_r, d_v
        run_score, run_value = (d_l + d_r, d_l) if shape.absorbed else (score, value)
        before_core = d_h if shape.absorbed else d_h + d_v
        query = "linear_q_proj" if shape.q_lora_rank is None else "linear_q_up_proj"
        up_proj = 2.0 * n * (p.attention[query] + heads * d_l * before_core)
    elif recompute == "up_proj":
        raise ValueError(
            f"recompute is 'up_proj', but {shape.attention_variant} has no latents; use 'core'"
        )
    core = 2.0 * n * heads * (score + value) * keys
    run_core = 2.0 * n * heads * (run_score + run_value) * keys
    extra = {None: 0.0, "core": run_core, "up_proj": up_proj, "full": layers + run_core}[recompute]
    linear = 3.0 * (layers + output)
    return TrainFlops(model=linear + 3 * core, hardware=linear + 3 * run_core + extra)
