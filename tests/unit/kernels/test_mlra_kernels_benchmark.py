"""Parts of the benchmark that need no GPU: inputs, byte counts, correctness gate, plot."""

import argparse
import sys

import pytest
import torch

from mlra_kernels.benchmarks import grouped_decode as grouped
from mlra_kernels.benchmarks import latent_decode as latent
from mlra_kernels.benchmarks import one_shot, providers
from mlra_kernels.benchmarks.latent_decode import RANK, SUITES, gate, plot, timed
from mlra_kernels.benchmarks.providers import Provider, chosen
from mlra_kernels.benchmarks.report import output_file
from mlra_kernels.benchmarks.workload import Shape, make_workload
from mlra_kernels.grouped_decode import grouped_decode
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
        with pytest.raises(SystemExit, match="RED: mlra_kernels on small"):
            gate(w, lambda wrong=wrong: wrong, "mlra_kernels")
        with pytest.raises(ArithmeticError, match="wrong: relative error"):
            gate(w, lambda wrong=wrong: wrong, "a peer")


def test_ranks_of_the_fused_sum_are_told_the_same(monkeypatch, capsys):
    told = {"tokens": [1, 8], "seed": 1}
    ranks = [told, told | {"tokens": [1]}]
    monkeypatch.setattr(
        one_shot,
        "dist",
        argparse.Namespace(
            get_world_size=lambda: 2,
            get_rank=lambda: 0,
            barrier=lambda: None,
            all_gather_object=lambda found, own: found.__setitem__(slice(None), ranks),
        ),
    )
    with pytest.raises(SystemExit) as ended:
        one_shot.check_same(told)
    said = "error: rank 1 has --tokens [1] and rank 0 [1, 8]; start all with the same command\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, said)
    ranks[1] = told
    one_shot.check_same(told)


def test_plot_and_suites(tmp_path):
    records = [
        {"batch": 1, "length": n, "us": n / 100, "model": "m", "provider": "p"}
        for n in (1024, 4096)
    ]
    plot(records, 3e12, "a GPU", str(tmp_path / "latency.png"))
    assert (tmp_path / "latency.png").stat().st_size > 1000
    assert {shape.fp8 for shape in SUITES["all"]} == {False, True}


def test_a_full_disk_is_refused_before_anything_is_measured(full_disk):
    with pytest.raises(argparse.ArgumentTypeError, match="No space left on device"):
        output_file(str(full_disk / "out.json"))


def test_output_files_have_a_folder_before_anything_is_measured(tmp_path):
    name = str(tmp_path / "new" / "folder" / "out.json")
    assert output_file(name) == name and (tmp_path / "new" / "folder").is_dir()
    for wrong, said in ((str(tmp_path), "is a folder"), ("/proc/no/x.json", "cannot be made")):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            output_file(wrong)


def test_peers_that_are_not_there_are_named_with_the_way_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [])  # Nothing but what is loaded already can be found.
    for able, names in (
        (
            latent.PROVIDERS,
            ("FlashInfer MLA", "FlashInfer MLA, fa2", "FlashAttention-3", "FlashAttention-4"),
        ),
        (grouped.PROVIDERS, ("FlashInfer decode", "FlashAttention-3", "FlashAttention-4")),
    ):
        found = [provider.name for provider in chosen(able, None)]
        assert "mlra_kernels" in found and not set(names) & set(found)
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == [f"without {name}" for name in names]
        assert all("install" in line or "build" in line for line in lines)
        with pytest.raises(ValueError, match=r"--providers 'FlashInf.*'; |pip install flashinfer"):
            chosen(able, names[:1])


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.6.13", None), ("0.7.2.post1", None), ("0.5.3", "flashinfer is 0.5.3; install 0.6 or")],
)
def test_flashinfer_of_another_version_is_refused(version, said, monkeypatch, tmp_path):
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").touch()
    info = tmp_path / f"flashinfer_python-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: flashinfer-python\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = providers.without_flashinfer()
    assert found is None if said is None else found.startswith(said)


def test_a_peer_that_refuses_a_shape_is_left_out_and_ours_is_not(capsys):
    w = make_workload(SMALL, torch.float16, "cpu", seed=1, rotation=0)

    def refuse(workload):
        raise ValueError("head dims\nare odd")

    assert timed(Provider("a peer", lambda w: True, refuse), w, gate) is None
    assert (
        "a peer                 left out: ValueError: head dims are odd" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="odd"):
        timed(Provider("mlra_kernels", lambda w: True, refuse), w, gate)


def test_grouped_workloads_and_their_gate():
    shape = grouped.Shape("GQA", 2, 100, kv_heads=2, heads=4, dim=16)
    assert shape.cache_bytes == 2 * 100 * 2 * 2 * 16 * 2
    w = grouped.make_workload(shape, torch.float16, "cpu", seed=0, rotation=0)
    pages = torch.stack(w.tables).flatten()
    assert len(w.tables) == 2 and len(pages.unique()) == len(pages) == len(w.keys)
    out, lse = grouped_decode(
        w.query, w.keys, w.values, w.tables[0], w.seqlens, w.softmax_scale, backend="torch"
    )
    assert grouped.gate(w, lambda: (out, lse), "right") == 0.0
    with pytest.raises(SystemExit, match="RED: mlra_kernels on GQA"):
        grouped.gate(w, lambda: (out * 1.01, None), "mlra_kernels")
    with pytest.raises(ArithmeticError, match="wrong: relative error"):
        grouped.gate(w, lambda: (out * 1.01, None), "a peer")
    starts, listed = providers.page_lists(w.tables[0], shape.batch)
    assert starts.tolist() == [0, 2, 4] and listed.tolist() == w.tables[0].flatten().tolist()
