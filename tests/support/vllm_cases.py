"""The models that vLLM serves in tests, and transformers' results for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams
from support.hf_cases import EXPERTS, SHARED_EXPERT, SIGMOID_EXPERTS, YARN
from support.random_checkpoint import RandomFolder, grouped, latent

NEW = 24
LENGTHS = (1, 7, 40, 64, 150)
"""Tokens of the prompts."""
SIZES: dict[str, Any] = {
    "qk_rope_head_dim": 32,
    "max_position_embeddings": 256,
    "ffn_hidden_size": 72,  # no multiple of 16 per rank, which the plugin pads
}


def served(num_latent_heads: int, num_branches: int, **changes: Any) -> ModelDescription:
    """A tiny model of sizes that the kernels support: latent heads of 64 dims."""
    changes = SIZES | {"kv_lora_rank": 64 * num_latent_heads} | changes
    return latent(num_latent_heads, num_branches, **changes)


CASES: dict[str, ModelDescription] = {
    "MLA": served(1, 1),
    "GLA-2": served(2, 1, tie_embeddings=False),
    "GLA-4": served(4, 1, output_gate=True),
    "MLRA-2": served(4, 2, q_lora_rank=None, query_head_norm=True),
    "MLRA-4": served(4, 4),
    "MLRA-4-gated-untied": served(4, 4, output_gate=True, tie_embeddings=False),
    "MLRA-4-unscaled": served(4, 4, variance_scaling=False, rotary_base=5e5),
    "MLRA-4-absorbed": served(4, 4, qk_nope_head_dim=64),
    "MLRA-4-ahead": served(4, 4, tie_embeddings=False, mtp_num_layers=1),
    # vLLM would take 16 x 4 for the number of its positions, which is 256.
    "MLRA-8-yarn": served(8, 8, v_head_dim=8, **YARN),
    "MLRA-4-experts": served(4, 4, tie_embeddings=False, **SHARED_EXPERT),
    "MLA-experts": served(1, 1, **EXPERTS | {"moe_layer_pattern": (1, 1)}),
    "GLA-2-sigmoid-experts": served(2, 1, **SIGMOID_EXPERTS),
    "MHA": grouped(8, tie_embeddings=False, head_dim=32, max_position_embeddings=256),
    "GQA": grouped(2, rotary_base=5e5, head_dim=32, max_position_embeddings=256),
    "MQA": grouped(1, head_dim=32, max_position_embeddings=256),
}


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, without the end-of-document token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


class GuessableFolder(RandomFolder):
    """A decoder in which the latest token says much of the next one, and a layer of multi-token
    prediction that knows that much: some of its guesses are right."""

    def tensor(self, name: str) -> torch.Tensor:
        """See RandomFolder."""
        tensor = super().tensor(name)
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            return 0.03 * tensor
        if name.endswith("eh_proj.weight"):  # the token's embedding, as the decoder takes it
            return torch.eye(*tensor.shape) + 0.05 * tensor
        return tensor


def export(name: str, folder: Path) -> None:
    """Write one of CASES with random weights and the byte tokenizer."""
    kind = GuessableFolder if CASES[name].mtp_num_layers else RandomFolder
    write_huggingface(kind(CASES[name]), folder, tokenizer="byte", progress=False)


class Reference:
    """Runs an exported folder by transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        )
        self.model.generation_config.eos_token_id = None

    @torch.no_grad()
    def generate(self, prompt: list[int], new: int = NEW) -> list[int]:
        """Greedy continuation."""
        tokens = torch.tensor([prompt])
        whole = self.model.generate(tokens, max_new_tokens=new, do_sample=False)
        return whole[0, len(prompt) :].tolist()

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> list[float]:
        """Log-probability of each token, given the tokens before it, from the second token on."""
        logits = self.model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def references(model: Reference, features: bool) -> dict[str, Any]:
    """transformers' results for the prompts of LENGTHS and of the features' tests.

    Returns:
        `prompts`: `tokens` of the continuation and `log_probs` of prompt and continuation, per
        prompt; `features`: repr of a prompt -> its continuation; `fp8`: results of the project's
        engine with an FP8 cache, per prompt.
    """
    found: dict[str, Any] = {"prompts": [], "features": {}}
    for prompt in prompts(*LENGTHS):
        tokens = model.generate(prompt)
        scores = model.log_probs(prompt + tokens)
        found["prompts"].append({"tokens": tokens, "log_probs": scores})
    if features:
        for job in feature_jobs(Path()):
            if job["name"] in EXACT:
                for prompt in (prompt for batch in job["batches"] for prompt in batch):
                    found["features"][str(prompt)] = model.generate(prompt, job["new"])
        found["fp8"] = [engine_fp8(FEATURES, prompt) for prompt in prompts(*LENGTHS)]
    return found


