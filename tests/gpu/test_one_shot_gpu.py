"""The one-shot sum over the GPUs of a host against NCCL's all-reduce and add_rms_norm.

python -m pytest -m gpu tests/gpu/test_one_shot_gpu.py

Each test starts two processes, or as many as ONE_SHOT_RANKS says. It needs as many GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from support import ENV
from support.runs import run_to_end

RANKS = int(os.environ.get("ONE_SHOT_RANKS", "2"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} GPUs"),
]
START = """
import os, torch, torch.distributed as dist
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group("nccl")
from mlra_kernels.decoder import add_rms_norm
from mlra_kernels.one_shot import all_reduce_add_rms_norm, join_peers

def draw(*size, dtype, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device).to(dtype)

def inputs(tokens, d, dtype, seed):
    x = draw(tokens, d, dtype=dtype, seed=1000 * seed + rank)
    same = [draw(*size, dtype=dtype, seed=seed) for size in ((tokens, d), (d,))]
    return x, *same

def by_nccl(x, residual, weight):
    total = x.clone()
    dist.all_reduce(total)
    return add_rms_norm(total, residual, weight, 1e-6)

def check(found, expected, exact):
    # Two numbers are summed and rounded alike; more ranks are summed in another order by NCCL.
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[found[0].dtype]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=limit, atol=limit)
        first = ours.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, ours), "ranks differ"
    if exact and world == 2:
        assert torch.equal(found[0], expected[0]), "other bits than NCCL"
"""


def together(work: str, timeout: float = 150.0) -> tuple[int, str]:
    """Run `work` behind START on every rank; returns the exit code and what was printed."""
    file = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone"]
    program = ["--no-python", sys.executable, "-c", START + textwrap.dedent(work)]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = run_to_end([sys.executable, *file, *program], timeout, env=ENV, **out)
    return run.returncode, run.stdout


def succeed(work: str) -> None:
    code, printed = together(work)
    print(printed)
    assert code == 0, printed[-6000:]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_equals_nccl(dtype):
    succeed(f"""
    dtype = torch.{dtype}
    for d in (3072, 200, 33, 1, 8192):
        peers = join_peers(dist.group.WORLD, 64, d, dtype, device)
        for seed, tokens in enumerate((1, 2, 3, 8, 31, 64, 64, 1, 17, 64)):
            args = inputs(tokens, d, dtype, seed)
            found = all_reduce_add_rms_norm(*args, 1e-6, peers)
            check(found, by_nccl(*args), exact=True)
    """)


def test_every_number_of_tokens_and_rows_of_a_wider_tensor():
    succeed("""
    dtype = torch.bfloat16
    peers = join_peers(dist.group.WORLD, 64, 3072, dtype, device)
    for tokens in range(1, 65):
        x, residual, weight = inputs(tokens, 3072, dtype, tokens)
        wide = torch.full((tokens, 4000), float("nan"), device=device, dtype=dtype)
        wide[:, 8:3080] = x
        found = all_reduce_add_rms_norm(wide[:, 8:3080], residual, weight, 1e-6, peers)
        check(found, by_nccl(x, residual, weight), exact=True)
    """)


def test_a_thousand_replays_of_interleaved_graphs():
    """Graphs of one, three and four calls at several sizes, replayed in a random order with eager
    calls between them. Inputs change before each replay; a rank is late now and then."""
    succeed("""
    import random
    dtype, d = torch.bfloat16, 3072
    peers = join_peers(dist.group.WORLD, 64, d, dtype, device)
    graphs, side = [], torch.cuda.Stream()
    for tokens, calls in ((1, 1), (64, 3), (8, 4), (1, 3), (33, 1)):
        x, residual, weight = inputs(tokens, d, dtype, tokens)

        def run(x=x, residual=residual, weight=weight, calls=calls):
            found = []
            for _ in range(calls):
                found.append(all_reduce_add_rms_norm(x, residual, weight, 1e-6, peers))
            return found

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        graphs.append((graph, x, residual, weight, outputs))
    rng, wrong = random.Random(5), torch.zeros((), device=device)
    for turn in range(1000):
        graph, x, residual, weight, outputs = rng.choice(graphs)
        x.copy_(draw(*x.shape, dtype=dtype, seed=1000 * turn + rank))
        if turn % 7 == rank:
            torch.cuda._sleep(200_000)
        graph.replay()
        if turn % 5 == 0:
            outputs = [*outputs, all_reduce_add_rms_norm(x, residual, weight, 1e-6, peers)]
        others = [draw(*x.shape, dtype=dtype, seed=1000 * turn + r) for r in range(world)]
        total = sum(other.float() for other in others).to(dtype) + residual
        for found, _ in outputs:
            wrong += (found != total).sum()
    assert not int(wrong), f"{int(wrong)} wrong numbers"
    """)


def test_a_rank_whose_peer_does_not_call_ends_with_an_error():
    code, printed = together(
        """
        peers = join_peers(dist.group.WORLD, 8, 3072, torch.bfloat16, device)
        args = inputs(1, 3072, torch.bfloat16, 1)
        dist.barrier()
        torch.cuda.synchronize()
        if rank == 0:
            peers.patience = 100_000
            all_reduce_add_rms_norm(*args, 1e-6, peers)
            try:
                torch.cuda.synchronize()
            except torch.AcceleratorError as error:
                print("ended:", str(error).splitlines()[0], flush=True)
            os._exit(3)
        import time
        time.sleep(100)
        """
    )
    assert code and "ended: CUDA error" in printed, printed[-4000:]


ENGINE = """
from megatron_mlra.benchmarks.decoding.measure import random_reader
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.parallel import TensorParallel
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams

