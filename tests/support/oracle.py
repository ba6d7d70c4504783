"""The oracle: Multi-Head Low-Rank Attention written out one sequence, head and branch at a time.

It follows the method's definition and shares no code with the package: nothing is batched, fused
or absorbed, and every weight is used as ``x @ W`` with W of shape [in, out]. The second half of the
file reads the package's parameters as such weights.

Letters: s tokens; d hidden size; h query heads; L latent heads; N branches; G = L / N head groups;
d_q the query rank; d_c the key-value rank; d_l = d_c / L the latent dim; d_h, d_r the head dims
without and with rotary position; d_v the value head dim.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """YaRN in DeepSeek's form: extends a context of `original` tokens by `factor`.

    Pairs that turn more than `fast` times over the original context keep their frequency; pairs
    that turn less than `slow` times have it divided by `factor`; a linear ramp lies between. The
    squared temperature of `all_dim` scales all logits. Rotated dims of queries and keys are scaled
    by the quotient of the temperatures of `mscale` and `all_dim`.
    """

    factor: float
    original: int
    fast: float
    slow: float
    mscale: float
    all_dim: float

    def stretched(self, i: int, dim: int, base: float) -> float:
        """The frequency of pair i."""
        frequency = base ** (-2.0 * i / dim)
        first, last = (
            dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.fast, self.slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        share = min(max((i - first) / max(last - first, 1e-3), 0.0), 1.0)
        return frequency * (1 - share) + frequency / self.factor * share

    def temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class OracleConfig:
    """Sizes and switches of one attention layer."""

    hidden: int
    heads: int
    qk_nope: int
    qk_rope: int
    value: int
    kv_rank: int
    latents: int
    branches: int
    q_rank: int | None = None
    head_norm: bool = False
    gate: bool = False
    scaling: bool = True
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    yarn: Yarn | None = None

    @property
    def groups(self) -> int:
        return self.latents // self.branches

    @property
    def latent_dim(self) -> int:
        return self.kv_rank // self.latents

    @property
    def heads_per_latent(self) -> int:
        return self.heads // self.groups


def rms_norm(vector: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of one vector."""
    return weight * vector / torch.sqrt((vector * vector).mean() + eps)


def rotate(vector: Tensor, position: float, base: float, yarn: Yarn | None = None) -> Tensor:
    """Turn pair (i, i + d_r / 2) of one vector by the angle position * base^(-2 i / d_r)."""
    dim = vector.shape[0]
    if dim == 0:
        return vector
    half = dim // 2
    first, second = [], []
    for i in range(half):
        angle = position * base ** (-2.0 * i / dim)
        if yarn is not None:
            angle = position * yarn.stretched(i, dim, base)
        cos, sin = math.cos(angle), math.sin(angle)
        first.append(vector[i] * cos - vector[i + half] * sin)
        second.append(vector[i + half] * cos + vector[i] * sin)
    turned = torch.stack(first + second)
    if yarn is None:
        return turned
    return turned * yarn.temperature(yarn.mscale) / yarn.temperature(yarn.all_dim)


