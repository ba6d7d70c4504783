"""Parts of the benchmark that need no GPU: inputs, byte counts, correctness gate, plot."""

import argparse

import pytest
import torch

from mlra_kernels.benchmarks.latent_decode import RANK, SUITES, gate, plot
from mlra_kernels.benchmarks.output import output_file
from mlra_kernels.benchmarks.workload import Shape, make_workload
from mlra_kernels.latent_decode import latent_decode

SMALL = Shape("small", 2, 100, num_latents=2, num_branches=2, heads=3, latent_dim=64, rope_dim=32)


def reference_call(w):
    return latent_decode(
        w.q_absorbed, w.q_rope, w.cache, w.tables[0], w.cache_seqlens, w.softmax_scale,
        num_branches=w.shape.num_branches, cache_scale=w.cache_scale, backend="torch",
    )  # fmt: skip


def test_bytes_and_operations_of_a_token():
    one = Shape(RANK, 1, 1)
    assert (one.row_bytes, one.flops) == (384, 40960)
    assert Shape(RANK, 1, 1, fp8=True).row_bytes == 260
    assert Shape("TP1", 1, 1, num_latents=4, num_branches=4).row_bytes == 1152


@pytest.mark.parametrize("fp8", [False, True])
def test_block_tables_share_no_page(fp8):
    shape = Shape("small", 2, 100, heads=3, latent_dim=64, rope_dim=32, fp8=fp8)
    w = make_workload(shape, torch.float16, "cpu", seed=0, rotation=0)
    pages = torch.stack(w.tables).flatten()
    assert len(w.tables) == 2 and len(pages.unique()) == len(pages) == w.cache.shape[0]
    out, lse = reference_call(w)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


def test_a_red_result_is_not_reported():
    w = make_workload(SMALL, torch.float16, "cpu", seed=1, rotation=0)
    out, lse = reference_call(w)
    assert gate(w, lambda: (out, lse), "right") == 0.0
    for wrong in ((out * 1.01, lse), (out, lse + 0.02), (out * torch.nan, lse)):
        with pytest.raises(SystemExit, match="RED: wrong on small"):
            gate(w, lambda wrong=wrong: wrong, "wrong")


def test_plot_and_suites(tmp_path):
    records = [
        {"batch": 1, "length": n, "us": n / 100, "model": "m", "provider": "p"}
        for n in (1024, 4096)
    ]
    plot(records, 3e12, "a GPU", str(tmp_path / "latency.png"))
    assert (tmp_path / "latency.png").stat().st_size > 1000
    assert {shape.fp8 for shape in SUITES["all"]} == {False, True}


def test_output_files_have_a_folder_before_anything_is_measured(tmp_path):
    name = str(tmp_path / "new" / "folder" / "out.json")
    assert output_file(name) == name and (tmp_path / "new" / "folder").is_dir()
    for wrong, said in ((str(tmp_path), "is a folder"), ("/proc/no/x.json", "cannot be made")):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            output_file(wrong)
