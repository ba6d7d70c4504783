"""Parts of the benchmark that need no GPU: inputs, byte counts, correctness gate, plot."""

import argparse
import json
import sys
from dataclasses import replace

import pytest
import torch

from mlra_kernels.benchmarks import grouped_decode as grouped
from mlra_kernels.benchmarks import latent_attention as core
from mlra_kernels.benchmarks import latent_decode as latent
from mlra_kernels.benchmarks import one_shot, operators, products, providers, report
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


def test_records_that_no_plot_shows_are_kept(tmp_path, capsys):
    file = str(tmp_path / "latency.png")
    plot([{"batch": 2, "length": 1024, "us": 1.0, "model": "m", "provider": "p"}], 3e12, "", file)
    assert capsys.readouterr().out == f"{file} is not drawn: no record has one sequence\n"
    args = argparse.Namespace(json=str(tmp_path / "out.json"))

    def draw():
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        report.finish(args, {"records": [1]}, draw=draw)
    assert json.loads((tmp_path / "out.json").read_text()) == {"records": [1]}


def test_a_case_that_fails_fails_the_command_and_keeps_the_records_before_it(tmp_path, capsys):
    def measure(case):
        if case == "third":
            raise RuntimeError("CUDA out\nof memory")
        return [{"case": case}]

    found = report.gathered(["first", "second", "third", "fourth"], measure)
    args = argparse.Namespace(json=str(tmp_path / "out.json"))
    with pytest.raises(SystemExit, match="error: stopped at third: RuntimeError: CUDA out of mem"):
        report.finish(args, found)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [r["case"] for r in written["records"]] == ["first", "second"]
    assert capsys.readouterr().out.count("\n") == 1
    report.finish(args, report.gathered(["first"], measure))


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        (one_shot, ["--tokens", "8", "0"], "--tokens: 0 is no whole number from 1 to 2147483647"),
        (one_shot, ["--tokens", "129"], "--tokens 129 is more than a call takes, 128"),
        (one_shot, ["--hidden", "-1"], "--hidden: -1 is no whole number from 1"),
        (operators, ["--length", "x"], "--length: x is no whole number from 1"),
        (core, ["--mean-document", "0"], "--mean-document: 0 is no whole number from 1"),
        (products, ["--seconds", "-1"], "--seconds: -1 is no number of seconds above 0"),
        (products, ["--seconds", "inf"], "--seconds: inf is no number of seconds above 0"),
        (latent, ["--seed", "-1"], "--seed: -1 is no whole number from 0 to"),
        (grouped, ["--seed", "9" * 30], "--seed: 999999999999999999999999999999 is no whole num"),
        (products, ["--tp", "3"], "--tp: invalid choice: 3 (choose from 1, 2, 4)"),
    ],
)
def test_wrong_numbers_are_refused_by_their_flag(module, flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_full_disk_is_refused_before_anything_is_measured(full_disk):
    with pytest.raises(argparse.ArgumentTypeError, match="No space left on device"):
        output_file(str(full_disk / "out.json"))


def test_output_files_have_a_folder_before_anything_is_measured(tmp_path):
    name = str(tmp_path / "new" / "folder" / "out.json")
    assert output_file(name) == name and (tmp_path / "new" / "folder").is_dir()
    for wrong, said in ((str(tmp_path), "is a folder"), ("/proc/no/x.json", "cannot be made")):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            output_file(wrong)


def test_a_result_replaces_a_result_alone(tmp_path):
    file = tmp_path / "out"
    for data in ("", '{"commit": "a", "records": []}', '[{"model": "a", "tp": 1}]', "Matplotlib"):
        file.write_text(data)
        assert output_file(str(file)) == str(file)
    for data in ("A book.", '{"model_type": "mlra"}', "[]", "[1]", "[" * 10000, "1"):
        file.write_text(data)
        with pytest.raises(argparse.ArgumentTypeError, match="is there and no result of a benchm"):
            output_file(str(file))


def test_peers_that_are_not_there_are_named_with_the_way_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [])  # Nothing but what is loaded already can be found.
    for able, names in (
        (
            latent.PROVIDERS,
            ("FlashInfer MLA", "FlashAttention-3", "FlashAttention-4", "FlashInfer MLA, fa2"),
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
    ("files", "said"),
    [
        ({"flash_attn.py": ""}, "flash_attn.cute is not installed; pip install --pre flash-attn-4"),
        ({"flash_attn/__init__.py": ""}, "flash_attn.cute is not installed; pip install"),
        (
            {"flash_attn/__init__.py": "raise ImportError('flash_attn_2_cuda.so:\\nno symbol')"},
            "flash_attn.cute cannot be imported (ImportError: flash_attn_2_cuda.so: no symbol); pi",
        ),
        (
            {"flash_attn/__init__.py": "import no_such_module", "flash_attn/cute.py": ""},
            "flash_attn.cute cannot be imported (ModuleNotFoundError: No module named 'no_such_mo",
        ),
        ({"flash_attn/__init__.py": "", "flash_attn/cute/__init__.py": ""}, None),
    ],
    ids=["a module", "no cute", "another torch's", "half", "whole"],
)  # fmt: skip
def test_a_flash_attention_of_another_kind_is_named(files, said, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)  # put back behind the test
        del sys.modules[name]
    found = providers.without_flash_attention_4()
    assert found is None if said is None else found.startswith(said)


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


def test_a_peer_that_breaks_the_gpu_ends_the_run(monkeypatch):
    """A stand-in for an illegal access, which needs a GPU: every later call fails then."""

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    peer = Provider("a peer", lambda w: True, lambda w: [])
    with pytest.raises(SystemExit, match="a peer at MLA broke this process's use of the GPU"):
        providers.left_out("MLA", peer, RuntimeError("CUDA error"))


def test_flashinfers_kernels_for_hopper_take_their_own_latent_dim_alone():
    able = {provider.name: provider for provider in latent.PROVIDERS}
    for dim, name, other in ((512, "", ", fa2"), (128, ", fa2", "")):
        shape = replace(SMALL, latent_dim=dim, num_latents=1, num_branches=1)
        w = make_workload(shape, torch.float16, "cpu", seed=1, rotation=0)
        assert able[f"FlashInfer MLA{name}"].fits(w) and not able[f"FlashInfer MLA{other}"].fits(w)


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
