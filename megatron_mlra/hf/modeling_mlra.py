"""MLA, GLA and MLRA language models for Hugging Face transformers.

Letters in shapes: b batch, s new tokens, t all tokens, d hidden size, n h (branch, head) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mlra import LatentUpProjection, MLRAAttention, MLRARMSNorm, rope_cos_sin
from .configuration_mlra import MLRAConfig
from .mlp_mlra import MLRAMLP, MLRAExperts, MLRARouter
from .paged_cache_mlra import paged_step


class MLRADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: MLRAConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = MLRARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLRAAttention(config, layer_idx)
        self.post_attention_layernorm = MLRARMSNorm(config.hidden_size, config.rms_norm_eps)
        is_moe = config.layer_has_experts(layer_idx)
        self.mlp = MLRAExperts(config) if is_moe else MLRAMLP(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """`[b, s, d]` -> the same shape; the other arguments are those of MLRAAttention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MLRAPreTrainedModel(PreTrainedModel):
    """The attributes by which transformers handles these models, and the initial weights."""

    config: MLRAConfig
    config_class = MLRAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MLRADecoderLayer",)
    _skip_keys_device_placement = ("past_key_values", "step")
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MLRADecoderLayer,
        "attentions": MLRAAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LatentUpProjection | MLRARouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, MLRARouter) and self.config.use_expert_bias:
            init.zeros_(module.e_score_correction_bias)


class MLRAModel(MLRAPreTrainedModel):
    """The decoder without the output projection."""

    def __init__(self, config: MLRAConfig) -> None:
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MLRADecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = MLRARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Layers of multi-token prediction are not run here. Loading skips their weights, and the
        # configuration no longer names them, so that it fits the weights that a later save writes.
        first, ahead = config.num_hidden_layers, config.num_nextn_predict_layers
        self._keys_to_ignore_on_load_unexpected = [
            rf"(?:^|\.)layers\.{first + i}\." for i in range(ahead)
        ]
        config.num_nextn_predict_layers = config.num_nextn_predict_depths = 0
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[b, s, d]` of new tokens, which follow the tokens in the cache.

        Args:
            input_ids: `[b, s]` token ids.
            attention_mask: `[b, t]`, 0 for padding; None without padding.
            position_ids: `[b, s]`; default: the positions after the cached tokens.
            past_key_values: latents and RoPE keys of earlier tokens; extended in place.
            inputs_embeds: `[b, s, d]`, in place of input_ids.
            use_cache: whether to make a cache where none is given; default: the config's.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds are given, or the decode backend
                that the config asks for cannot run.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.size(1), device=inputs_embeds.device) + past
            position_ids = position_ids.unsqueeze(0)
        step = paged_step(self.config, past_key_values, attention_mask, inputs_embeds)
        mask = None
        if step is None or not step.in_kernel:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        cos_sin = rope_cos_sin(self.config, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                cos_sin=cos_sin,
                attention_mask=mask,
                past_key_values=past_key_values,
                step=step,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class MLRAForCausalLM(MLRAPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MLRAConfig) -> None:
        super().__init__(config)
        self.model = MLRAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits `[b, s, vocab_size]`, and with labels the loss. Other arguments as MLRAModel's.

        Args:
            labels: `[b, s]` token ids, not shifted; -100 where there is no loss.
            logits_to_keep: the number of last positions that get logits (0: all), or the indices of
                the positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


MLRAModel.register_for_auto_class("AutoModel")
MLRAForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MLRAForCausalLM", "MLRAModel", "MLRAPreTrainedModel"]
