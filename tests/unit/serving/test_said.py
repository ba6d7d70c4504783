"""What `mlra serve` says: an example request, and why vLLM ended."""

from __future__ import annotations

import json
import shlex

import pytest

from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.serving import cli
from megatron_mlra.serving.server import last_error
from support.random_checkpoint import RandomFolder, latent

SERVED = latent(4, 4, qk_rope_head_dim=32, kv_lora_rank=256)


def test_the_example_without_a_tokenizer_asks_for_token_ids(capsys):
    # Without a tokenizer the server's answer has no text.
    cli._say(cli.parser().parse_args(["runs/my"]), "127.0.0.1", "my", False, False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("curl ")]
    assert json.loads(shlex.split(line)[-1])["return_token_ids"] is True


def test_a_value_that_vllm_refuses_is_named(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "(APIServer pid=1) pydantic_core.ValidationError: 2 validation errors for CacheConfig\n"
        "(APIServer pid=1) block_size\n"
        "(APIServer pid=1)   Input should be greater than 0 [type=greater_than, input_value=0,"
        " input_type=int]\n"
        "(APIServer pid=1)     For further information visit a page\n"
        "(APIServer pid=1) gpu_memory_utilization\n"
        "(APIServer pid=1)   Input should be less than or equal to 1 [type=less_than_equal,"
        " input_value=1.5, input_type=float]\n"
        "(APIServer pid=1)     For further information visit a page\n"
    )
    assert last_error(log) == (
        "block_size: Input should be greater than 0, and is 0;"
        " gpu_memory_utilization: Input should be less than or equal to 1, and is 1.5"
    )


def test_a_run_that_cannot_hold_its_export_names_the_flag(tmp_path):
    run = tmp_path / "run"
    write_megatron(RandomFolder(SERVED), run, progress=False)
    (run / "exported").touch()
    args = cli.parser().parse_args([str(run)])
    with pytest.raises(ValueError, match=r"cannot be written: .* \(--export-to FOLDER\)$"):
        cli.exported(args, run, cli.opened(args, run))
