"""Commands that read a checkpoint write their results again, and not over a file of the user's."""

from __future__ import annotations

import pytest

from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.data.pipeline import PreprocessConfig, preprocess
from megatron_mlra.data.tokenizers import TokenizerSpec
from megatron_mlra.evaluation.analysis.cli import main as analyze
from megatron_mlra.evaluation.cli import main as evaluate
from megatron_mlra.inference.cli import main as generate
from support.random_checkpoint import RandomFolder, latent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    write_huggingface(RandomFolder(latent(4, 4)), folder / "hf", tokenizer="byte", progress=False)
    text = folder / "text.txt"
    text.write_text("A text that is held out, of which windows are taken. " * 8)
    preprocess(PreprocessConfig((str(text),), str(folder / "set"), TokenizerSpec("byte")))
    return folder


CACHES = "--data set={place}/set --cache-dtype float32 --max-length 60 --windows 1 --json"


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (evaluate, "--text {place}/text.txt --data a={place}/set --json"),
        (evaluate, CACHES),
        (analyze, "--text {place}/text.txt --tokens 64 --no-ablation --json"),
        (analyze, "--text {place}/text.txt --tokens 64 --no-ablation --plot"),
        (generate, "--prompt a --prompt b --max-new-tokens 2 --output"),
    ],
)
def test_a_result_is_written_again_and_no_other_file(main, argv, place, tmp_path, capsys):
    words = [str(place / "hf"), "--device", "cpu", *argv.format(place=place).split()]
    out = tmp_path / "a.png"
    for _ in range(2):
        assert main([*words, str(out)]) == 0, capsys.readouterr().err
    for theirs in ("hf/config.json", "text.txt", "hf/tokenizer.json"):
        kept = (place / theirs).read_bytes()
        mine = tmp_path / "mine.png"
        mine.write_bytes(kept)
        assert main([*words, str(mine)]) == 2
        assert "remove it, or name another file" in capsys.readouterr().err
        assert mine.read_bytes() == kept
