"""The cost of decoding at a context length: cache bytes per device, and a floor of ms per token.

The floor counts loading weights and cache once, and the exchange between devices. Kernels, sampling
and scheduling take additional time, for every attention alike. Letters of cost/flops.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from megatron_mlra.cost.cache import kv_cache_elements
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.gpus import GPU, Assumptions


@dataclass(frozen=True)
class Decoding:
    """One attention at one context length on `devices` GPUs."""

    name: str
    context: int
    batch: int
    devices: int
    kv_bytes_per_token: int
    """Cached bytes per token of all layers on one device."""
    cache_gib: float
    """Cache of the whole batch on one device, in GiB."""
    weights_ms: float
    cache_ms: float
    exchange_ms: float

    @property
    def floor_ms(self) -> float:
        """Least milliseconds per token."""
        return self.weights_ms + self.cache_ms + self.exchange_ms

    def to_json(self) -> dict:
        return asdict(self) | {"floor_ms": self.floor_ms}


@dataclass(frozen=True)
class Way:
    """An attention, and how its cache is cut over devices."""

    name: str
    shape: ModelDescription
    heads: int
    """Devices over which heads or latents are cut; the other factor cuts the cache's tokens."""
    gathered: int
    """Numbers per sequence and layer that are gathered before the core."""
    returned: int
    """Numbers per sequence and layer that are returned after the core."""
    collectives: int
    """Collectives of a layer's attention; the MLP adds one."""


def ways(shape: ModelDescription, devices: int) -> list[Way]:
    """This model, and alternatives with the same heads and layers and another attention.

    The alternatives: MLA with all latents on every device; MLA with the cache's tokens cut over
    devices (decode context parallelism, which needs no retraining and merges softmaxes over
    devices); GLA-4; GQA with 8 key/value heads.
    """
    if shape.attention != "mlra":
        c = shape.head_dim
        d_c, d_h, d_r, d_q = 4 * c, c, c // 2, None
    else:
        d_c = shape.kv_lora_rank
        d_h, d_r, d_q = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.q_lora_rank
    d_v = shape.v_head_dim or d_h
    latent = {
        "attention": "mlra",
        "q_lora_rank": d_q,
        "kv_lora_rank": d_c,
        "qk_nope_head_dim": d_h,
        "qk_rope_head_dim": d_r,
        "v_head_dim": d_v,
    }

    def family(L: int, N: int) -> ModelDescription:
        return replace(shape, **latent, num_latent_heads=L, num_branches=N)

    groups = math.gcd(8, shape.num_attention_heads)
    if shape.attention == "gqa":
        groups = shape.num_query_groups
    gqa = replace(
        shape, attention="gqa", num_query_groups=groups, head_dim=d_h, rope_type="rope",
        query_head_norm=False, qk_layernorm=shape.qk_layernorm or shape.query_head_norm,
    )  # fmt: skip
    found = [
        _latent_way("MLRA-4", family(4, 4), devices),
        Way("MLA", family(1, 1), devices, 0, 0, 1),
        _sharded_tokens("MLA, tokens cut (DCP)", family(1, 1), 1),
        _latent_way("GLA-4", family(4, 1), devices),
        Way(f"GQA, {groups} KV heads", gqa, devices, 0, 0, 1),
    ]
    if devices > 4:
        name = f"MLRA-4, tokens cut x{devices // 4}"
        found.insert(1, _sharded_tokens(name, family(4, 4), 4))
    own = shape.attention_variant.removesuffix(" gated")
    if own not in {way.name for way in found} and shape.attention == "mlra":
        found.insert(0, _latent_way(own, shape, devices))
    return found


def _latent_way(name: str, shape: ModelDescription, devices: int) -> Way:
    """Latent heads over devices: queries to the latents, branch outputs back to the heads."""
    h, d_v = shape.num_attention_heads, shape.v_head_dim
    if shape.num_branches == 1:
        # Every head has one latent, on the head's own device: nothing is exchanged.
        return Way(name, shape, devices, 0, 0, 1)
    return Way(
        name, shape, devices, h * (shape.qk_nope_head_dim + shape.qk_rope_head_dim), h * d_v, 3
    )


def _sharded_tokens(name: str, shape: ModelDescription, heads: int) -> Way:
    """The cache's tokens over devices: absorbed queries are sent, partial outputs and their LSE are
    returned."""
    h, l, d_r = shape.num_attention_heads, shape.latent_dim, shape.qk_rope_head_dim
    return Way(name, shape, heads, h * (l + d_r), h * (l + 1), 4)


def decode(
    way: Way, context: int, batch: int, devices: int, gpu: GPU, assume: Assumptions
) -> Decoding:
    """The floor of a step that decodes a token for each of `batch` sequences, in bfloat16."""
    e, shape = 2, way.shape
    cut = devices // way.heads
    elements = kv_cache_elements(shape, way.heads)
    per_token = -(-shape.num_layers * elements * e // cut)
    cache = per_token * context * batch
    rate = gpu.memory_gb_s * 1e9 * assume.bandwidth
    weights = e * (parameters(shape).active - (0 if shape.tie_embeddings else _embedding(shape)))
    sent = e * batch * shape.num_layers * (way.gathered + way.returned) * (devices - 1) / devices
    sent += 2 * 2 * e * batch * shape.num_layers * shape.hidden_size * (devices - 1) / devices
    exchange = sent / assume.sends(gpu, devices) if devices > 1 else 0.0
    if devices > 1:
        exchange += shape.num_layers * (way.collectives + 1) * assume.collective_us * 1e-6
    return Decoding(
        name=way.name,
        context=context,
        batch=batch,
        devices=devices,
        kv_bytes_per_token=per_token,
        cache_gib=cache / 2**30,
        weights_ms=1e3 * weights / devices / rate,
        cache_ms=1e3 * cache / rate,
        exchange_ms=1e3 * exchange,
    )


def _embedding(shape: ModelDescription) -> int:
    return shape.embedding_rows * shape.hidden_size