model = ModelDescription(
    num_layers=3, hidden_size=512, ffn_hidden_size=704, num_attention_heads=8, vocab_size=1000,
    max_position_embeddings=1024, q_lora_rank=128, kv_lora_rank=256, qk_nope_head_dim=64,
    qk_rope_head_dim=32, v_head_dim=64, num_latent_heads=4, num_branches=4, **EXTRA,
)
parallel = TensorParallel.over_world(model)
outputs = {}
for name, graphs in (("nccl", True), ("one-shot", False), ("one-shot", True), ("auto", True)):
    options = LoadOptions(
        dtype="bfloat16", cache_tokens=8192, max_positions=1024, all_reduce=name, weight_mode=MODE
    )
    loaded = load_model(model, random_reader(model, "cpu", seed=5), options, device, parallel)
    assert loaded.reduction.path.startswith("nccl" if name == "nccl" else "one-shot"), name
    engine = Engine(Runner(loaded, max_batch=5, max_pages=16, graphs=graphs), chunk_size=200)
    rng = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1000, (n,), generator=rng).tolist() for n in (3, 300, 70, 9, 128)]
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, SamplingParams(max_new_tokens=6 + i))
    requests = {r.id: r for r in engine.run()}
    outputs[name, graphs] = [requests[i].output for i in range(5)]
    assert all(r.error is None for r in requests.values())
assert outputs["one-shot", True] == outputs["one-shot", False] == outputs["auto", True]
shared = [None] * world
dist.all_gather_object(shared, outputs)
assert all(other == outputs for other in shared), "ranks differ"
tokens = [t for out in outputs["nccl", True] for t in out]
same = sum(a == b for a, b in zip(tokens, [t for o in outputs["auto", True] for t in o]))
print(f"{same} of {len(tokens)} tokens as with nccl")
# The norms' sums are added in another order, so a near tie may be decided otherwise.
assert same >= 0.9 * len(tokens), f"{same} of {len(tokens)} tokens are equal"
"""
EXPERTS = """dict(
    num_experts=6, moe_router_topk=2, moe_ffn_hidden_size=96, moe_layer_pattern=(0, 1, 1),
    moe_shared_expert_intermediate_size=64,
)"""


@pytest.mark.parametrize(
    ("mode", "extra"),
    [("replicated", "{}"), ("sharded", "{}"), ("replicated", EXPERTS)],
    ids=["dense", "sharded", "experts"],
)
def test_engine_gives_the_same_tokens(mode, extra):
    succeed(f"MODE, EXTRA = {mode!r}, {extra}\n" + ENGINE)
