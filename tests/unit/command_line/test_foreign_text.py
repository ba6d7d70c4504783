"""JSON lines, compressed streams and presets that are small on disk and large in memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time

import pytest
import zstandard

from megatron_mlra.command_line.foreign_text import parse_json, read_json, read_yaml
from megatron_mlra.data.cli import main
from megatron_mlra.description.presets import preset_values

MEASURED = """
import resource, sys
from megatron_mlra.data.cli import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[1:])
print(code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """1.5 GB of one line in some 45 KB."""
    packer = zstandard.ZstdCompressor(1).compressobj()
    piece = b"a" * (1 << 24)
    return b"".join([packer.compress(piece) for _ in range(90)]) + packer.flush()


@pytest.mark.parametrize("suffix", ["jsonl.zst", "txt.zst"])
def test_one_line_of_gigabytes(bomb, suffix, tmp_path):
    (tmp_path / f"a.{suffix}").write_bytes(bomb)
    argv = ["--input", tmp_path / f"a.{suffix}", "--output-prefix", tmp_path / "out"]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, *argv, "--tokenizer", "byte"],
        capture_output=True,
        text=True,
    )
    code, mebibytes = map(int, ran.stdout.split())
    assert code == 1 and ran.stderr.count("\n") == 1
    assert "the record has more than 256 MB: raise --max-record-mb" in ran.stderr
    assert mebibytes < 1000, f"{len(bomb)} bytes took {mebibytes} MiB"
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, bytes])
def test_a_record_beyond_the_bound_is_one_bad_record(pack, tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in ("one", "x" * 2_000_000, "three")]
    suffix = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(pack, "")
    source = tmp_path / f"a.jsonl{suffix}"
    source.write_bytes(pack("\n".join(lines).encode()))
    argv = ["--input", source, "--output-prefix", tmp_path / "out", "--tokenizer", "byte"]
    argv = [*map(str, argv), "--overwrite"]
    assert main([*argv, "--max-record-mb", "1"]) == 1
    said = "a.jsonl" + suffix + ":2: the record has more than 1 MB: raise --max-record-mb"
    assert said in capsys.readouterr().err
    assert main([*argv, "--max-record-mb", "1", "--on-error", "skip"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["documents"] == 2
    assert main([*argv, "--max-record-mb", "3"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["documents"] == 3
    for bound in ("0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--max-record-mb", bound])
        assert (
            ended.value.code == 2 and f"--max-record-mb: {bound} is no" in capsys.readouterr().err
        )


def test_json(tmp_path):
    deep = {"a": [[{"b": "[[[[" * 100}]]}
    assert parse_json(json.dumps(deep)) == deep
    assert parse_json("[" + "[]," * 1000 + "1]")[-1] == 1
    assert parse_json("NaN") != parse_json("NaN")
    file = tmp_path / "a.json"
    for text, said in (
        ("[" * 100_000, "more than 100 levels"),
        ("NaN", "is no number"),
        ("-1e400", "beyond a float's range"),
        (str(2**63), "more than 64 bits"),
        ("1" * 5000, "is not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_json(file)
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match="more than 5 bytes"):
        read_json(file, 5)
    with pytest.raises(ValueError, match="no plain file"):
        read_json("/dev/zero")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", r"alias \*a: write the value out"),
        ("a: &a {x: 1}\n<<: [*a, *a]", r"alias \*a: write the value out"),
        ("[" * 20_000, "too many levels"),
        ("a: " + "1" * 5000, "4300"),
        ("a: 2001-99-99", "month"),
        ("#" * (1 << 18) + "\n", "more than 262,144 bytes"),
        ("a: !!python/object/apply:os.mkdir [canary]", "os.mkdir': leave it out"),
        ("lr: !!bool x", "tag 'tag:yaml.org,2002:bool': leave it out"),
        ('lr: !!int ""', "tag 'tag:yaml.org,2002:int': leave it out"),
        ("lr: !!timestamp x", "tag 'tag:yaml.org,2002:timestamp': leave it out"),
        ("? !!set {a}\n: b", "tag 'tag:yaml.org,2002:set': leave it out"),
        ("lr: 0b_", "invalid literal"),
        ("a: 1\na: 2", "a is given twice"),
    ],
)
def test_presets_of_strangers(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        preset_values("p.yaml")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("--config p.yaml: ")
    assert not (tmp_path / "canary").exists()


def test_a_number_with_colons_is_text(tmp_path):
    minutes = "1" + ":59" * 60_000
    (tmp_path / "p.yaml").write_text(f"a: {minutes}\nb: 1:30\nc: 1:30.5\nd: 12\n")
    begun = time.process_time()
    values = read_yaml(tmp_path / "p.yaml")
    assert values == {"a": minutes, "b": "1:30", "c": "1:30.5", "d": 12}
    assert time.process_time() - begun < 2
