"""A model as the paper's research code saves and runs it, written from the method's definition.

Shares no code with the package. Holds random weights with the research code's names and shapes, and
the forward pass in float64, head by head. Letters: s tokens, d hidden size, h heads, L latent
heads, N branches, G = L / N head groups.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

EPS, BASE = 1e-6, 10000.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a tiny model; with L = 0: MHA, MQA or GQA with `groups` key-value heads."""

    L: int = 4
    N: int = 4
    gated: bool = False
    groups: int = 0
    tied: bool = True
    layers: int = 2
    d: int = 64
    ffn: int = 96
    h: int = 8
    q_rank: int = 32
    kv_rank: int = 64
    nope: int = 16
    rope: int = 8
    vocab: int = 128

    @property
    def per_latent(self) -> int:
        """Query heads per latent head."""
        return self.h * self.N // self.L

    def config(self) -> dict:
        """The research code's config.json."""
        config = {
            "n_layer": self.layers,
            "n_head": self.h,
            "n_embd": self.d,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
        }
        if self.L:
            config |= {"q_lora_rank": self.q_rank, "kv_lora_rank": self.kv_rank}
            config |= {"qk_nope_head_dim": self.nope, "qk_rope_head_dim": self.rope}
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight."""
        d, c, l = self.d, self.nope, self.kv_rank // max(self.L, 1)
        attention: dict[str, tuple[int, ...]]
        if not self.L:
            attention = {"c_q.weight": (self.h * c, d)}
            attention |= dict.fromkeys(("c_k.weight", "c_v.weight"), (self.groups * c, d))
        else:
            attention = {
                "q_a_proj.weight": (self.q_rank, d),
                "q_a_layernorm.weight": (self.q_rank,),
                "q_b_proj.weight": (self.h * (c + self.rope), self.q_rank),
                "kv_a_proj_with_mqa.weight": (self.kv_rank + self.rope, d),
            }
            out = self.per_latent * 2 * c
            if self.L == 1:
                attention |= {"kv_a_layernorm.weight": (l,), "kv_b_proj.weight": (out, l)}
            elif (self.L, self.N) == (2, 1):
                for i in (1, 2):
                    attention[f"kv_a_layernorm_{i}.weight"] = (l,)
                    attention[f"kv_b_proj_{i}.weight"] = (out, l)
            else:
                attention |= {f"kv_a_layernorms.{i}.weight": (l,) for i in range(self.L)}
                attention["kv_b_proj"] = (self.L, l, out)
        if self.gated:
            attention["gated_proj.weight"] = (self.h * c, d)
        attention["c_proj.weight"] = (d, self.h * c)
        shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (self.vocab, d)}
        for i in range(self.layers):
            p = f"transformer.h.{i}."
            shapes |= {f"{p}attn.{name}": shape for name, shape in attention.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{p}{norm}.weight"] = (d,)
            for name in ("c_fc1", "c_fc2"):
                shapes[f"{p}mlp.{name}.weight"] = (self.ffn, d)
            shapes[f"{p}mlp.c_proj.weight"] = (d, self.ffn)
        shapes["layernorm.weight"] = (d,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, d)
        return shapes

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        """Random weights. A tied model stores the embedding twice, as the research code does."""
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in self.shapes().items():
            w = torch.randn(shape, generator=generator)
            weights[name] = w * 0.2 if len(shape) > 1 else 1 + 0.3 * w
        if self.tied:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        return weights


VARIANTS: dict[str, Sizes] = {
    "MLA": Sizes(1, 1),
    "GLA-2": Sizes(2, 1),
    "GLA-4": Sizes(4, 1),
    "MLRA-2": Sizes(4, 2),
    "MLRA-4": Sizes(4, 4),
    "MLA gated": Sizes(1, 1, gated=True),
    "GLA-2 gated": Sizes(2, 1, gated=True),
    "MLRA-2 gated": Sizes(4, 2, gated=True, tied=False),
    "MLRA-4 gated": Sizes(4, 4, gated=True),
    "MHA": Sizes(0, 0, groups=8),
    "MQA": Sizes(0, 0, groups=1, tied=False),
    "GQA": Sizes(0, 0, groups=2),
    "GQA gated": Sizes(0, 0, groups=2, gated=True),
}


def save_research(folder: Path, sizes: Sizes, weights: dict | None = None) -> Path:
    """Write a research folder with one `.bin` file; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes.config()))
    torch.save(sizes.weights() if weights is None else weights, folder / "pytorch_model.bin")
    return folder


