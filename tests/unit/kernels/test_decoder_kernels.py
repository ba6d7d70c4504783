"""Fused decoder operations and grouped-query decoding under Triton's interpreter, on the CPU.

As test_mlra_kernels_interpreter.py, this file runs itself in a child process.
"""

import pytest
import torch

from support.interpreted import INTERPRETING, run_interpreted

if not INTERPRETING:

    def test_decoder_kernels_under_the_interpreter():
        printed = run_interpreted(__file__)
        assert " passed" in printed and "skipped" not in printed

else:
    from mlra_kernels.decoder import add_rms_norm, rotate_heads, silu_mul
    from mlra_kernels.grouped_decode import grouped_decode

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    def randn(*size):
        return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))

    @pytest.mark.parametrize(("tokens", "d"), [(1, 64), (3, 200)])
    def test_add_rms_norm(tokens, d):
        x, residual, weight = randn(tokens, d), randn(d, tokens).T.contiguous(), randn(d)
        total, out = add_rms_norm(x, residual, weight, 1e-6)
        torch.testing.assert_close(total, x + residual)
        expected = torch.nn.functional.rms_norm(x + residual, (d,), weight, 1e-6)
        torch.testing.assert_close(out, expected)
        same, out = add_rms_norm(x, None, weight, 1e-6)
        assert same is x
        torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (d,), weight, 1e-6))

    def test_add_rms_norm_of_a_slice():
        wide, weight = randn(3, 150), randn(64)
        _, out = add_rms_norm(wide[:, :64], None, weight, 1e-6)
        expected = torch.nn.functional.rms_norm(wide[:, :64], (64,), weight, 1e-6)
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize("f", [16, 1500])
    def test_silu_mul(f):
        x = randn(3, 2 * f)
        expected = torch.nn.functional.silu(x[:, :f]) * x[:, f:]
        torch.testing.assert_close(silu_mul(x), expected)

    @pytest.mark.parametrize("start", [0, 24])
    def test_rotate_heads(start):
        x, angles = randn(3, 5, start + 16), randn(40, 8)
        positions = torch.tensor([0, 39, 7])
        first, second = x[..., start : start + 8].clone(), x[..., start + 8 :].clone()
        cos, sin = (f(angles)[positions][:, None] for f in (torch.cos, torch.sin))
        kept = x[..., :start].clone()
        out = rotate_heads(x, start, angles.cos(), angles.sin(), positions)
        assert out is x
        torch.testing.assert_close(out[..., :start], kept)
        torch.testing.assert_close(out[..., start : start + 8], first * cos - second * sin)
        torch.testing.assert_close(out[..., start + 8 :], second * cos + first * sin)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (24, 1), (1, 1), (21, 3)])
    def test_grouped_decode(heads, kv_heads, dtype):
        lengths = torch.tensor([0, 1, 64, 700], dtype=torch.int32)
        pages = 16
        keys, values = randn(pages, 64, kv_heads, 64), randn(pages, kv_heads, 64, 64)
        values = values.transpose(1, 2).contiguous()
        table = torch.randperm(pages).int()[None].repeat(4, 1)
        # Unused entries and unwritten rows must not matter.
        for b, length in enumerate(lengths.tolist()):
            table[b, -(-length // 64) :] = 2**30
        last = table[3, 700 // 64]
        keys[last, 700 % 64 :] = values[last, 700 % 64 :] = float("nan")
        q, keys, values = (x.to(dtype) for x in (randn(4, heads, 64), keys, values))
        args = (q, keys, values, table, lengths, 0.125)
        expected, expected_lse = grouped_decode(*args, backend="torch")
        out, lse = grouped_decode(*args)
        near = 2e-3 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, expected, atol=near, rtol=near)
        torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=2e-3)
        assert not out[0].any() and lse[0].isneginf().all()

    @pytest.mark.parametrize("length", [100, 3000], ids=["whole", "split"])
    @pytest.mark.parametrize("where", ["query", "key", "value"])
    def test_grouped_decode_shows_what_is_not_a_number(where, length):
        pages = -(-length // 64)
        keys, values = randn(pages, 64, 2, 64), randn(pages, 64, 2, 64)
        q, table = randn(1, 4, 64), torch.arange(pages, dtype=torch.int32)[None]
        {"query": q[0], "key": keys[-1, 3], "value": values[-1, 3]}[where][0, 5] = float("nan")
        args = (q, keys, values, table, torch.tensor([length], dtype=torch.int32), 0.125)
        out, lse = grouped_decode(*args)
        rows = slice(0, 1) if where == "query" else slice(0, 2)
        assert out[0, rows, 5].isnan().all() and not out[0, rows.stop :].isnan().any()
        torch.testing.assert_close(
            (out, lse), grouped_decode(*args, backend="torch"), atol=2e-3, rtol=2e-3, equal_nan=True
        )

    @pytest.mark.parametrize("length", [2**31 - 1, 2**31 - 2**17 + 1, -1])
    def test_lengths_that_32_bits_cannot_cut_give_nan(length):
        """Though the table holds as many tokens: one page, again and again."""
        kv, table = randn(1, 64, 1, 64), torch.zeros(1, 2**25, dtype=torch.int32)
        lengths = torch.tensor([length], dtype=torch.int32)
        out, _ = grouped_decode(randn(1, 1, 64), kv, kv, table, lengths, 0.1)
        assert out.isnan().all()

    def test_grouped_decode_refuses_in_one_line():
        q, kv = randn(1, 3, 64), randn(2, 64, 2, 64)
        table, length = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
        with pytest.raises(ValueError, match="K dividing H"):
            grouped_decode(q, kv, kv, table, length, 0.1)
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            grouped_decode(q[:, :2], kv, kv, table, length, 0.1, backend="cuda")

    def test_views_whose_addresses_need_64_bits_are_refused():
        far = torch.empty(2**31 + 2**10).as_strided((1, 6, 64), (0, 2**31 // 5 + 1, 1))
        kv, table = randn(2, 64, 2, 64), torch.zeros(1, 2, dtype=torch.int32)
        with pytest.raises(ValueError, match=r"a sequence of q reaches over 2\^31 numbers"):
            grouped_decode(far, kv, kv, table, torch.ones(1, dtype=torch.int32), 0.1)
        with pytest.raises(ValueError, match=r"a token of x reaches over 2\^31 numbers"):
            rotate_heads(far, 32, randn(3, 16), randn(3, 16), torch.zeros(1, dtype=torch.int32))

    SIZES = {
        "num_layers": 1,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    LATENT = {
        "q_lora_rank": 32,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    }
    MODELS = {
        "MLRA-2": {**LATENT, "num_latent_heads": 4, "num_branches": 2, "kv_lora_rank": 256},
        "MLA": {**LATENT, "num_latent_heads": 1, "num_branches": 1, "kv_lora_rank": 128},
        "GQA": {"attention": "gqa", "num_query_groups": 2, "head_dim": 64},
    }
    MODELS["MLRA-2"]["query_head_norm"] = True
    MODELS["MLA experts"] = MODELS["MLA"] | {
        "num_experts": 5,
        "moe_layer_pattern": (1,),
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 40,
        "moe_shared_expert_intermediate_size": 48,
    }

    @pytest.mark.parametrize(("name", "context"), [*((name, 1) for name in MODELS), ("MLRA-2", 2)])
    def test_a_model_on_the_kernels_equals_the_reference(name, context):
        """At context 2 the share of a rank that holds half of one sequence and none of another.

        Two of the models multiply the two rows of a step by the project's products too.
        """
        from megatron_mlra.description.model import ModelDescription
        from megatron_mlra.description.tensors import expected_tensors
        from megatron_mlra.inference.backends.triton import TritonOps
        from megatron_mlra.inference.chunks import Chunk
        from megatron_mlra.inference.load import LoadOptions, load_model
        from megatron_mlra.inference.parallel import TensorParallel
        from megatron_mlra.inference.runner import Runner

        model = ModelDescription(**SIZES, **MODELS[name])
        tensors = {
            key: randn(*shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
            for key, shape in expected_tensors(model).items()
        }
        tokens, logits = list(range(50)) + list(range(30)), []
        products = "auto" if name in ("MLRA-2", "MLA experts") and context == 1 else "cublas"
        for ops in (None, TritonOps(products)):
            options = LoadOptions(backend="torch", cache_tokens=512)
            parallel = TensorParallel.share(1, context=context)
            loaded = load_model(model, tensors.__getitem__, options, parallel=parallel)
            loaded.ops = ops or loaded.ops
            runner = Runner(loaded, max_batch=2, max_pages=4)
            pages = [[5, 2], [0, 7]] if context == 1 else [[4, 3], [1, 6]]
            steps = [runner.prefill([Chunk(tokens[:63], 0, pages[0]), Chunk([3], 0, pages[1])])]
            for row, own in enumerate(pages):
                runner.tables.set(row, own)
            steps.append(runner.decode([tokens[63], 9], [63, 1], pages))
            steps.append(runner.decode([tokens[64], 8], [64, 2], pages))
            logits.append(torch.cat(steps))
        torch.testing.assert_close(logits[1], logits[0], atol=5e-3, rtol=5e-3)
