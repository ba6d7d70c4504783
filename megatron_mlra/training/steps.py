"""The parts that Megatron's trainer takes: a model's configuration, a forward step, a loss."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import AbstractSchedulePlan
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_mlra.fault_tolerance import heartbeat, samples
from megatron_mlra.layers.specs import block_spec, layer_spec
from megatron_mlra.training.batches import get_batch


def model_config(args: Namespace, transformer: TransformerConfig) -> GPTModelConfig:
    """The configuration of Megatron's GPT with this project's layers. No weight is allocated.

    Raises:
        ValueError: a requested backend is not installed, or does not support these sizes.
    """
    layer_spec(transformer)
    config = gpt_config_from_args(args, config=transformer)
    config.transformer_layer_spec = _layers
    return config


def _layers(config: GPTModelConfig, vp_stage: int | None = None):
    return block_spec(config.transformer, vp_stage=vp_stage)


def forward_step(
    data_iterator: Iterator, model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Tensor | AbstractSchedulePlan, Callable]:
    """The forward pass of one micro-batch.

    Args:
        data_iterator: see `get_batch`.
        return_schedule_plan: return a plan of the forward pass, not run it. Megatron interleaves
            the plan's layers with those of another micro-batch
            (`--overlap-moe-expert-parallel-comm`).

    Returns:
        per-token losses `[b, s]` on the last pipeline stage (hidden states on earlier stages; the
        plan with `return_schedule_plan`), and the function that reduces the losses.
    """
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    during = "" if torch.is_grad_enabled() else "validation: "
    heartbeat.mark(during + "loading data")
    batch = get_batch(data_iterator, vp_stage)
    heartbeat.mark(during + "forward")
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=batch["packed_seq_params"],
    )
    return output, partial(loss_function, batch["loss_mask"])


def loss_function(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Reduce the token losses of a micro-batch.

    Args:
        loss_mask: `[b, s]` float, 0 for a token that does not count.
        losses: `[b, s]` float, per token.

    Returns:
        the sum of the unmasked losses (float32 scalar; scaled under context parallelism), the
        number of unmasked tokens (int32 scalar), and for the log a dict of the unscaled sum and
        that number (`[2]` float32).

    Raises:
        RuntimeError: for a NaN or infinite loss, unless --no-check-for-nan-in-loss-and-grad.
    """
    heartbeat.mark("backward" if torch.is_grad_enabled() else "validation: the loss")
    losses = losses.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        _check_finite(loss)
    # The schedule divides the returned loss in place, so the log gets a copy.
    reported = torch.stack((loss.detach().clone(), num_tokens.float()))
    if get_args().context_parallel_size > 1 and not get_args().calculate_per_token_loss:
        loss = loss * _context_parallel_share(num_tokens)
    return loss, num_tokens, {"lm loss": reported}


def _context_parallel_share(num_tokens: Tensor) -> Tensor:
    """The factor of this rank's loss under which the average over context-parallel ranks is the
    mean over tokens.

    The schedule divides the sum of rank r by the number n_r of unmasked tokens on rank r, then
    averages over the cp ranks. With the factor `cp n_r / sum(n)`, every token has the same weight.
    """
    group = mpu.get_context_parallel_group()
    whole = num_tokens.float()
    dist.all_reduce(whole, group=group)
    return group.size() * num_tokens / whole.clamp(min=1)


def _check_finite(loss: Tensor) -> None:
    machine = get_rerun_state_machine()
    if machine.get_mode() == RerunMode.DISABLED:
        if not torch.isfinite(loss):
            step = f"step {get_args().curr_iteration + 1}: the loss"
            where = step if torch.is_grad_enabled() else "the validation loss"
            raise RuntimeError(
                f"{where} is {loss.item()} on {samples.latest()}; lower --lr, or look at the batch"
            )
        return
    for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "infinite")):
        machine.validate_result(
            result=loss,
            rejection_func=reject,
            message=f"the loss is {what} on {samples.latest()}",
            fatal=True,
        )
