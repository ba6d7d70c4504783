"""The one-shot sum over ranks under Triton's interpreter, with ranks that are emulated or forked;
its protocol as a model; its code for sm_90a.

As test_mlra_kernels_interpreter.py, this file runs itself in a child process.
"""

import os
import random
import re
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mlra_kernels.one_shot import Peers, all_reduce_add_rms_norm
from mlra_kernels.one_shot.kernel import one_shot_kernel
from mlra_kernels.one_shot.peers import MAX_ROWS, box_words
from mlra_kernels.one_shot.reference import all_reduce_add_rms_norm_reference
from support.interpreted import INTERPRETING, run_interpreted
from support.one_shot import boxes_of, deliver, peers_of

EPS = 1e-5


def draw(*size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator).to(dtype)


# -- the protocol ----------------------------------------------------------------------------------


class Rank:
    """One row of a rank, as the kernel treats it: send, then wait for each peer, call by call."""

    def __init__(self, world: int, turns: int) -> None:
        self.box = [[(0, 0)] * world for _ in range(turns)]
        self.calls, self.sent, self.missing = 0, False, set()
        self.sums: list[list[int]] = []

    def step(self, me: int, ranks: "list[Rank]", turns: int) -> None:
        """The next access of memory."""
        stamp = self.calls + 1
        if not self.sent:
            for peer in ranks:
                peer.box[stamp % turns][me] = stamp, 100 * stamp + me
            self.sent, self.missing = True, set(range(len(ranks))) - {me}
            self.sums.append([0] * len(ranks))
            self.sums[-1][me] = 100 * stamp + me
            return
        for peer in list(self.missing):
            found, value = self.box[stamp % turns][peer]
            if found == stamp:
                self.sums[-1][peer] = value
                self.missing.remove(peer)
        if not self.missing:
            self.calls, self.sent = stamp, False


def run_model(world: int, turns: int, seed: int) -> bool:
    """Whether all ranks get ten right sums, in a random order of steps that favours one rank."""
    calls, rng, ranks = 10, random.Random(seed), [Rank(world, turns) for _ in range(world)]
    for _ in range(200 * calls * world):
        waiting = [me for me, rank in enumerate(ranks) if rank.calls < calls]
        if not waiting:
            break
        fast = [me for me in waiting if me == seed % world]
        me = rng.choice(fast if fast and rng.random() < 0.9 else waiting)
        ranks[me].step(me, ranks, turns)
    wanted = [[100 * stamp + me for me in range(world)] for stamp in range(1, calls + 1)]
    return all(rank.sums == wanted and rank.calls == calls for rank in ranks)


