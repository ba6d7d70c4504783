"""The Transformer Engine layers against the torch ones on a GPU: logits and every gradient.

python -m pytest -m gpu tests/gpu/test_transformer_engine.py
"""

from __future__ import annotations

import pytest
import torch

from support.te_sizes import SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("world")]

BF16_TOLERANCE = 3e-2
"""Relative difference of norms; two bf16 computations of the same float32 function."""

FP8_TOLERANCE = 0.3
"""The same between FP8 and bf16: FP8 rounds values to 1/16 (e4m3) and gradients to 1/8 (e5m2) of
themselves, in every product of two layers."""


def run(
    implementation: str,
    weights: dict | None = None,
    largest: list[torch.Tensor] | None = None,
    **overrides,
):
    """One forward and backward; logits, gradients by global name, and the weights used; `largest`
    is given what each layer's core reports."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel

    from megatron_mlra.layers.logits import measured
    from megatron_mlra.layers.specs import block_spec
    from support.samples import SEQ, VOCAB, global_batch
    from support.tiny import Layout, make_config

    config = make_config(Layout(), transformer_impl=implementation, **{**SIZES, **overrides})
    model = GPTModel(
        config,
        block_spec(config),
        VOCAB,
        SEQ,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    ).cuda()
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}

    def by_global_name() -> dict[str, torch.nn.Parameter]:
        names = {}
        for key, entry in model.sharded_state_dict(metadata=metadata).items():
            data = getattr(entry, "data", None)
            if isinstance(data, torch.Tensor) and "_extra_state" not in key:
                layer = key.split(".layers.")[1].split(".")[0] if ".layers." in key else ""
                names[f"{entry.key} {layer}"] = data
        return names

    params = {p.data_ptr(): p for p in model.parameters()}
    named = {name: params[data.data_ptr()] for name, data in by_global_name().items()}
    assert len(set(map(id, named.values()))) == len(params)
    if weights is not None:
        assert named.keys() == weights.keys()
        with torch.no_grad():
            for name, param in named.items():
                param.copy_(weights[name])
    tokens = global_batch(0).cuda()
    positions = torch.arange(SEQ, device="cuda")[None].expand(len(tokens), -1)
    cores = [attention.core_attention for _, attention in measured(model)]
    for core in cores:
        core.largest.wanted = largest is not None
    logits = model(tokens[:, :-1].contiguous(), positions, None)
    # Delayed scaling takes its factors from the passes before.
    for _ in range(3 if overrides.get("fp8_recipe") == "delayed" else 1):
        model.zero_grad()
        model.set_is_first_microbatch()
        labels = tokens[:, 1:].contiguous()
        losses = model(tokens[:, :-1].contiguous(), positions, None, labels=labels)
        losses.float().mean().backward()
    if largest is not None:
        largest += [core.largest.take() for core in cores]
    gradients = {n: p.main_grad if p.grad is None else p.grad.float() for n, p in named.items()}
    return logits.float().detach(), gradients, {n: p.detach() for n, p in named.items()}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("core_form", ["absorbed", "materialized"])
@pytest.mark.parametrize(
    "variant",
    [(1, 1, False), (2, 1, False), (4, 2, False), (4, 4, False), (4, 4, True)],
    ids=["MLA", "GLA-2", "MLRA-2", "MLRA-4", "MLRA-4 gated"],
)
def test_transformer_engine_equals_torch(variant: tuple[int, int, bool], core_form: str) -> None:
    latents, branches, gated = variant
    overrides = {
        "num_latent_heads": latents,
        "num_branches": branches,
        "output_gate": gated,
        "query_head_norm": gated,
        "core_form": core_form,
    }
    expected, gradients, weights = run("local", **overrides)
    found, te_gradients, _ = run("transformer_engine", weights, **overrides)
    assert difference(found, expected) <= BF16_TOLERANCE
    assert te_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        assert difference(te_gradients[name], gradient) <= BF16_TOLERANCE, name


@pytest.mark.parametrize("backend", ["torch", "te", "mlra_kernels"])
def test_other_cores_under_transformer_engine(backend: str) -> None:
    """The core's backend is a choice of its own."""
    expected, gradients, weights = run("local")
    found, te_gradients, _ = run("transformer_engine", weights, core_backend=backend)
    assert difference(found, expected) <= BF16_TOLERANCE
    assert max(difference(te_gradients[n], g) for n, g in gradients.items()) <= BF16_TOLERANCE


@pytest.mark.parametrize("core_form", ["absorbed", "materialized"])
def test_without_rope(core_form: str) -> None:
    nope = {"qk_pos_emb_head_dim": 0, "core_form": core_form}
    expected, gradients, weights = run("local", **nope)
    found, te_gradients, _ = run("transformer_engine", weights, **nope)
    assert difference(found, expected) <= BF16_TOLERANCE
    assert max(difference(te_gradients[n], g) for n, g in gradients.items()) <= BF16_TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "te", "mlra_kernels"])
def test_every_core_reports_its_largest_logits(backend: str) -> None:
    expected: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    plain, _, weights = run("local", largest=expected)
    logits, _, _ = run("transformer_engine", weights, largest=found, core_backend=backend)
    assert difference(logits, plain) <= BF16_TOLERANCE
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        assert difference(ours, theirs) <= BF16_TOLERANCE