def mlra_oracle(
    x: Tensor,
    weights: dict[str, Tensor],
    config: OracleConfig,
    *,
    query_positions: list[float] | None = None,
    key_positions: list[float] | None = None,
    allowed: Tensor | None = None,
    logits: dict[tuple[int, int], list[float]] | None = None,
) -> Tensor:
    """The layer's output [s, d] for one sequence x [s, d].

    ``allowed[i, j]`` says whether token i may attend to token j; default: j <= i. Positions default
    to 0 .. s - 1, separately for queries and keys, so that a test can shift one of them.
    ``logits`` receives all scores: (branch, head) -> list.
    """
    c = config
    x = x.double()
    w = {name: weight.double() for name, weight in weights.items()}
    tokens = x.shape[0]
    query_positions = list(range(tokens)) if query_positions is None else query_positions
    key_positions = list(range(tokens)) if key_positions is None else key_positions
    if allowed is None:
        allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    latent_scale = math.sqrt(c.hidden / c.latent_dim) if c.scaling else 1.0
    branch_scale = c.branches**-0.5 if c.scaling else 1.0
    softmax_scale = (c.qk_nope + c.qk_rope) ** -0.5
    if c.yarn is not None:
        softmax_scale *= c.yarn.temperature(c.yarn.all_dim) ** 2

    queries = [_queries(x[i], w, c, query_positions[i]) for i in range(tokens)]  # [s][h][d_h + d_r]
    latents, rope_keys = [], []  # [s][L][d_l], [s][d_r]
    for j in range(tokens):
        down = x[j] @ w["kv_down"]
        parts = [
            rms_norm(
                down[latent * c.latent_dim : (latent + 1) * c.latent_dim],
                w[f"kv_norm.{latent}"],
                c.norm_eps,
            )
            * latent_scale
            for latent in range(c.latents)
        ]
        latents.append(parts)
        rope_keys.append(rotate(down[c.kv_rank :], key_positions[j], c.rope_base, c.yarn))

    head_outputs = []  # [h] of [s, d_v]
    for head in range(c.heads):
        group = head // c.heads_per_latent
        place = head % c.heads_per_latent  # of this head among the heads of its latents
        total = torch.zeros(tokens, c.value, dtype=x.dtype)
        for branch in range(c.branches):
            latent = branch * c.groups + group
            width = c.qk_nope + c.value
            up = w[f"kv_up.{latent}"][:, place * width : (place + 1) * width]
            keys = [
                torch.cat([latents[j][latent] @ up[:, : c.qk_nope], rope_keys[j]])
                for j in range(tokens)
            ]
            values = [latents[j][latent] @ up[:, c.qk_nope :] for j in range(tokens)]
            rows = []
            for i in range(tokens):
                seen = [j for j in range(tokens) if allowed[i, j]]
                scores = torch.stack([queries[i][head] @ keys[j] for j in seen]) * softmax_scale
                if logits is not None:
                    logits.setdefault((branch, head), []).extend(scores.tolist())
                probabilities = torch.exp(scores - scores.max().detach())
                probabilities = probabilities / probabilities.sum()
                rows.append(probabilities @ torch.stack([values[j] for j in seen]))
            total = total + torch.stack(rows)
        head_outputs.append(total * branch_scale)

    attention = torch.cat(head_outputs, dim=1)  # [s, h * d_v]
    if c.gate:
        attention = attention / (1.0 + torch.exp(-(x @ w["gate"])))
    return attention @ w["out"]


def _queries(token: Tensor, w: dict[str, Tensor], c: OracleConfig, position: float) -> list[Tensor]:
    """The query of every head for one token, with the rotary part rotated to ``position``."""
    if c.q_rank is None:
        flat = token @ w["q"]
    else:
        scale = math.sqrt(c.hidden / c.q_rank) if c.scaling else 1.0
        flat = (rms_norm(token @ w["q_down"], w["q_norm"], c.norm_eps) * scale) @ w["q_up"]
    width = c.qk_nope + c.qk_rope
    heads = []
    for head in range(c.heads):
        own = slice(head * width, (head + 1) * width)
        query = flat[own]
        if c.head_norm:
            query = rms_norm(query, w["head_norm"][own], c.norm_eps)
        turned = rotate(query[c.qk_nope :], position, c.rope_base, c.yarn)
        heads.append(torch.cat([query[: c.qk_nope], turned]))
    return heads


# The package's parameters, read as the oracle's weights.


def config_values(config: OracleConfig) -> dict:
    """The same layer in the field names of the package's configuration, on a CPU, in float32."""
    c = config
    return {
        "num_layers": 2,
        "hidden_size": c.hidden,
        "ffn_hidden_size": 32,
        "num_attention_heads": c.heads,
        "qk_head_dim": c.qk_nope,
        "qk_pos_emb_head_dim": c.qk_rope,
        "v_head_dim": c.value,
        "q_lora_rank": c.q_rank,
        "kv_lora_rank": c.kv_rank,
        "num_latent_heads": c.latents,
        "num_branches": c.branches,
        "query_head_norm": c.head_norm,
        "output_gate": c.gate,
        "variance_scaling": c.scaling,
        "layernorm_epsilon": c.norm_eps,
        "rotary_base": c.rope_base,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
    }


