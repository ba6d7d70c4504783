"""A small GPT on Megatron's own DDP, optimizer, pipeline schedule and checkpoint sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_mlra.layers.baselines.config import BaselineConfig
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.layers.multi_token import multi_token_spec
from megatron_mlra.layers.specs import block_spec
from megatron_mlra.training.muon import cut_grouped_queries
from support.pieces import like_built, pieces, place, slices
from support.samples import BATCH, DEFAULT, SEQ, Sizes, global_batch


@dataclass
class Layout:
    """Parallel sizes of a world, and its optimizer."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    dp: int = 1
    ep: int = 1
    distributed_optimizer: bool = False
    optimizer: str = "adam"
    overlap: bool = False
    """Whether gradients and weights are sent while layers run."""

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def initialize(self) -> None:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
        )
        model_parallel_cuda_manual_seed(1)


@dataclass
class Packing:
    """The documents of which each sequence is made."""

    bounds: tuple[int, ...]
    """Cumulative lengths, from 0 to SEQ."""
    cut_documents: bool = False
    """Whether context parallelism cuts every document instead of the sequence."""


def make_config(layout: Layout, **overrides: Any) -> MLRAConfig | BaselineConfig:
    """The tiny model's config; the override `attention` chooses a baseline."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "layernorm_epsilon": 1e-6,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.2,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "batch_p2p_comm": False,
    }
    if overrides.get("attention", "mlra") == "mlra":
        overrides.pop("attention", None)
        sizes |= {"q_lora_rank": 32, "kv_lora_rank": 64, "qk_head_dim": 16, "v_head_dim": 24}
        sizes |= {"qk_pos_emb_head_dim": 8}
        return MLRAConfig(**{**sizes, **overrides})
    return BaselineConfig(**{**sizes, "kv_channels": 16, **overrides})


@dataclass
class Tiny:
    """One rank's model chunks, optimizer and data."""

    config: MLRAConfig | BaselineConfig
    layout: Layout
    packing: Packing | None = None
    sizes: Sizes = DEFAULT
    chunks: list[DistributedDataParallel] = field(default_factory=list)
    optimizer: Any = None

    @classmethod
    def build(
        cls,
        config: MLRAConfig | BaselineConfig,
        layout: Layout,
        packing: Packing | None = None,
        sizes: Sizes = DEFAULT,
    ) -> Tiny:
        tiny = cls(config, layout, packing, sizes)
        for stage in range(layout.vpp or 1):
            vp_stage = stage if layout.vpp else None
            mpu.set_virtual_pipeline_model_parallel_rank(vp_stage)
            model = GPTModel(
                config,
                block_spec(config, vp_stage=vp_stage),
                sizes.vocab,
                sizes.seq,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                share_embeddings_and_output_weights=True,
                position_embedding_type="rope",
                vp_stage=vp_stage,
                mtp_block_spec=multi_token_spec(config, vp_stage=vp_stage),
            )
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=layout.distributed_optimizer,
                overlap_grad_reduce=layout.overlap,
                overlap_param_gather=layout.overlap,
            )
            tiny.chunks.append(DistributedDataParallel(config, ddp, model.cuda()))
        if layout.optimizer == "muon":
            cut_grouped_queries(tiny.chunks)
        tiny.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=layout.optimizer,
                lr=1e-3,
                weight_decay=0.1,
                clip_grad=1.0,
                overlap_param_gather=layout.overlap,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=layout.distributed_optimizer,
                muon_tp_mode="duplicated",
                muon_fp32_matmul_prec="highest",
            ),
            tiny.chunks,
        )
        config.grad_scale_func = tiny.optimizer.scale_loss
        if layout.overlap:
            config.no_sync_func = tiny.chunks[0].no_sync
        config.finalize_model_grads_func = finalize_model_grads
        return tiny

    # -- weights and gradients by their global names -----------------------------------------------

    def shards(self) -> Iterator[tuple[torch.nn.Parameter, Any]]:
        """Every parameter with its entry of the sharded state dict."""
        metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        for chunk in self.chunks:
            entries = {}
            for entry in chunk.module.sharded_state_dict(metadata=metadata).values():
                if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                    entries[entry.data.data_ptr()] = entry
            for name, param in chunk.module.named_parameters():
                assert param.data_ptr() in entries, f"{name} is not in the checkpoint"
                yield param, entries[param.data_ptr()]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Set every weight to this rank's part of the global weight."""
        with torch.no_grad():
            for param, entry in self.shards():
                parts = [weights[p.key][place(p)] for p in pieces(entry, param.data)]
                if isinstance(entry, ShardedTensorFactory):
                    param.copy_(entry.merge_fn(like_built(entry, param.data, parts)))
                else:
                    param.copy_(parts[0])
        self.optimizer.reload_model_params()

    def collect(self, what: str) -> dict[str, Tensor]:
        """Global name -> whole 'weight' or 'gradient', assembled from all ranks, on every rank."""
        return self.assemble(self._gradient if what == "gradient" else lambda param: param.data)

    def assemble(self, of: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Global name -> whole tensor, on every rank; `of` returns this rank's part of it for a
        weight."""
        mine = [
            (piece.key, piece.global_shape, piece.global_offset, piece.local_shape, piece.data)
            for param, entry in self.shards()
            for piece in pieces(entry, of(param).cpu())
        ]
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, mine)
        whole: dict[str, Tensor] = {}
        for parts in gathered:
            for key, shape, offset, local, data in parts:
                target = whole.setdefault(key, torch.full(shape, float("nan")))
                target[slices(offset, local, len(shape))] = data
        return whole

    def replicas(self) -> list[tuple[tuple[Any, ...], str]]:
        """((name, offset), SHA-256 of the bytes) of each piece of weights on this rank."""
        return [
            (
                (piece.key, piece.global_offset),
                hashlib.sha256(
                    piece.data.contiguous().view(torch.uint8).numpy().tobytes()
                ).hexdigest(),
            )
            for param, entry in self.shards()
            for piece in pieces(entry, param.data)
        ]

    def _gradient(self, param: torch.nn.Parameter) -> Tensor:
        """The reduced gradient, assembled from the ranges that the distributed optimizer leaves on
        each rank."""
        if not self.layout.distributed_optimizer:
            return param.main_grad
        whole = torch.zeros(param.numel(), device=param.device)
        for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if param in optimizer.model_param_gbuf_map:
                part = optimizer._get_model_param_range_map(param)["param"]
                whole[part.start : part.end] = param.main_grad.view(-1)[part.start : part.end]
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(whole, group=group)
        return whole.view(param.shape)

    # -- training ----------------------------------------------------------------------------------

    def step(self, seed: int) -> dict[str, Any]:
        """One training step on a global batch; returns the loss, the gradient norm and, for seed 0,
        the gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._run(seed, forward_only=False)
        gradients = self.collect("gradient") if seed == 0 else None
        _, grad_norm, _ = self.optimizer.step()
        return {"loss": loss, "gradients": gradients, "grad_norm": float(grad_norm)}

    def update(self, draw: Callable[[str, tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
        """Global name -> update of one optimizer step, starting from weights of zero.

        Args:
            draw: (global name, global shape) -> the gradient of the global weight.
        """
        with torch.no_grad():
            for param, entry in self.shards():
                parts = [draw(p.key, p.global_shape)[place(p)] for p in pieces(entry, param.data)]
                whole = isinstance(entry, ShardedTensorFactory)
                built = entry.merge_fn(like_built(entry, param.data, parts)) if whole else parts[0]
                param.main_grad.copy_(built)
                param.zero_()
        self.optimizer.step()
        return self.collect("weight")

    def _run(self, seed: int, forward_only: bool) -> float:
        per_rank = self.sizes.batch // self.layout.dp
        iterators = [self._batches(seed, per_rank) for _ in self.chunks]
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if self.layout.vpp else iterators[0],
            model=self.chunks if self.layout.vpp else self.chunks[0],
            num_microbatches=per_rank,
            seq_length=self.sizes.seq,
            micro_batch_size=1,
            decoder_seq_length=self.sizes.seq,
            forward_only=forward_only,
        )
        mean = torch.tensor([sum(float(r["loss"]) for r in reports) / self.sizes.batch]).cuda()
        # Tensor-parallel ranks of the last stage report the same loss.
        torch.distributed.all_reduce(mean)
        return float(mean) / self.layout.tp

    def _forward_step(self, iterator, model, return_schedule_plan: bool = False):
        batch = next(iterator)
        run = model.build_schedule_plan if return_schedule_plan else model
        out = run(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            packed_seq_params=batch["packed"],
        )

        def loss_function(losses):
            # The mean over the whole sequence; `losses` are one context parallel rank's tokens.
            loss = losses.float().sum() / self.sizes.seq
            return loss, {"loss": loss.detach().clone()}

        return out, loss_function

    def _batches(self, seed: int, count: int) -> Iterator[dict[str, Tensor]]:
        tokens = global_batch(seed, self.sizes)
        first = mpu.get_data_parallel_rank() * count
        for row in range(first, first + count):
            batch = {
                "tokens": tokens[row : row + 1, :-1].contiguous(),
                "labels": tokens[row : row + 1, 1:].contiguous(),
                "position_ids": torch.arange(self.sizes.seq)[None],
            }
            batch = {name: part[:, self._own_tokens()].cuda() for name, part in batch.items()}
            yield batch | {"packed": self._packed()}

    def _own_tokens(self) -> Tensor:
        """Indices of this context parallel rank's tokens."""
        cp, rank, packing = self.layout.cp, mpu.get_context_parallel_rank(), self.packing
        bounds = packing.bounds if packing and packing.cut_documents else (0, self.sizes.seq)
        parts = []
        for start, stop in pairwise(bounds):
            chunks = torch.arange(start, stop).chunk(2 * cp)
            parts += [chunks[rank], chunks[-1 - rank]]
        return torch.cat(parts)

    def _packed(self) -> PackedSeqParams | None:
        if self.packing is None:
            return None
        bounds = torch.tensor(self.packing.bounds, dtype=torch.int32)
        longest = int(bounds.diff().max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            cu_seqlens_q_padded=bounds if self.packing.cut_documents else None,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def sharded_weights(self) -> dict[str, Any]:
        """The model's sharded state dict, as a checkpoint stores it."""
        metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        return self.chunks[0].module.sharded_state_dict(metadata=metadata)

    def logits(self) -> Tensor | None:
        """Logits `[BATCH, SEQ, VOCAB]` of batch 0 on the last pipeline stage, else None."""
        per_rank = BATCH // self.layout.dp
        parts = get_forward_backward_func()(
            forward_step_func=_logits_step,
            data_iterator=self._batches(0, per_rank),
            model=self.chunks[0],
            num_microbatches=per_rank,
            seq_length=SEQ,
            micro_batch_size=1,
            decoder_seq_length=SEQ,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parts:
            return None
        logits = torch.cat(parts)
        for group, dim in (
            (mpu.get_tensor_model_parallel_group(), -1),
            (mpu.get_data_parallel_group(), 0),
        ):
            shards = [torch.empty_like(logits) for _ in range(group.size())]
            torch.distributed.all_gather(shards, logits.contiguous(), group=group)
            logits = torch.cat(shards, dim=dim)
        return logits


def save_logits(tiny: Tiny, path: Path) -> None:
    """Write the logits from the last rank, which is on the last pipeline stage."""
    logits = tiny.logits()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        torch.save(logits, path)
    torch.distributed.barrier()


def _logits_step(iterator, model):
    batch = next(iterator)
    out = model(batch["tokens"], batch["position_ids"], None)
    return out, lambda logits, non_loss_data=True: logits.detach().clone()