def engine_fp8(name: str, prompt: list[int]) -> dict[str, Any]:
    """Results of the project's engine with an FP8 cache: `tokens` of the continuation, and
    `log_probs` of the prompt's tokens from the second on."""
    folder = RandomFolder(CASES[name])
    options = LoadOptions(cache_tokens=256, cache_dtype="fp8")
    runner = Runner(load_model(folder.description, folder.tensor, options), 1, 4)
    scores = runner.prefill([Chunk(prompt, 0, [0, 1, 2])], every_row=True)[:-1].log_softmax(-1)
    engine = Engine(runner)
    request = engine.submit(prompt, SamplingParams(max_new_tokens=NEW))
    assert sum(1 for _ in engine.run()) == NEW
    chosen = torch.tensor(prompt[1:], dtype=torch.int64)[:, None]
    return {"tokens": request.output, "log_probs": scores.gather(1, chosen)[:, 0].tolist()}


def equality_jobs(models: Path) -> list[dict[str, Any]]:
    """A job per case, with log-probabilities of prompts and continuations."""
    return [
        {
            "name": name,
            "model": str(models / name),
            "batches": [prompts(*LENGTHS)],
            "new": NEW,
            "scores": True,
        }
        for name in CASES
    ]


EXACT = ("chunked", "prefix", "preempted", "speculative", "cublas")
"""Features of the engine that must not change any token."""
AHEAD = "MLRA-4-ahead"
"""The case with a layer of multi-token prediction."""
FEATURES = "MLRA-4-gated-untied"
"""The case with which features of the engine are tested."""
SHARED_PREFIX = prompts(100, seed=1)[0]
WITH_PREFIX = [
    SHARED_PREFIX[:n] + tail
    for n, tail in zip((100, 96, 70, 33, 20), prompts(9, 1, 30, 50, 5, seed=2), strict=True)
]
LOOKUP = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
"""Speculative decoding by n-grams of the prompt."""


def drafter(folder: str, guesses: int) -> dict[str, Any]:
    """Speculative decoding by a folder's layer of multi-token prediction."""
    return {"method": "eagle", "model": folder, "num_speculative_tokens": guesses}