@pytest.mark.parametrize("linears", ["wide", "all"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_is_near_bf16(recipe: str, linears: str) -> None:
    expected, gradients, weights = run("local")
    fp8 = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_linears": linears}
    found, fp8_gradients, _ = run("transformer_engine", weights, **fp8)
    # FP8 did run: bf16 alone would be far nearer.
    assert BF16_TOLERANCE / 3 < difference(found, expected) <= FP8_TOLERANCE
    for name, gradient in gradients.items():
        assert difference(fp8_gradients[name], gradient) <= FP8_TOLERANCE, name


@pytest.mark.parametrize("linears", ["wide", "all"])
def test_fp8_linears(linears: str) -> None:
    """Low-rank projections keep bf16 parameters and products unless asked for."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True, "fp8_linears": linears}
    _, _, weights = run("transformer_engine", None, **fp8)
    for name, weight in weights.items():
        low_rank = any(part in name for part in ("q_down", "q_up", "kv_down"))
        wide = any(part in name for part in ("linear_fc", "linear_proj"))
        quantized = isinstance(weight, QuantizedTensor)
        if "layer_norm" not in name and (low_rank or wide):
            assert quantized == (wide or linears == "all"), name


def test_first_and_last_layers_stay_bf16() -> None:
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True, "num_layers": 3}
    _, _, weights = run("transformer_engine", None, first_last_layers_bf16=True, **fp8)
    quantized = {
        name[-1] for name, weight in weights.items() if isinstance(weight, QuantizedTensor)
    }
    assert quantized == {"1"}


def test_packed_documents_equal_separate_ones() -> None:
    """A whole model in the thd layout: logits, and every gradient of the summed loss."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_mlra.layers.specs import block_spec
    from support.samples import VOCAB
    from support.tiny import Layout, make_config

    config = make_config(Layout(), transformer_impl="transformer_engine", **SIZES)
    model = GPTModel(
        config, block_spec(config), VOCAB, 512,
        share_embeddings_and_output_weights=True, position_embedding_type="rope",
    ).cuda()  # fmt: skip
    bounds = torch.tensor((0, 1, 130, 301, 512), dtype=torch.int32, device="cuda")
    tokens = torch.randint(VOCAB, (1, 512), generator=torch.Generator().manual_seed(1)).cuda()
    weights = torch.randn(1, 512, VOCAB, generator=torch.Generator().manual_seed(2)).cuda()
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
        max_seqlen_q=211, max_seqlen_kv=211,
    )  # fmt: skip
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None].cuda()

    def run_part(part: slice, packed: PackedSeqParams | None) -> torch.Tensor:
        logits = model(tokens[:, part], positions[:, part], None, packed_seq_params=packed)
        (logits.float() * weights[:, part]).sum().backward()
        return logits.detach()

    whole = run_part(slice(None), packed)
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad()
    edges = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    separate = torch.cat([run_part(slice(*edge), None) for edge in edges], dim=1)
    assert difference(whole.float(), separate.float()) <= BF16_TOLERANCE
    for name, param in model.named_parameters():
        assert difference(gradients[name], param.grad.float()) <= BF16_TOLERANCE, name


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_weight_gradients_summed_in_their_products(recipe: str) -> None:
    """Two micro-batches through DDP, against gradients that are added in a pass of their own."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_mlra.benchmarks.training.case import Load, Trainee
    from megatron_mlra.benchmarks.training.cases import Case

    def gradients(*flags: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        load = Load(2, 512, 2, flags=("--no-zero-init-output", *flags))
        trainee = Trainee(Case("mlra4_350m", recipe, "auto", 256), load)
        assert trainee.config.gradient_accumulation_fusion == (not flags)
        trainee.step()
        return {name: p.main_grad.clone() for name, p in trainee.model.named_parameters()}

    expected = gradients("--no-gradient-accumulation-fusion")
    for name, gradient in gradients().items():
        assert difference(gradient, expected[name]) <= BF16_TOLERANCE / 3, name


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_delayed_weight_gradients_are_those_of_backward(gated: bool) -> None:
    from megatron.core.models.gpt import GPTModel

    from megatron_mlra.layers.specs import block_spec
    from support.samples import SEQ, VOCAB, global_batch
    from support.tiny import Layout, make_config

    found = []
    for delayed in (False, True):
        torch.manual_seed(1)
        sizes = {**SIZES, "transformer_impl": "transformer_engine", "output_gate": gated}
        config = make_config(Layout(), core_backend="te", **sizes)
        # Megatron's config takes it with expert parallelism alone.
        config.delay_wgrad_compute = delayed
        model = GPTModel(config, block_spec(config), VOCAB, SEQ, position_embedding_type="rope")
        model = model.cuda()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            for p in model.parameters():
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        tokens = global_batch(0).cuda()
        positions = torch.arange(SEQ, device="cuda")[None].expand(len(tokens), -1)
        labels = tokens[:, 1:].contiguous()
        losses = model(tokens[:, :-1].contiguous(), positions, None, labels=labels)
        losses.float().mean().backward()
        if delayed:
            for layer in model.decoder.layers:
                assert layer.self_attention.linear_proj.weight.grad is None
                layer.self_attention.backward_dw()
                layer.mlp.backward_dw()
        found.append({n: p.grad.float() for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.norm() > 0, name
        assert difference(found[1][name], gradient) <= BF16_TOLERANCE / 10, name