def parameter_shapes(config: OracleConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the package's layer, each linear as [out, in]."""
    c = config
    query = c.heads * (c.qk_nope + c.qk_rope)
    shapes: dict[str, tuple[int, ...]] = {}
    if c.q_rank is None:
        shapes["linear_q_proj"] = (query, c.hidden)
    else:
        shapes["linear_q_down_proj"] = (c.q_rank, c.hidden)
        shapes["q_norm"] = (c.q_rank,)
        shapes["linear_q_up_proj"] = (query, c.q_rank)
    if c.head_norm:
        shapes["query_head_norm"] = (query,)
    shapes["linear_kv_down_proj"] = (c.kv_rank + c.qk_rope, c.hidden)
    shapes["kv_norm"] = (c.kv_rank,)
    shapes["linear_kv_up_proj"] = (c.branches, c.heads, c.qk_nope + c.value, c.latent_dim)
    if c.gate:
        shapes["linear_gate_proj"] = (c.heads * c.value, c.hidden)
    shapes["linear_proj"] = (c.hidden, c.heads * c.value)
    return shapes


def oracle_weights(parameters: dict[str, Tensor], config: OracleConfig) -> dict[str, Tensor]:
    """The package's parameters as the oracle's weights; gradients flow back to the parameters."""
    c, p = config, parameters
    weights = {"kv_down": p["linear_kv_down_proj"].T, "out": p["linear_proj"].T}
    if c.q_rank is None:
        weights["q"] = p["linear_q_proj"].T
    else:
        weights["q_down"] = p["linear_q_down_proj"].T
        weights["q_norm"] = p["q_norm"]
        weights["q_up"] = p["linear_q_up_proj"].T
    if c.head_norm:
        weights["head_norm"] = p["query_head_norm"]
    for latent in range(c.latents):
        branch, group = latent // c.groups, latent % c.groups
        columns = slice(latent * c.latent_dim, (latent + 1) * c.latent_dim)
        weights[f"kv_norm.{latent}"] = p["kv_norm"][columns]
        first = group * c.heads_per_latent
        served = [p["linear_kv_up_proj"][branch, first + i].T for i in range(c.heads_per_latent)]
        weights[f"kv_up.{latent}"] = torch.cat(served, dim=1)
    if c.gate:
        weights["gate"] = p["linear_gate_proj"].T
    return weights


@dataclass(frozen=True)
class Reference:
    """Random inputs of one case and the oracle's results for them, all in float64."""

    x: Tensor
    """[s, b, d]"""
    upstream: Tensor
    """[s, b, d], the gradient of the output."""
    parameters: dict[str, Tensor]
    output: Tensor
    x_grad: Tensor
    grads: dict[str, Tensor]
    largest: Tensor
    """[N, h], the largest score of each branch and head over all sequences."""


@cache
def reference(
    config: OracleConfig,
    tokens: int,
    batch: int,
    documents: tuple[int, ...] = (),
    still: bool = False,
) -> Reference:
    """Output and every gradient of a layer with parameters N(0, 0.2) and norms around one.

    The random numbers are exact in float32, so that both precisions start from the same numbers.
    With ``documents``, the lengths of a sequence's documents, no token attends to another document.
    ``still``: a layer that rotates nothing, as if every token were the first.
    """
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    parameters = {
        name: 0.2 * draw(*shape) + (1.0 if name.endswith("norm") else 0.0)
        for name, shape in parameter_shapes(config).items()
    }
    parameters = {name: p.float().double().requires_grad_() for name, p in parameters.items()}
    x = draw(tokens, batch, config.hidden).requires_grad_()
    upstream = draw(tokens, batch, config.hidden)
    allowed = document_mask(tokens, documents) if documents else None
    weights = oracle_weights(parameters, config)
    positions = [0.0] * tokens if still else None
    logits: dict[tuple[int, int], list[float]] = {}
    output = torch.stack(
        [
            mlra_oracle(
                x[:, n],
                weights,
                config,
                query_positions=positions,
                key_positions=positions,
                allowed=allowed,
                logits=logits,
            )
            for n in range(batch)
        ],
        dim=1,
    )
    (output * upstream).sum().backward()
    return Reference(
        x=x.detach(),
        upstream=upstream,
        parameters={name: p.detach() for name, p in parameters.items()},
        output=output.detach(),
        x_grad=x.grad,
        grads={name: p.grad for name, p in parameters.items()},
        largest=torch.tensor(
            [[max(logits[b, h]) for h in range(config.heads)] for b in range(config.branches)]
        ),
    )


def document_mask(tokens: int, documents: tuple[int, ...]) -> Tensor:
    """[s, s]: whether token i may attend to token j, in documents of these lengths."""
    assert sum(documents) == tokens
    which = [n for n, length in enumerate(documents) for _ in range(length)]
    rows = [[j <= i and which[i] == which[j] for j in range(tokens)] for i in range(tokens)]
    return torch.tensor(rows)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected number."""
    assert actual.shape == expected.shape
    largest = expected.abs().max()
    assert largest > 0
    return ((actual.double() - expected).abs().max() / largest).item()
