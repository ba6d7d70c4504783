"""tools/generate.py on a checkpoint that pretraining wrote: output, streaming, ranks, bad input."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.data.tokenizers import ByteTokenizer
from megatron_mlra.inference import flags
from megatron_mlra.inference.cli import main
from megatron_mlra.inference.growing_text import GrowingText
from support import ENV, ROOT


@pytest.fixture(scope="session")
def checkpoint(whole):
    """The folder that the whole run saved to."""
    assert whole.code == 0, whole.err
    return whole.folder / "save"


def generate(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the tool, in this process."""
    capsys.readouterr()
    code = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_one_prompt_streams_its_continuation(checkpoint, capsys, tmp_path):
    file = tmp_path / "out.jsonl"
    code, out, err = generate(
        capsys, checkpoint, "--prompt", "def ", "--max-new-tokens", 12, "--output", file,
        "--logprobs", "--ignore-eod",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(file.read_text())
    assert out == "def " + record["output"] + "\n"
    assert len(record["tokens"]) == len(record["logprobs"]) == 12
    assert record["finish_reason"] == "length"
    # Two layers of 64 + 8 numbers in float32; a page holds 64 tokens.
    size = 2 * 72 * 4
    assert f"{size:,} KV bytes per token and rank in float32, {size * 64:,} allocated" in err
    assert re.search(r"12 tokens in [\d.]+ s: [\d.]+ tokens/s", err)
    assert re.search(r"first token after \d+ ms", err)


def test_the_programs_in_the_docs_run(checkpoint, capsys):
    for page, changes in (
        ("inference.md", {"runs/demo/checkpoint": checkpoint, '"cuda"': '"cpu"', "=32)": "=8)"}),
        ("checkpoints.md", {"runs/my": checkpoint}),
    ):
        (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
        for old, new in changes.items():
            assert old in code
            code = code.replace(old, str(new))
        exec(code, names := {})
        assert names["folder"].description.variant == "MLRA-4"
    assert len(names["weight"].shape) == 4
    assert capsys.readouterr().out.count("\n") == 8


def test_files_of_prompts_give_what_single_prompts_give(checkpoint, capsys, tmp_path):
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("import\n\nclass A\n")
    records.write_text('{"prompt": "x = 1"}\n{"text": "é"}\n')
    common = ["--max-new-tokens", 8, "--temperature", 1, "--ignore-eod"]
    file = tmp_path / "together.jsonl"
    code, out, err = generate(
        capsys, checkpoint, "--prompt-file", lines, "--prompt-file", records, "--max-batch", 3,
        "--output", file, *common,
    )  # fmt: skip
    assert code == 0, err
    together = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["prompt"] for record in together] == ["import", "class A", "x = 1", "é"]
    assert all(f"[{i}] {r['prompt']}{r['output']}" in out for i, r in enumerate(together))
    one = tmp_path / "one.jsonl"
    code, _, _ = generate(
        capsys, checkpoint, "--prompt", "x = 1", "--seed", 2, "--output", one, *common
    )
    assert code == 0 and json.loads(one.read_text())["tokens"] == together[2]["tokens"]


def test_a_text_ends_where_the_export_says(checkpoint, capsys, tmp_path):
    """The ids of generation_config.json: transformers and servers end there too."""
    export, out = tmp_path / "export", tmp_path / "out.jsonl"
    write_huggingface(open_checkpoint(checkpoint), export, progress=False)
    argv = [export, "--prompt", "def ", "--max-new-tokens", 12, "--output", out]

    def tokens(*flags: str) -> tuple[list[int], str]:
        code, _, err = generate(capsys, *argv, *flags)
        assert code == 0, err
        record = json.loads(out.read_text())
        return record["tokens"], record["finish_reason"]

    free, _ = tokens("--ignore-eod")
    file = export / "generation_config.json"
    config = json.loads(file.read_text())
    (export / "integrity.json").unlink()  # the file is edited
    for named in (free[4], [config["eos_token_id"], free[4]]):
        file.write_text(json.dumps(config | {"eos_token_id": named}))
        assert tokens() == (free[: free.index(free[4]) + 1], "stop")
    assert tokens("--ignore-eod") == (free, "length")
    file.write_text('{"eos_token_id": 99999}')
    code, _, err = generate(capsys, *argv)
    assert code == 2 and f"{file}: eos_token_id is 99999, and the model's tokens are" in err


def test_ranks_write_what_one_process_writes(checkpoint, capsys, warm_python, warm_mlra):
    argv = [checkpoint, "--prompt", "def ", "--max-new-tokens", "24", "--ignore-eod"]
    _, alone, _ = generate(capsys, *argv)
    command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "4", "--no-python", warm_mlra, "generate", *argv,
         "--weight-mode", "sharded", "--context-parallel", "2", "--page-size", "16"],
        capture_output=True, text=True, env=ENV, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == alone
    # Two of the four latents, and the RoPE key, of one token in two; a page of the two on each.
    assert "tensor parallel 2 (sharded), context parallel 2" in done.stderr
    size = 2 * 40 * 4
    said = f"{size // 2} KV bytes per token and rank in float32, {16 * size:,} allocated"
    assert said in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is no prompt; use --prompt TEXT or --prompt-file FILE"),
        (["--prompt-file", "/nowhere"], "/nowhere: No such file or directory"),
        (["--prompt", "x", "--max-new-tokens", 40], "make 41 tokens, more than the context of 32;"),
        (["--prompt", "x", "--temperature", 1e-40], "temperature is 1e-40; use 0 (greedy) or more"),
        (
            ["--prompt", "x", "--context-parallel", 2],
            "context parallel size 2 does not divide the number of processes, 1; use one of 1, or",
        ),
        (["--prompt", "x", "--output", "/"], "--output / is a folder; name a file in it"),
        (
            ["--prompt", "x", "--output", "/proc/no/x"],
            "--output /proc/no/x: the folder /proc/no cannot be",
        ),
        (
            ["--prompt", "x", "--max-new-tokens", 4, "--backend", "mlra_kernels"],
            "backend mlra_kernels need a CUDA device, this is cpu; use backend torch",
        ),
        (
            ["--prompt", "abc", "--max-new-tokens", 9, "--cache-tokens", 8],
            "--cache-tokens is 8 and the longest prompt with its output takes 11",
        ),
        (["--prompt", "x", "--tokenizer", "hf"], "the hf tokenizer needs --tokenizer-model"),
        (["--prompt", "x", "--page-size", 10, "--max-new-tokens", 4], "page size is 10; use"),
    ],
)
def test_bad_input_is_one_line(checkpoint, capsys, argv, message):
    device = [] if "mlra_kernels" not in argv else ["--device", "cpu"]
    code, out, err = generate(capsys, checkpoint, *argv, *device)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_cache_beyond_the_memory_is_one_line(checkpoint, capsys):
    argv = ["--prompt", "x", "--max-new-tokens", 4, "--cache-tokens", 10**13, "--device", "cpu"]
    code, out, err = generate(capsys, checkpoint, *argv)
    assert code == 1 and not out and err.count("error: ") == 1
    assert "error: can't allocate memory: you tried to allocate " in err
    assert err.endswith("; use --cache-tokens\n")


