"""GTA, MFA and TPA against a loop over heads in float64, and under tensor parallelism."""

import math

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import build_module

from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.launch.ports import reserve_port
from megatron_mlra.layers.baselines.attention import baseline_attention_spec
from megatron_mlra.layers.baselines.config import BaselineConfig

S, B = 7, 2
# h 4 heads, d 20; no two sizes coincide, and all of them divide by 2.
KINDS = {
    "gta": {"kv_channels": 10, "num_query_groups": 2, "qk_pos_emb_head_dim": 4},
    "mfa": {"kv_channels": 6, "q_lora_rank": 14},
    "tpa": {"kv_channels": 6, "tpa_q_rank": 3, "tpa_kv_rank": 2},
}
# The query norm of MFA computes its statistics in float32.
TOLERANCE = {"gta": 1e-12, "mfa": 1e-6, "tpa": 1e-12}


def config_of(kind: str, **overrides) -> BaselineConfig:
    values = {
        "num_layers": 2,
        "hidden_size": 20,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "attention": kind,
        "init_method_std": 0.3,
        "zero_init_output": False,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.float64,
    }
    return BaselineConfig(**(values | KINDS.get(kind, {}) | overrides))


def build(config: BaselineConfig, tp_group, alone) -> torch.nn.Module:
    torch.manual_seed(5)
    groups = ProcessGroupCollection(tp=tp_group, cp=alone)
    attention = build_module(
        baseline_attention_spec(config), config=config, layer_number=1, pg_collection=groups
    )
    if hasattr(attention, "q_norm"):
        weight = attention.q_norm.weight
        whole = torch.linspace(0.5, 1.5, config.q_lora_rank, dtype=weight.dtype)
        with torch.no_grad():
            weight.copy_(whole.chunk(tp_group.size())[tp_group.rank()])
    return attention


@pytest.fixture(scope="module")
def alone():
    """The process group of a world of one."""
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    """Half-split RoPE of one vector, pair by pair."""
    half = len(x) // 2
    out = [None] * len(x)
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return torch.stack(out)


def head_vectors(kind: str, config: BaselineConfig, w: dict, x: torch.Tensor, t: int, i: int):
    """Query, key and value of head i for the token x at position t."""
    c, h = config.kv_channels, config.num_attention_heads
    if kind == "gta":
        rope = config.qk_pos_emb_head_dim
        group = i // (h // config.num_query_groups)
        q = w["linear_q_proj"][i * c : (i + 1) * c] @ x
        kv = w["linear_kv_proj"][group * c : (group + 1) * c] @ x
        k_rope = rotate(w["linear_k_rope_proj"] @ x, t)
        query = torch.cat((q[: c - rope], rotate(q[c - rope :], t)))
        return query, torch.cat((kv[: c - rope], k_rope)), kv
    if kind == "mfa":
        c_q = w["linear_q_down_proj"] @ x
        c_q = c_q / (c_q.square().mean() + 1e-6).sqrt() * w["q_norm"]
        kv = w["linear_kv_proj"] @ x
        query = w["linear_q_up_proj"][i * c : (i + 1) * c] @ c_q
        return rotate(query, t), rotate(kv[:c], t), kv[c:]
    vectors = []
    for name, rank in (
        ("q", config.tpa_q_rank),
        ("k", config.tpa_kv_rank),
        ("v", config.tpa_kv_rank),
    ):
        total = 0
        for r in range(rank):
            number = w[f"linear_{name}_head_factors"][i * rank + r] @ x
            vector = w[f"linear_{name}_dim_factors"][r * c : (r + 1) * c] @ x
            total = total + number * (vector if name == "v" else rotate(vector, t))
        vectors.append(total / rank)
    return tuple(vectors)


