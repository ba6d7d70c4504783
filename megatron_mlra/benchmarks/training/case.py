"""A case (cases.py), built as `mlra pretrain` builds a run: flags, DDP and optimizer.

Megatron's own MLA is built with the same flags for comparison.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

from megatron_mlra.benchmarks.training.cases import Case
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.layers.specs import block_spec
from megatron_mlra.training import arguments, cuda_graphs


@dataclass(frozen=True)
class Load:
    """The load that all cases have in common."""

    num_layers: int
    tokens: int
    """Tokens of a micro-batch, in sequences of the case's length (at least one)."""
    micro_batches: int = 1
    """Of a step, over all data-parallel ranks."""
    ffn_multiple: int = 16
    """MLP sizes are rounded up to a multiple of this, which FP8 needs; in bf16 too."""
    flags: tuple[str, ...] = ()
    """More flags of `mlra pretrain`."""


def parse_case(case: Case, load: Load, *more: str) -> tuple[Namespace, TransformerConfig]:
    """Arguments and transformer config of a case, validated as in `mlra pretrain`.

    Args:
        more: flags in addition to those of `load`.
    """
    micro = max(1, load.tokens // case.seq_length) * case.layout.widening
    argv = ["--config", str(case.preset()), "--core-form", case.form, "--mock-data"]
    sizes = {
        "num-layers": load.num_layers,
        "seq-length": case.seq_length,
        "max-position-embeddings": case.seq_length,
        "micro-batch-size": micro,
        "global-batch-size": micro * case.layout.micro_batches(load.micro_batches),
        "lr-warmup-iters": 0,
        "expert-model-parallel-size": 1,
    }
    for name, value in sizes.items():
        argv += [f"--{name}", str(value)]
    if case.recipe != "bf16":
        argv += ["--fp8-format", "hybrid", "--fp8-recipe", case.recipe]
    argv += [*case.layout.flags(), *load.flags, *more]
    with contextlib.redirect_stdout(io.StringIO()):
        args = arguments.parse(argv)
        ffn, step = args.ffn_hidden_size, load.ffn_multiple
        args.ffn_hidden_size = -(-ffn // step) * step
        if isinstance(args.moe_layer_freq, list):
            args.moe_layer_freq = args.moe_layer_freq[: load.num_layers]
        config = arguments.validate(args)
        if case.is_stock:
            args.multi_latent_attention = True
            if case.is_fused:
                args.apply_rope_fusion, args.rope_type = True, "yarn"
                args.rotary_scaling_factor = args.mscale = args.mscale_all_dim = 1.0
                args.original_max_position_embeddings = case.seq_length
            else:
                args.rope_type = "rope"
            config = core_transformer_config_from_args(args, MLATransformerConfig)
    return args, config


def build_model(case: Case, args: Namespace, config: TransformerConfig) -> GPTModel:
    """The part of the case's GPT that this rank owns, on the current device."""
    # Megatron keeps a table of experts' losses, which has the first model's number of layers.
    destroy_moe_metrics_tracker()
    # As at Megatron's own start: a backward pass outside its schedule would leave a scale without a
    # dimension, to which the schedule cannot write.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=torch.cuda.current_device()))
    if case.is_stock and case.has_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    elif case.is_stock:
        spec = get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=True)
    else:
        spec = block_spec(config)
    model = GPTModel(
        config,
        spec,
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    )
    return model.cuda()


class Trainee:
    """A model in training on random tokens."""

    def __init__(self, case: Case, load: Load) -> None:
        self.args, self.config = parse_case(case, load)
        model_parallel_cuda_manual_seed(
            1, te_rng_tracker=self.args.te_rng_tracker, force_reset_rng=True
        )
        self.shape = from_megatron_args(self.args, seq_length=case.seq_length)
        model = build_model(case, self.args, self.config)
        if self.args.bf16:
            model = Float16Module(self.config, model)
        self.model = DistributedDataParallel(self.config, get_megatron_ddp_config(self.args), model)
        optimizer, overrides = get_megatron_optimizer_config(self.args)
        self.optimizer = get_megatron_optimizer(optimizer, [self.model], overrides)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if self.args.overlap_grad_reduce:
            self.config.no_sync_func = self.model.no_sync
        self.model.broadcast_params()
        self.batch = self.args.micro_batch_size, case.seq_length
        replicas = case.layout.size("dp")
        self.micro_batches = self.args.global_batch_size // (self.batch[0] * replicas)
        self.generator = torch.Generator().manual_seed(1)
        self.activations = 0
        """Bytes that a micro-batch holds between forward and backward, logits and losses too; 0
        without a GPU."""

    def held(self) -> dict[str, int]:
        """Bytes held between steps: of `weights`, `gradients` and the `optimizer`, whose float32
        copies of the weights count there."""
        buffers = (*self.model.buffers, *self.model.expert_parallel_buffers)
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        groups = [g for part in parts for g in part.optimizer.param_groups]
        states = [s for part in parts for s in part.optimizer.state.values()]
        seen: set[int] = set()
        found = {}
        for name, tensors in (
            ("weights", [*self.model.parameters(), *(b.param_data for b in buffers)]),
            ("gradients", [b.grad_data for b in buffers]),
            (
                "optimizer",
                [p for g in groups for p in g["params"]]
                + [x for s in states for x in s.values() if torch.is_tensor(x)],
            ),
        ):
            there = {
                x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for x in tensors
                if x is not None
            }
            found[name] = sum(size for place, size in there.items() if place not in seen)
            seen |= there.keys()
        return found

    @property
    def tokens(self) -> int:
        """Tokens per step, of all ranks."""
        return self.args.global_batch_size * self.batch[1]

    def step(self) -> tuple[float | torch.Tensor, Any]:
        """Run one optimizer step; returns the mean loss (on the device; 0 but on the last pipeline
        stage; with context parallel of the rank's tokens) and the gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=self._batches(),
            model=[self.model],
            num_microbatches=self.micro_batches,
            seq_length=self.batch[1],
            micro_batch_size=self.batch[0],
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        return sum(r["loss"] for r in reported) / max(1, len(reported)), norm

    def close(self) -> None:
        """Free the device memory. Megatron's gradient hooks keep the model alive in a cycle that
        Python's garbage collector does not see."""
        if self.args.cuda_graph_impl != "none":
            cuda_graphs.free()
        tensors = list(self.model.parameters())
        for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers):
            tensors += [buffer.param_data, buffer.grad_data]
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            tensors += [p for group in part.optimizer.param_groups for p in group["params"]]
            states = part.optimizer.state.values()
            tensors += [x for state in states for x in state.values() if torch.is_tensor(x)]
        for tensor in tensors:
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                tensor.untyped_storage().resize_(0)

    def _batches(self) -> Iterator[torch.Tensor]:
        batch, s = self.batch
        while True:
            vocabulary = self.args.padded_vocab_size
            yield torch.randint(vocabulary, (batch, s + 1), generator=self.generator).cuda()

    def _forward(self, batches: Iterator[torch.Tensor], model):
        tokens = next(batches)
        own = self._own_tokens(tokens.device)
        start = torch.cuda.memory_allocated()
        losses = model(tokens[:, own], own[None], None, labels=tokens[:, own + 1])
        self.activations = max(self.activations, torch.cuda.memory_allocated() - start)
        return losses, _mean_loss

    def _own_tokens(self, device: torch.device) -> torch.Tensor:
        """Places in the sequence of this context-parallel rank's tokens: two chunks of 2 cp."""
        cp, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        chunks = torch.arange(self.batch[1], device=device).chunk(2 * cp)
        return torch.cat([chunks[rank], chunks[-1 - rank]]) if cp > 1 else torch.cat(chunks)


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    # The schedule multiplies the loss by the context-parallel size and divides it by the number of
    # micro-batches, in place: the log needs a copy.
    return loss / mpu.get_context_parallel_world_size(), {"loss": loss.detach().clone()}
