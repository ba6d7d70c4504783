"""Multi-token prediction (MTP): further layers that predict the tokens behind the next one.

The method is DeepSeek-V3's (arXiv 2412.19437, section 2.2) and the modules are Megatron's. Depth k
joins the hidden state of token i, from depth k - 1, with the embedding of token i + k:

    h_k[i] = norm(layer(W [norm(embedding(t[i + k])); norm(h_(k-1)[i])])),

and the shared output layer predicts token i + k + 1 from h_k[i]. This module adds what Megatron
0.19.2 lacks for this project's attentions: the layer itself (Megatron would take its own
attention), and tokens and losses that are exact for any cut of a sequence over context-parallel
ranks.

Letters: b micro-batch, s local tokens, m depths (`mtp_num_layers`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
    MultiTokenPredictionBlockSubmodules,
    _compute_mtp_acceptance_counts,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mlra.layers.specs import last_layer_spec, norm_class, uses_transformer_engine
from megatron_mlra.sharding.token_plan import plan_tokens


def multi_token_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """This stage's MTP layers: Megatron's, around a copy of the decoder's last layer.

    None on all stages but the last, and where `mtp_num_layers` is 0.
    """
    if not config.mtp_num_layers:
        return None
    spec = get_gpt_mtp_block_spec(
        config, last_layer_spec(config), uses_transformer_engine(config), vp_stage=vp_stage
    )
    for layer in spec.layer_specs if spec else ():
        parts = layer.submodules
        parts.enorm = parts.hnorm = parts.layer_norm = norm_class(config)
    return spec


def next_tokens(
    tensor: Tensor | None,
    shifts: int = -1,
    dims: int = -1,
    cp_group: dist.ProcessGroup | None = None,
    packed_seq_params: PackedSeqParams | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """For every token the value of `tensor` at the document's next token; 0 for the last token.

    Replaces Megatron's `roll_tensor`, which supports neither documents of any length under context
    parallelism nor this project's cut of documents.

    Args:
        tensor: `[b, s]`, one value per token of this rank.
        shifts, dims: -1; Megatron's callers pass both.

    Returns:
        The shifted values `[b, s]`, and their sum on this rank; (None, None) for no tensor.
    """
    if tensor is None:
        return None, None
    assert shifts == -1 and dims in (-1, tensor.dim() - 1), "only the next token is asked for"
    cp, rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    plan = plan_tokens(tensor.size(-1), cp, rank, packed_seq_params, tensor.device)
    whole = tensor.transpose(0, -1).contiguous()  # [s, b]
    if cp > 1:
        parts = [torch.empty_like(whole) for _ in range(cp)]
        dist.all_gather(parts, whole, group=cp_group)
        whole = plan.in_sequence_order(torch.cat(parts))
    ahead = torch.zeros_like(whole)
    ahead[:-1] = whole[1:]
    if plan.key_positions is not None:
        ahead[:-1][plan.key_positions[1:] == 0] = 0  # the next token begins a document
    ahead = plan.cut(ahead, 0).transpose(0, -1).contiguous()
    return ahead, ahead.sum()


def multi_token_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: Callable,
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Callable,
    config: TransformerConfig,
    cp_group: dist.ProcessGroup | None = None,
    tp_group: dist.ProcessGroup | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    scale_logits_fn: Callable[[Tensor], Tensor] | None = None,
    input_ids: Tensor | None = None,
) -> Tensor:
    """The decoder's hidden states, whose backward pass adds the losses of all depths.

    Replaces Megatron's `process_mtp_loss`, which averages over the tokens of each context-parallel
    rank, so that a label counts for more on a rank with fewer labels. Here each depth's loss is the
    mean over its labels of the whole sequence, times `mtp_loss_scaling_factor / m`.

    Args:
        hidden_states: `[(1 + m) s, b, d]`: the decoder's, then each depth's (under sequence
            parallelism this rank's part of s).
        labels: `[b, s]` int64. None, where only logits are asked for, leaves the depths out.
        loss_mask: `[b, s]`, 1 where a label counts; None: every label counts.

    Returns:
        The decoder's hidden states `[s, b, d]`.
    """
    hidden_states, *depths = hidden_states.chunk(1 + config.mtp_num_layers)
    if labels is None:
        return hidden_states
    mask = torch.ones_like(labels) if loss_mask is None else loss_mask
    labels_of_main = _over_ranks(mask.sum(), cp_group)
    if config.mtp_detach_heads:
        weight = output_layer.weight if output_weight is None else output_weight
        output_weight = weight.detach()
    for depth, hidden in enumerate(depths):
        logits, _ = output_layer(
            hidden, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        if scale_logits_fn is not None:
            logits = scale_logits_fn(logits)
        labels, _ = next_tokens(labels, -1, -1, cp_group, packed_seq_params)
        mask, _ = next_tokens(mask, -1, -1, cp_group, packed_seq_params)
        losses = mask * compute_language_model_loss(labels, logits)
        count = _over_ranks(mask.sum(), cp_group).clamp(min=1)
        # Gradients are averaged over the cp ranks, so each rank's sum must count cp-fold.
        share = (1 if cp_group is None else cp_group.size()) / count
        if is_training:
            correct, total = _compute_mtp_acceptance_counts(
                logits, labels, mask, output_layer, runtime_gather_output, tp_group
            )
            MTPLossLoggingHelper.save_metrics_to_tracker(
                losses.sum() * share,
                correct,
                total,
                depth,
                config.mtp_num_layers,
                avg_group=mpu.get_data_parallel_group(with_context_parallel=True),
            )
        if config.calculate_per_token_loss:
            # Megatron later divides all gradients by the number of the main loss's labels.
            share = labels_of_main / count
        factor = config.mtp_loss_scaling_factor / config.mtp_num_layers * share
        hidden_states = MTPLossAutoScaler.apply(hidden_states, factor * losses)
    return hidden_states


def tie_output_layer(set_up: Callable) -> Callable:
    """GPTModel's `setup_embeddings_and_output_layer` for tied embeddings over several pipeline
    stages, where the last stage has a copy of the embedding as the output layer's weight."""

    def run(model) -> None:
        copies = getattr(model, "mtp_process", False) and not model.pre_process
        if copies and model.post_process and model.share_embeddings_and_output_weights:
            model.output_layer.weight = None
        set_up(model)

    return run


def _over_ranks(count: Tensor, cp_group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `count` over context-parallel ranks, float32."""
    count = count.float()
    if cp_group is not None and cp_group.size() > 1:
        dist.all_reduce(count, group=cp_group)
    return count
