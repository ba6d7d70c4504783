"""Honest inputs of every kind, small enough that a tool reads one in milliseconds."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY, TorchDistFolder
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.checkpoint.research.folder import write_research
from megatron_mlra.data.cli import main as preprocess
from megatron_mlra.data.shards import MAGIC, VERSION
from support import CONFIGS
from support.hostile import change_index
from support.random_checkpoint import RandomFolder, grouped, latent

SMALL = {
    "num_layers": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 257,
    "max_position_embeddings": 32,
}
MLRA = latent(
    4,
    4,
    **SMALL,
    q_lora_rank=8,
    kv_lora_rank=16,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
)
WIDE = MLRA.replace(vocab_size=300, eod_token_id=None)
"""For tokenizers of more than bytes."""
GQA = grouped(2, **SMALL, head_dim=4)

PRESET = """\
base: debug
num_layers: 1
hidden_size: 16
ffn_hidden_size: 24
num_attention_heads: 4
num_latent_heads: 4
num_branches: 4
q_lora_rank: 8
kv_lora_rank: 16
qk_nope_head_dim: 4
qk_rope_head_dim: 4
v_head_dim: 4
norm_epsilon: 1.0e-6
seq_length: 32
max_position_embeddings: 32
padded_vocab_size: 384
split: 80,10,10
train_iters: 4
lr_warmup_iters: 1
min_lr: 2.0e-4
global_batch_size: 2
micro_batch_size: 1
eval_interval: 2
eval_iters: 1
"""
TEXT = "The quick brown fox jumps over the lazy dog, 0123456789 times.\n"


def build(root: Path) -> dict[str, list[Path]]:
    """Make all honest inputs below `root`; kind -> folders of one input each."""
    made: dict[str, list[Path]] = {}
    for kind, makers in KINDS.items():
        for name, make in makers.items():
            folder = root / kind / name
            folder.mkdir(parents=True)
            make(folder)
            made.setdefault(kind, []).append(folder)
    return made


# -- checkpoints -----------------------------------------------------------------------------------


def _megatron(folder: Path) -> None:
    write_megatron(RandomFolder(MLRA), folder / "in", progress=False)
    write_preset(folder / "preset.yaml")


def write_wide(folder: Path) -> None:
    """A model of as many tokens as the honest tokenizer has."""
    write_megatron(RandomFolder(WIDE), folder, progress=False)


def _megatron_of_a_run(folder: Path) -> None:
    """As older runs leave it: a step, arguments in common.pt, two steps, no manifest."""
    _megatron(folder)
    root = folder / "in"
    release = root / "release"
    (release / MANIFEST).unlink(missing_ok=True)
    state = TorchDistFolder(release).common_state() | {"iteration": 4}
    torch.save(state, release / "common.pt")

    def without_common(index) -> None:
        del index.state_dict_metadata[COMMON_KEY]
        for at in [at for at in index.storage_data if at.fqn == COMMON_KEY]:
            del index.storage_data[at]

    change_index(release, without_common)
    release.rename(root / "iter_0000004")
    shutil.copytree(root / "iter_0000004", root / "iter_0000002")
    (root / "latest_checkpointed_iteration.txt").write_text("4")


def _huggingface(folder: Path) -> None:
    write_huggingface(RandomFolder(MLRA), folder / "in", tokenizer="byte", progress=False)


def _huggingface_shards(folder: Path) -> None:
    write_huggingface(RandomFolder(GQA), folder / "in", max_shard_bytes=3000, progress=False)


def _research(folder: Path) -> None:
    write_research(RandomFolder(MLRA), folder / "in", progress=False)


def _research_bins(folder: Path) -> None:
    write_research(RandomFolder(GQA), folder / "in", file_format="bin", progress=False)


# -- data ------------------------------------------------------------------------------------------


def _data(folder: Path) -> None:
    (folder / "in").mkdir()
    lines = [json.dumps({"text": f"{i} {TEXT}"}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    argv = ["--tokenizer", "byte", "--output-prefix", str(folder / "in/text")]
    unseen = io.StringIO()
    with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
        assert preprocess([*argv, "--input", str(folder / "text.jsonl")]) == 0
    (folder / "text.jsonl").unlink()
    write_preset(folder / "preset.yaml")


def _foreign_data(folder: Path) -> None:
    """As Megatron's own tool leaves it: no metadata."""
    _data(folder)
    (folder / "in/text.json").unlink()


def write_preset(file: Path) -> None:
    """The preset of the model of the honest checkpoints."""
    file.write_text(PRESET)


def _preset(folder: Path) -> None:
    (folder / "in").mkdir()
    # A model that has a twin of as many parameters.
    text = (CONFIGS / "debug.yaml").read_text()
    (folder / "in/preset.yaml").write_text(text.replace("recipes/", f"{CONFIGS}/recipes/"))


def _preset_chain(folder: Path) -> None:
    _preset(folder)
    preset = folder / "in/preset.yaml"
    preset.rename(folder / "in/model.yaml")
    preset.write_text("base: model.yaml\nnum_layers: 2\ntrain_iters: 60\n")


# -- text ------------------------------------------------------------------------------------------


def _lines(folder: Path) -> None:
    (folder / "in").mkdir()
    task = {"prompt": "a", "context": "a", "choices": ["b", "c"], "answer": 1}
    items = [{"text": f"{i} {TEXT}", **task, "more": [i, {"x": None}]} for i in range(6)]
    (folder / "in/text.jsonl").write_text("\n".join(map(json.dumps, items)))


def _gzip(folder: Path) -> None:
    _lines(folder)
    plain = folder / "in/text.jsonl"
    (folder / "in/text.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


def _zstd(folder: Path) -> None:
    import zstandard

    (folder / "in").mkdir()
    packed = zstandard.ZstdCompressor().compress(TEXT.encode() * 30)
    (folder / "in/text.txt.zst").write_bytes(packed)


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (folder / "in").mkdir()
    table = pyarrow.table({"text": [f"{i} {TEXT}" for i in range(8)], "n": list(range(8))})
    parquet.write_table(table, folder / "in/text.parquet")


def _shards(folder: Path) -> None:
    (folder / "in").mkdir()
    tokens = np.arange(300, dtype=np.uint16) % 256
    tokens[::50] = 256
    header = np.zeros(256, np.int32)
    header[:3] = MAGIC, VERSION, len(tokens)
    (folder / "in/shard.bin").write_bytes(header.tobytes() + tokens.tobytes())


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    (folder / "in").mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 4], trainer)
    tokenizer.save(str(folder / "in/tokenizer.json"))
    (folder / "in/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


Maker = Callable[[Path], None]
KINDS: dict[str, dict[str, Maker]] = {
    "megatron": {"converted": _megatron, "saved": _megatron_of_a_run},
    "huggingface": {"whole": _huggingface, "shards": _huggingface_shards},
    "research": {"whole": _research, "bins": _research_bins},
    "data": {"own": _data, "foreign": _foreign_data},
    "preset": {"one": _preset, "chain": _preset_chain},
    "text": {
        "lines": _lines,
        "gzip": _gzip,
        "zstd": _zstd,
        "parquet": _parquet,
        "shards": _shards,
    },
    "tokenizer": {"bpe": _tokenizer},
}
