"""The decoder for vLLM. (Annotations are evaluated here, since vLLM inspects them.)

Letters: T tokens of a step, d hidden size, r RoPE dim.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from mlra_vllm.attention import MLRAAttention
from mlra_vllm.checks import check
from mlra_vllm.config import MLRAConfig
from mlra_vllm.experts import MLRAExperts
from mlra_vllm.mlp import PaddedMLP
from mlra_vllm.rope import rotary_tables


class MLRADecoderLayer(nn.Module):
    """Pre-norm attention and MLP. The next norm adds the residual."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        index: int,
        tables: tuple[Tensor, Tensor],
        prefix: str,
        leads: bool,
    ) -> None:
        super().__init__()
        config: MLRAConfig = vllm_config.model_config.hf_config
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps=eps)
        self.self_attn = MLRAAttention(vllm_config, tables, f"{prefix}.self_attn", leads)
        self.post_attention_layernorm = RMSNorm(d, eps=eps)
        if config.layer_has_experts(index):
            self.mlp = MLRAExperts(config, f"{prefix}.mlp")
        else:
            self.mlp = PaddedMLP(d, config.intermediate_size, f"{prefix}.mlp")

    def forward(
        self, x: Tensor, residual: Tensor | None, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Output of the previous layer, residual) -> (output, residual), all `[T, d]`; the first
        layer's residual is None."""
        if residual is None:
            normed, residual = self.input_layernorm(x), x
        else:
            normed, residual = self.input_layernorm(x, residual)
        attended = self.self_attn(normed, positions, cos, sin)
        normed, residual = self.post_attention_layernorm(attended, residual)
        return self.mlp(normed), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class MLRAModel(nn.Module):
    """The decoder without the output projection."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: MLRAConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        cos, sin = rotary_tables(config, vllm_config.model_config.max_model_len)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.layers = nn.ModuleList(
            MLRADecoderLayer(vllm_config, i, (self.cos, self.sin), f"{prefix}.layers.{i}", i == 0)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids `[T]` -> embeddings `[T, d]`."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[T, d]` of a step's tokens."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        cos, sin = self.cos[positions], self.sin[positions]  # [T, r / 2], once for all layers
        for layer in self.layers:
            x, residual = layer(x, residual, positions, cos, sin)
        return self.norm(x, residual)[0]


class MLRAForCausalLM(nn.Module):
    """The language model: MLA, GLA-n or MLRA-n of any shape that the kernels support."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
            ".shared_experts.gate_proj": (".shared_experts.gate_up_proj", 0),
            ".shared_experts.up_proj": (".shared_experts.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check(vllm_config)
        self.config: MLRAConfig = vllm_config.model_config.hf_config
        self.model = MLRAModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """`[T]` -> `[T, d]`."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[T, d]` of a step's tokens."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Hidden states `[T, d]` -> logits `[T, V]`, on the rank that samples."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See AutoWeightsLoader; the attention shards its weights itself (attention.py). Layers of
        multi-token prediction are the drafter's (draft.py).

        Raises:
            ValueError: see `_checked_ends`, MLRAAttention and PaddedMLP.
        """
        first = self.config.num_hidden_layers
        skipped = [f"model.layers.{first + i}." for i in range(self.config.draft_layers)]
        skipped += ["lm_head."] if self.config.tie_word_embeddings else []
        loader = AutoWeightsLoader(self, skip_prefixes=skipped)
        return loader.load_weights(self._checked_ends(weights), mapper=self.hf_to_vllm_mapper)

    def _checked_ends(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass on weights, and compare the embedding and the output layer with config.json.

        Raises:
            ValueError: one is not `[V, d]`, or they differ where config.json ties them.
        """
        shape, ends = (self.config.vocab_size, self.config.hidden_size), {}
        for name, tensor in weights:
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                if tuple(tensor.shape) != shape:
                    raise ValueError(
                        f"{name} is {tuple(tensor.shape)} and config.json makes it {shape}"
                    )
                if self.config.tie_word_embeddings:
                    ends[name] = tensor
            if len(ends) == 2 and not torch.equal(*ends.values()):
                raise ValueError(
                    "config.json ties the embedding to the output layer, and lm_head.weight is"
                    " another than model.embed_tokens.weight"
                )
            yield name, tensor