def test_a_wrong_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        main(["folder", "--max-new-tokens", "many"])
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1
    assert err == "error: argument --max-new-tokens: many is no whole number of at least 1\n"


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path, capsys):
    for folder, message in ((tmp_path, "holds no checkpoint"), (tmp_path / "no", "not a folder")):
        code, _, err = generate(capsys, folder, "--prompt", "x")
        assert code == 2 and message in err and err.count("\n") == 1


def test_prompts_of_json_lines_from_windows(tmp_path):
    file = tmp_path / "PROMPTS.JSONL"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"text": "b"}\r\n')
    args = flags.parser().parse_args(["folder", "--prompt-file", str(file)])
    assert flags.read_prompts(args) == ["a", "b"]


def test_bad_prompt_files_name_the_line(checkpoint, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    code, _, err = generate(capsys, checkpoint, "--prompt-file", file)
    assert code == 2 and err == f"error: {file}:2: not an object with `prompt` or `text`\n"
    file.write_bytes(b"\xff\xfe")
    code, _, err = generate(capsys, checkpoint, "--prompt-file", file)
    assert code == 2 and err == f"error: {file} is not UTF-8 text\n"


def test_streamed_text_never_shows_half_a_character():
    growing, ids = GrowingText(ByteTokenizer().detokenize), list("a€b".encode())
    pieces = [growing.more(ids[:n]) for n in range(1, len(ids) + 1)]
    assert pieces == ["a", "", "", "€", "b"]
    assert GrowingText(ByteTokenizer().detokenize).more(ids[:2], last=True) == "a\ufffd"