def oracle(kind: str, config: BaselineConfig, w: dict, x: torch.Tensor) -> torch.Tensor:
    """`[s, b, d]` -> `[s, b, d]`, one query at a time."""
    s, b, _ = x.shape
    c, rows = config.kv_channels, []
    for n in range(b):
        heads = []
        for i in range(config.num_attention_heads):
            qkv = [head_vectors(kind, config, w, x[t, n], t, i) for t in range(s)]
            outs = []
            for t in range(s):
                scores = torch.stack([qkv[t][0] @ qkv[u][1] for u in range(t + 1)]) / math.sqrt(c)
                p = scores.softmax(0)
                outs.append(sum(p[u] * qkv[u][2] for u in range(t + 1)))
            heads.append(torch.stack(outs))
        rows.append(torch.cat(heads, dim=-1) @ w["linear_proj"].T)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_every_gradient_equal_the_oracles(kind, recompute, alone, monkeypatch):
    extra = {}
    if recompute:
        extra = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        # Megatron saves and restores the CUDA random state around recomputation.
        from megatron.core.tensor_parallel import random

        monkeypatch.setattr(random, "_get_all_rng_states", lambda: ())
        monkeypatch.setattr(random, "_set_all_rng_states", lambda *_: None)
    config = config_of(kind, **extra)
    attention = build(config, alone, alone)
    x = torch.randn(S, B, config.hidden_size, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(S, B, config.hidden_size, dtype=torch.float64)
    out, bias = attention(x, None)
    assert bias is None
    (out * upstream).sum().backward()

    weights = {
        name.removesuffix(".weight"): p.detach().clone().requires_grad_()
        for name, p in attention.named_parameters()
    }
    x2 = x.detach().clone().requires_grad_()
    expected = oracle(kind, config, weights, x2)
    (expected * upstream).sum().backward()
    assert_close(out, expected, TOLERANCE[kind], "output")
    assert_close(x.grad, x2.grad, TOLERANCE[kind], "x")
    for name, p in attention.named_parameters():
        grad = weights[name.removesuffix(".weight")].grad
        assert grad.abs().max() > 0, name
        assert_close(p.grad, grad, TOLERANCE[kind], name)


def assert_close(actual, expected, tolerance, what) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_match_the_accounting_by_name(kind, alone):
    config = config_of(kind)
    counted = parameters(from_megatron_args(config, vocab_size=128, dtype="float32"))
    expected = counted.attention | counted.attention_norms
    real = {n.removesuffix(".weight"): p for n, p in build(config, alone, alone).named_parameters()}
    assert {name: p.numel() for name, p in real.items()} == expected


def test_initialisation(alone):
    zero = build(config_of("gta", zero_init_output=True), alone, alone)
    assert not zero.linear_proj.weight.any()
    assert config_of("gta", zero_init_output=True).output_layer_init_method is torch.nn.init.zeros_
    tpa = build(config_of("tpa"), alone, alone)
    for name, p in tpa.named_parameters():
        if "factors" in name:
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.8 * bound < p.abs().max() <= bound, name


def test_gqa_is_megatrons_own():
    assert (
        baseline_attention_spec(config_of("gqa", kv_channels=6, num_query_groups=2)).module
        is SelfAttention
    )


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("mha", {}, "attention is 'mha'; use one of gqa, gta, mfa, tpa, or mlra"),
        ("gta", {"num_query_groups": 3}, "num_query_groups 3 does not divide .* 4; use 1"),
        ("gta", {"qk_pos_emb_head_dim": 10}, "must be less than kv_channels 10; use 5"),
        ("mfa", {"kv_channels": 7}, "kv_channels 7 is odd and RoPE rotates pairs; use 8"),
        ("mfa", {"q_lora_rank": None}, "needs q_lora_rank"),
        ("tpa", {"tpa_q_rank": 0}, "tpa_q_rank is 0; use at least 1"),
        ("gta", {"tensor_model_parallel_size": 4}, "does not divide num_query_groups 2 .* size 2"),
        ("mfa", {"tensor_model_parallel_size": 4}, "does not divide q_lora_rank 14 .* size 2"),
        (
            "tpa",
            {"tensor_model_parallel_size": 3},
            "does not divide num_attention_heads 4 .* size 2",
        ),
        (
            "gqa",
            {
                "num_attention_heads": 12,
                "kv_channels": 2,
                "num_query_groups": 6,
                "tensor_model_parallel_size": 4,
            },
            "does not divide num_query_groups 6 .* size 3",
        ),
        ("tpa", {"attention_output_gate": True}, "attention_output_gate .* does not work with tpa"),
        ("tpa", {"core_backend": "te"}, "core_backend .'te'. does not work with tpa: use torch"),
        ("mfa", {"context_parallel_size": 2}, "context_parallel_size .* does not work with mfa"),
        (
            "gqa",
            {"kv_channels": 4, "context_parallel_size": 2},
            "context_parallel_size 2 needs transformer_impl",
        ),
    ],
)
def test_what_cannot_work_is_refused(kind, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_of(kind, **overrides)


def run_rank(rank: int, port: int) -> None:
    """One of two ranks: a module split over both against a whole one, weights drawn alike."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    # Megatron's gathers allocate on the current CUDA device.
    torch.cuda.current_device = lambda: torch.device("cpu")
    parallel_state.initialize_model_parallel(2)
    singles = [dist.new_group([r]) for r in range(2)]
    for kind in KINDS:
        for sequence_parallel in (False, True):
            check_rank(kind, sequence_parallel, rank, singles[rank])
    dist.destroy_process_group()


def check_rank(kind: str, sequence_parallel: bool, rank: int, alone) -> None:
    whole = build(config_of(kind), alone, alone)
    config = config_of(kind, tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    split = build(config, dist.group.WORLD, alone)
    torch.manual_seed(11)
    x = torch.randn(S + 1, B, config.hidden_size, dtype=torch.float64)
    upstream = torch.randn_like(x)

    x_whole = x.clone().requires_grad_()
    expected, _ = whole(x_whole, None)
    (expected * upstream).sum().backward()

    def mine(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(2)[rank] if sequence_parallel else tensor

    x_split = mine(x).clone().requires_grad_()
    out, _ = split(x_split, None)
    (out * mine(upstream)).sum().backward()

    where = f"{kind}, sequence parallel {sequence_parallel}, rank {rank}"
    assert_close(out, mine(expected), TOLERANCE[kind], f"{where}: output")
    assert_close(x_split.grad, mine(x_whole.grad), TOLERANCE[kind], f"{where}: x")
    for (name, p), q in zip(split.named_parameters(), whole.parameters(), strict=True):
        axis = 1 if "linear_proj" in name else 0
        assert p.tensor_model_parallel, f"{where}: {name} is not marked as sharded"
        assert torch.equal(p, q.chunk(2, axis)[rank]), f"{where}: {name} was drawn otherwise"
        assert_close(p.grad, q.grad.chunk(2, axis)[rank], TOLERANCE[kind], f"{where}: {name}")
    stored = split.sharded_state_dict(metadata={"dp_cp_group": alone})
    for name, q in whole.named_parameters():
        assert stored[name].global_shape == q.shape, f"{where}: {name} is stored otherwise"
        axis = 1 if "linear_proj" in name else 0
        assert stored[name].global_offset[axis] == rank * q.size(axis) // 2, f"{where}: {name}"


def test_two_tensor_parallel_ranks_equal_one():
    with reserve_port() as kept:
        torch.multiprocessing.spawn(run_rank, args=(kept.getsockname()[1],), nprocs=2)