def logits(sizes: Sizes, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of one sequence: ids `[s]` -> `[s, vocab]`, float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["transformer.wte.weight"][tokens]
    for i in range(sizes.layers):
        p = f"transformer.h.{i}."
        layer = {name.removeprefix(p): t for name, t in w.items() if name.startswith(p)}
        a = {n.removeprefix("attn."): t for n, t in layer.items() if n.startswith("attn.")}
        normed = _norm(x, layer["input_layernorm.weight"])
        heads = _latent(sizes, a, normed) if sizes.L else _grouped(sizes, a, normed)
        if sizes.gated:
            heads = heads * torch.sigmoid(normed @ a["gated_proj.weight"].T)
        x = x + heads @ a["c_proj.weight"].T
        normed = _norm(x, layer["post_attention_layernorm.weight"])
        gate = normed @ layer["mlp.c_fc1.weight"].T
        up = normed @ layer["mlp.c_fc2.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.c_proj.weight"].T
    x = _norm(x, w["layernorm.weight"])
    return x @ w["transformer.wte.weight" if sizes.tied else "lm_head.weight"].T


def _latent(sizes: Sizes, a: dict[str, Tensor], x: Tensor) -> Tensor:
    """Attention outputs of all heads, `[s, h * d_h]`."""
    c, l, G = sizes.nope, sizes.kv_rank // sizes.L, sizes.L // sizes.N
    q = _norm(x @ a["q_a_proj.weight"].T, a["q_a_layernorm.weight"])
    q = q * math.sqrt(sizes.d / sizes.q_rank) @ a["q_b_proj.weight"].T
    compressed = x @ a["kv_a_proj_with_mqa.weight"].T
    k_rope = _rotate(compressed[:, sizes.kv_rank :])
    out = torch.zeros(x.size(0), sizes.h, c, dtype=x.dtype)
    for latent in range(sizes.L):
        norm, up = _latent_weights(sizes, a, latent)
        part = compressed[:, latent * l : (latent + 1) * l]
        expanded = _norm(part, norm) * math.sqrt(sizes.d / l) @ up
        group = latent % G
        for j in range(sizes.per_latent):
            head = group * sizes.per_latent + j
            key, value = expanded[:, j * 2 * c : (j + 1) * 2 * c].split(c, dim=1)
            width = c + sizes.rope
            query = q[:, head * width : (head + 1) * width]
            query = torch.cat((query[:, :c], _rotate(query[:, c:])), dim=1)
            key = torch.cat((key, k_rope), dim=1)
            out[:, head] += _attend(query, key, value)
    return (out / math.sqrt(sizes.N)).flatten(1)


def _latent_weights(sizes: Sizes, a: dict[str, Tensor], latent: int) -> tuple[Tensor, Tensor]:
    """Norm weight `[l]` and up-projection `[l, per_latent * 2 d_h]` of one latent head."""
    if sizes.L == 1:
        return a["kv_a_layernorm.weight"], a["kv_b_proj.weight"].T
    if (sizes.L, sizes.N) == (2, 1):
        i = latent + 1
        return a[f"kv_a_layernorm_{i}.weight"], a[f"kv_b_proj_{i}.weight"].T
    return a[f"kv_a_layernorms.{latent}.weight"], a["kv_b_proj"][latent]


def _grouped(sizes: Sizes, a: dict[str, Tensor], x: Tensor) -> Tensor:
    c = sizes.nope
    q, k, v = (x @ a[f"c_{name}.weight"].T for name in "qkv")
    out = []
    for head in range(sizes.h):
        kv = head // (sizes.h // sizes.groups)
        query = _rotate(q[:, head * c : (head + 1) * c])
        key = _rotate(k[:, kv * c : (kv + 1) * c])
        out.append(_attend(query, key, v[:, kv * c : (kv + 1) * c]))
    return torch.cat(out, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.T / math.sqrt(q.size(1))
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def _rotate(x: Tensor) -> Tensor:
    """Pairs (i, i + dim / 2) of `[s, dim]` turned by position * base^(-2 i / dim)."""
    half = x.size(1) // 2
    inverse = BASE ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.size(0), dtype=x.dtype)[:, None] * inverse
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        (
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ),
        dim=1,
    )