STRETCHED = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.0,
    }
}
"""YaRN for 512 positions in the config.json of a model with 256."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantization": ({"quantization": "fp8"}, "quantization 'fp8' of latent attention is not"),
    "products": (
        {"additional_config": {"products": "fast"}},
        "products in --additional-config is 'fast'; use one of auto, cublas",
    ),
    "key": (
        {"additional_config": {"prodcts": "cublas"}},
        "--additional-config names 'prodcts'; did you mean products?",
    ),
    "backend": (
        {"attention_backend": "FLASH_ATTN"},
        "--attention-backend is FLASH_ATTN, and latent attention has its own; leave it out",
    ),
    "lora": ({"enable_lora": True}, "LoRA adapters of latent attention are not there"),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "KV connectors and offloading do not know this cache",
    ),
    "block": ({"block_size": 24}, "block size is 24; use a multiple of 16"),
    "tp": ({"tensor_parallel_size": 3}, "tensor parallel size 3 does not fit 8 heads, 4 latent"),
    "pipeline": ({"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported for this"),
    "guesses": (
        {"speculative_config": LOOKUP | {"num_speculative_tokens": 8}},
        "8 speculative tokens; the kernels verify at most 7 a step",
    ),
    "dcp": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "context parallelism is not there for latent attention",
    ),
    "dtype": ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype is 'fp8_e5m2'; use auto or fp8"),
    "sizes": (
        {"hf_overrides": {"kv_lora_rank": 64}},
        "the kernels take latent dims (64, 128, 256, 512), this model has 16",
    ),
    "fields": (
        {"hf_overrides": {"num_latent_heads": 0}},
        "config.json: num_latent_heads is 0; it must be a whole number of at least 1",
    ),
    "length": (
        {"hf_overrides": STRETCHED, "max_model_len": 257},
        "--max-model-len 257 is more than the model's 256 positions; lower it",
    ),
    "pattern": (
        {"hf_overrides": {"rope_layer_types": ["rope", "nope"]}},
        "rope_layer_types names layers without RoPE, which are not there",
    ),
}
"""Options that the plugin refuses, and a part of the error message."""
WRONG_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "surplus": (
        {"hf_overrides": {"output_gate": False}},
        "model.layers.0.self_attn.attn: config.json makes no g_proj.weight",
    ),
    "shape": (
        {"hf_overrides": {"q_lora_rank": 16}},
        "q_a_layernorm.weight is (32,) and config.json makes it (16,)",
    ),
    "tied": (
        {"hf_overrides": {"tie_word_embeddings": True}},
        "config.json ties the embedding to the output layer, and lm_head.weight is another",
    ),
    "vocabulary": (
        {"hf_overrides": {"vocab_size": 300}},
        "weight is (257, 64) and config.json makes it (300, 64)",
    ),
    "mlp": (
        {"hf_overrides": {"intermediate_size": 80}},
        "model.layers.0.mlp: down_proj.weight is (64, 72) and config.json makes its dim 1 80",
    ),
}
"""Fields of config.json that the weights contradict, and a part of the error message."""
RANKS = (1, 2, 4, 8)


def feature_jobs(models: Path) -> list[dict[str, Any]]:
    """Jobs for the features of vLLM's scheduler and cache (chunked prefill, prefix caching,
    preemption, FP8, speculation), and for refused options."""
    model = str(models / FEATURES)
    job = {"model": model, "new": NEW}
    ahead = str(models / AHEAD)
    small = {"block_size": 32}
    return [
        {
            **job,
            "name": "chunked",
            "options": {"max_num_batched_tokens": 32, "max_num_seqs": 6},
            "batches": [prompts(5, 150, 33, 64, 100, 1)],
        },
        {
            **job,
            "name": "prefix",
            "options": small | {"enable_prefix_caching": True},
            "batches": [[SHARED_PREFIX], WITH_PREFIX],
        },
        {
            **job,
            "name": "preempted",
            "options": small | {"num_gpu_blocks_override": 11},
            "batches": [prompts(60, 61, 62, 63, 50, seed=3)],
            "new": 40,
        },
        {
            **job,
            "name": "cublas",
            "options": {"additional_config": {"products": "cublas"}},
            "batches": [prompts(33, seed=4), prompts(1, 64, seed=6), prompts(9, 2, 40, seed=7)],
        },
        {
            **job,
            "name": "fp8",
            "options": {"kv_cache_dtype": "fp8"},
            "batches": [prompts(*LENGTHS)],
            "scores": True,
        },
        {
            **job,
            "name": "speculative",
            "options": {"speculative_config": LOOKUP},
            "batches": [[[*p, *p] for p in prompts(6, 20, 50, seed=4)]],
        },
        {
            **job,
            "name": "multi-token",
            "model": ahead,
            "options": {"speculative_config": drafter(ahead, 2)},
            "batches": [prompts(*LENGTHS)],
        },
        *(
            {
                "name": f"drafter-of-{name}",
                "model": served,
                "options": {"speculative_config": drafter(model, 1)},
                "batches": [],
            }
            for name, served in {"none": model, "another": ahead}.items()
        ),
        *(
            {
                "name": f"drafter-{name}",
                "model": ahead,
                "options": {"speculative_config": config},
                "batches": [],
            }
            for name, config in {
                "small": {"model": str(models / "MLA"), "num_speculative_tokens": 1},
                "quantised": drafter(ahead, 1) | {"quantization": "fp8"},
            }.items()
        ),
        {
            **job,
            "name": "dummy",
            "options": small | {"load_format": "dummy", "hf_overrides": STRETCHED},
            "batches": [[[1, 2, 3]]],
            "page_bytes": RANKS,
        },
        *(
            {**job, "name": f"refused-{name}", "options": options, "batches": []}
            for name, (options, _) in (REFUSED | WRONG_WEIGHTS).items()
        ),
    ]
