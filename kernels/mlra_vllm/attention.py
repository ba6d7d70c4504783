"""The projections of a layer's attention.

Letters: T tokens, d hidden size, h heads of the rank's core, r RoPE dim.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.layernorm import RMSNorm

from mlra_vllm.config import MLRAConfig
from mlra_vllm.layer import LatentAttention
from mlra_vllm.products import linear_by
from mlra_vllm.rope import rotate
from mlra_vllm.shard import plan
from mlra_vllm.weights import sources


class MLRAAttention(nn.Module):
    """MLA, GLA or MLRA: a rank has the heads that its latents serve; one all-reduce at the end.

    Args:
        tables, leads: see LatentAttention.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        tables: tuple[Tensor, Tensor],
        prefix: str,
        leads: bool,
    ) -> None:
        super().__init__()
        config: MLRAConfig = vllm_config.model_config.hf_config
        self.config = config
        self.tp = get_tensor_model_parallel_world_size()
        self.linear = linear_by(vllm_config)
        self.shard = plan(
            config.num_attention_heads,
            config.num_latent_heads,
            config.num_branches,
            self.tp,
            get_tensor_model_parallel_rank(),
        )
        d, heads = config.hidden_size, self.shard.heads
        self.query_size = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.query_rank = config.q_lora_rank or 0
        self.kv_size = self.shard.latents * config.latent_dim + config.qk_rope_head_dim

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape), requires_grad=False)

        # One product for the query latent (if any), the rank's latents and the RoPE key.
        self.down = weight(self.query_rank + self.kv_size, d)
        self.q_up = weight(heads * self.query_size, self.query_rank or d)
        if self.query_rank:
            self.q_norm = RMSNorm(self.query_rank, eps=config.rms_norm_eps)
        if config.norms_query_heads:
            self.query_head_norm = weight(heads, self.query_size)
        if config.output_gate:
            self.gate = weight(heads * config.v_head_dim, d)
        self.proj = weight(d, heads * config.v_head_dim)
        self.attn = LatentAttention(vllm_config, self.shard, tables, f"{prefix}.attn", leads)
        self._sources, self._arrived = sources(config, self.shard), set()

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[T, d]` -> `[T, d]`; cos, sin `[T, r / 2]` of the tokens' positions."""
        nope = self.config.qk_nope_head_dim
        linear = self.linear
        down = linear(x, self.down)
        query, kv = x, down
        if self.query_rank:
            query, kv = down.split((self.query_rank, self.kv_size), dim=-1)
            query = self.q_norm(query.contiguous())
        q = linear(query, self.q_up).unflatten(-1, (self.shard.heads, self.query_size))
        if self.config.norms_query_heads:
            wide = rms_norm(q.float(), (self.query_size,), eps=self.config.rms_norm_eps)
            q = (wide * self.query_head_norm.float()).to(q.dtype)
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), dim=-1)
        out = self.attn(q, kv, positions).flatten(1)
        if self.config.output_gate:
            out = out * torch.sigmoid(linear(x, self.gate).float()).to(out.dtype)
        out = linear(out, self.proj)
        return tensor_model_parallel_all_reduce(out) if self.tp > 1 else out

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Shard and prepare an exported layer's tensors. Several calls may share the tensors.

        Returns:
            Names of the complete parameters. vLLM refuses a checkpoint that leaves one incomplete.

        Raises:
            ValueError: this attention has no such tensor, or its shape does not fit config.json.
        """
        for name, tensor in weights:
            source = self._sources.get(name)
            if source is None:
                raise ValueError(f"{self.attn.layer_name}: config.json makes no {name}")
            if tuple(tensor.shape) != source.shape:
                raise ValueError(
                    f"{self.attn.layer_name}: {name} is {tuple(tensor.shape)} and config.json makes"
                    f" it {source.shape}"
                )
            for (parameter, rows), part in zip(source.targets, source.cut(tensor), strict=True):
                self.get_parameter(parameter).data[rows].copy_(part)
            self._arrived.add(name)
        late = {
            parameter
            for name, source in self._sources.items()
            if name not in self._arrived
            for parameter, _ in source.targets
        }
        return {name for name, _ in self.named_parameters()} - late