if not INTERPRETING:

    @pytest.mark.parametrize("world", [2, 3, 8])
    def test_two_turns_are_enough_and_one_is_not(world):
        assert all(run_model(world, 2, seed) for seed in range(15))
        assert not all(run_model(world, 1, seed) for seed in range(15))

    # -- what is refused ---------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((0, 8, torch.float32, 2), "rows is 0: give an integer from 1 to"),
            ((MAX_ROWS + 1, 8, torch.float32, 2), "rows is 129"),
            ((1, 0, torch.float32, 2), "d is 0"),
            ((1, 65537, torch.float32, 2), "d is 65537"),
            ((1, 8, torch.int8, 2), "dtype is torch.int8: use"),
            ((1, 8, torch.float32, 1), "there are 1 ranks: give 2 to 8"),
            ((1, 8, torch.float32, 9), "there are 9 ranks: give 2 to 8"),
        ],
    )
    def test_sizes_that_do_not_work_are_refused(sizes, message):
        with pytest.raises(ValueError, match=message):
            box_words(*sizes)

    def test_peers_are_refused_that_are_none():
        x = torch.zeros(1, 8)
        with pytest.raises(ValueError, match="peers is of type list: give what join_peers"):
            all_reduce_add_rms_norm(x, x, x[0], EPS, [1, 2])
        with pytest.raises(ValueError, match="rank is 2: give an integer from 0 to 1"):
            Peers(2, [1, 2], 1, 8, torch.float32, "cpu")

    # -- machine code ------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("d", "world", "dtype", "pdl"),
        [(3072, 2, "bf16", False), (2048, 3, "fp32", True)],
    )
    def test_code_for_sm_90a(d, world, dtype, pdl, tmp_path):
        half = -(-d // 2)
        words = box_words(1, d, torch.float32 if dtype == "fp32" else torch.half, world)
        constants = {
            "d": d, "H": half, "WORDS": words // (2 * world), "RANK": 1, "W": world, "PDL": pdl,
            "BLOCK": triton.next_power_of_2(half),
        }  # fmt: skip
        types = {"boxes_ptr": "*i64", "calls_ptr": "*i32", "eps": "fp32"}
        signature, values, attributes = {}, {}, {}
        for i, name in enumerate(one_shot_kernel.arg_names):
            if name in constants:
                signature[name], values[(i,)] = "constexpr", constants[name]
                continue
            usual = f"*{dtype}" if name.endswith("_ptr") else "i32"
            signature[name] = types.get(name, usual)
            if name.endswith("_ptr") or name.startswith("stride_"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(one_shot_kernel, signature, values, attributes)
        options = {"num_warps": min(32, constants["BLOCK"] // 64)}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        looks = re.findall(r"ld\.volatile\.global\.v2\.b64", built.asm["ptx"])
        # A look before the loop and one inside, for each peer and half of a float32 row. In halves,
        # a word takes both.
        assert len(looks) == 2 * (world - 1) * (2 if dtype == "fp32" else 1)
        assert "trap;" in built.asm["ptx"] and "multimem" not in built.asm["ptx"]
        assert ("griddepcontrol.wait" in built.asm["ptx"]) == pdl
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        run = [str(tool), "--dump-resource-usage", str(binary)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        assert re.search(r"STACK:(\d+)", text).group(1) == "0"

    def test_one_shot_under_the_interpreter():
        printed = run_interpreted(__file__)
        assert " passed" in printed and "skipped" not in printed

else:
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    @pytest.mark.parametrize(
        ("world", "d", "dtype"),
        [(2, 200, torch.half), (3, 7, torch.float32), (8, 33, torch.half), (2, 1, torch.half)],
    )
    def test_sums_of_emulated_ranks(world, d, dtype):
        sizes, boxes = (1, 2, 1), boxes_of(world, 3, d, dtype)
        peers, weight = peers_of(boxes, d, dtype), draw(d)
        for call, tokens in enumerate(sizes):
            wide = [draw(tokens, d + 5, dtype=dtype, seed=call + r) for r in range(world)]
            xs = [x[:, 2 : d + 2] for x in wide]  # strided
            residual = draw(tokens, d, dtype=dtype, seed=call)
            expected = all_reduce_add_rms_norm_reference(xs, residual, weight, EPS)
            for me in {0, world - 1}:
                # A row's stamp counts the calls that had this row.
                for row in range(tokens):
                    stamp = 1 + sum(row < t for t in sizes[:call])
                    alone = [x[row : row + 1] for x in xs]
                    views = [box[:, :, row : row + 1] for box in boxes]
                    deliver(views, me, alone, stamp)
                total, normed = all_reduce_add_rms_norm(xs[me], residual, weight, EPS, peers[me])
                assert torch.equal(total, expected[0]), (me, call)
                torch.testing.assert_close(normed, expected[1], atol=2e-3, rtol=2e-3)
        assert peers[0].calls.tolist() == [3, 1, 0]

    def test_no_token_is_no_launch():
        (peers, _) = peers_of(boxes_of(2, 1, 8, torch.float32), 8, torch.float32)
        total, normed = all_reduce_add_rms_norm(draw(0, 8), draw(0, 8), draw(8), EPS, peers)
        assert total.shape == normed.shape == (0, 8) and not peers.calls.any()

    def test_ranks_that_run_at_once():
        """Real processes over shared memory, each at its own speed."""
        world, d, rows, sizes = 3, 40, 2, (1, 2, 1, 2, 1)
        boxes = boxes_of(world, rows, d, torch.float32)
        found = torch.zeros(world, len(sizes), 2, rows, d)
        for shared in (*boxes, found):
            shared.share_memory_()
        peers, weight = peers_of(boxes, d, torch.float32), draw(d)
        inputs = [
            ([draw(t, d, seed=9 * call + r) for r in range(world)], draw(t, d, seed=call))
            for call, t in enumerate(sizes)
        ]

        def be(me: int) -> None:
            peers[me].patience = -300_000
            for call, (xs, residual) in enumerate(inputs):
                time.sleep(random.Random(100 * me + call).random() * 0.02)
                out = all_reduce_add_rms_norm(xs[me], residual, weight, EPS, peers[me])
                found[me, call, :, : len(residual)] = torch.stack(out)

        children = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for me in range(world):
                children.append(os.fork())
                if not children[-1]:
                    code = 1
                    try:
                        be(me)
                        code = 0
                    finally:
                        os._exit(code)
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert not any(codes)
        for call, (xs, residual) in enumerate(inputs):
            expected = all_reduce_add_rms_norm_reference(xs, residual, weight, EPS)
            for me in range(world):
                ours = found[me, call, :, : len(residual)]
                assert torch.equal(ours, found[0, call, :, : len(residual)])
                torch.testing.assert_close(ours, torch.stack(expected), atol=1e-5, rtol=1e-5)
