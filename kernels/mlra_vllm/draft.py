"""The layer of multi-token prediction as vLLM's drafter. (Annotations are evaluated here, as in
model.py.)

vLLM's own method `mtp` takes model types from a closed list. vLLM's method `eagle` takes any model
whose name with "Eagle" in front is registered. It gives the drafter what multi-token prediction
needs: the hidden state of each token and the token behind. With
`{"method": "eagle", "model": FOLDER}` vLLM reads the folder of the served model again for this
layer alone; embedding and output layer are the served model's. For several guesses per step the
layer runs several times, each time on the state of its previous run.

Letters: T tokens of a step, d hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from mlra_vllm.checks import check
from mlra_vllm.config import MLRAConfig
from mlra_vllm.model import MLRADecoderLayer, MLRAForCausalLM
from mlra_vllm.rope import rotary_tables

_OWN = {"shared_head.norm.weight": "norm.weight"}
_OWN |= {f"{name}.weight": f"{name}.weight" for name in ("enorm", "hnorm", "eh_proj")}
"""Weights that a decoder layer lacks: name behind the layer's prefix -> name here."""


class SharedEmbedding(nn.Module):
    """Placeholder of the served model's embedding; vLLM replaces it once both models are loaded."""

    weight = None


class Join(nn.Module):
    """W of `h = W [norm(embedding); norm(state)]`, `[d, 2 d]`."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, 2 * d), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, 2 d]` -> `[T, d]`."""
        return linear(x, self.weight)


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "hidden_states": {0: "b"},
    }
)
class DraftModel(nn.Module):
    """The layer of multi-token prediction without the output layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: MLRAConfig = vllm_config.model_config.hf_config
        d, eps, layers = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
        self.embed_tokens = SharedEmbedding()
        cos, sin = rotary_tables(config, vllm_config.model_config.max_model_len)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.enorm, self.hnorm = RMSNorm(d, eps=eps), RMSNorm(d, eps=eps)
        self.eh_proj = Join(d)
        # Numbered behind the decoder's layers, and of the kind of the last one.
        self.layer = MLRADecoderLayer(
            vllm_config, layers - 1, (self.cos, self.sin), f"{prefix}.layers.{layers}", True
        )
        self.norm = RMSNorm(d, eps=eps)

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Hidden states `[T, d]`, whose logits predict the token behind `input_ids`.

        Args:
            input_ids: `[T]` integers, the token behind each position.
            positions: `[T]` integers, the positions of `hidden_states`.
            hidden_states: `[T, d]`, the served model's (or this layer's own) at the positions.
        """
        embedded = self.enorm(self.embed_tokens(input_ids))
        x = self.eh_proj(torch.cat((embedded, self.hnorm(hidden_states)), dim=-1))
        x, residual = self.layer(x, None, positions, self.cos[positions], self.sin[positions])
        return self.norm(x, residual)[0]


class EagleMLRAForCausalLM(nn.Module):
    """The drafter of a served MLRAForCausalLM, whose output layer vLLM puts into `lm_head`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check(vllm_config)
        # The drafter's vllm_config holds the served model's configuration.
        self.config: MLRAConfig = vllm_config.model_config.hf_config
        self.model = DraftModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """`[T]` -> `[T, d]`."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[T, d]`, twice: for the logits and for the next guess."""
        states = self.model(input_ids, positions, hidden_states)
        return states, states

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """`[T, d]` -> logits `[T, vocabulary]` on the rank that samples, None on others."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the first layer of multi-token prediction from the whole model's weights.

        Returns:
            The names of the loaded parameters.
        """
        prefix = f"model.layers.{self.config.num_hidden_layers}."

        def own() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(prefix):
                    rest = name.removeprefix(prefix)
                    yield f"model.{_OWN.get(rest, f'layer.{rest}')}", tensor

        return AutoWeightsLoader(self).load_weights(own(), mapper=MLRAForCausalLM.hf_to_vllm_mapper)
