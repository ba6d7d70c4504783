"""Train the tokenizer on the training text and turn every set into a Megatron dataset.

    python examples/reproduce/tokenized.py --text DATA --out TOKENS

DATA is the folder that corpus.py wrote. Writes TOKENS/tokenizer/; TOKENS/SET.bin, .idx and .json
for each DATA/SET.jsonl; and TOKENS/tokens.json with the tokens and the SHA-256 of each set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_mlra.command_line.parser import OneLineParser, run, write_json
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.data.metadata import read_metadata
from megatron_mlra.data.pipeline import PreprocessConfig, preprocess
from megatron_mlra.data.tokenizers import TokenizerSpec

END = "<|endoftext|>"


def sample(file: Path, megabytes: float) -> Iterator[str]:
    """Every n-th text of a file of JSON lines, about `megabytes` (10^6 bytes) in all."""
    every = max(1, round(file.stat().st_size / (megabytes * 1e6)))
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % every == 0:
                yield json.loads(line)["text"]


def train_tokenizer(file: Path, folder: Path, vocab_size: int, megabytes: float) -> None:
    """Train byte-level BPE on a sample of the text, and write `tokenizer.json` and
    `tokenizer_config.json`.

    Raises:
        ValueError: the text has too few different byte pairs for `vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(file, megabytes), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"{file}: its text gives {tokenizer.get_vocab_size()} tokens, not --vocab-size"
            f" {vocab_size}; use a smaller vocabulary or more text"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": END})


def build(args) -> dict:
    """Write the tokenizer, the datasets and tokens.json; returns the content of tokens.json. A
    tokenizer or dataset that is already complete is kept.

    Raises:
        ValueError: there is no text, or too little for the vocabulary; or the tokenizer that is
            there has another vocabulary.
    """
    from tokenizers import Tokenizer

    texts = sorted(args.text.glob("*.jsonl"))
    if args.text / "train.jsonl" not in texts:
        raise ValueError(f"{args.text}/train.jsonl does not exist; run corpus.py --out {args.text}")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = args.out / "tokenizer"
    if not (tokenizer / "tokenizer_config.json").is_file():
        train_tokenizer(args.text / "train.jsonl", tokenizer, args.vocab_size, args.sample_mb)
    size = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    if size != args.vocab_size:
        raise ValueError(
            f"{tokenizer} has {size} tokens, not --vocab-size {args.vocab_size}; give another --out"
        )
    report = {"tokenizer_sha256": sha256(tokenizer / "tokenizer.json"), "sets": {}}
    for file in texts:
        prefix = args.out / file.stem
        if read_metadata(str(prefix)) is None:
            preprocess(
                PreprocessConfig(
                    inputs=(str(file),),
                    output_prefix=str(prefix),
                    tokenizer=TokenizerSpec(type="hf", model=str(tokenizer), eod_token=END),
                    workers=args.workers,
                )
            )
        made = read_metadata(str(prefix))
        report["sets"][file.stem] = {
            "documents": made["documents"],
            "tokens": made["tokens"],
            "eod_id": made["eod_id"],
            "sha256": sha256(prefix.with_name(f"{prefix.name}.bin")),
        }
        print(f"{file.stem}: {report['sets'][file.stem]}", flush=True)
    write_json(args.out / "tokens.json", report, indent=1)
    return report


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the datasets")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument(
        "--sample-mb", type=float, default=40, help="megabytes of text to train the tokenizer on"
    )
    parser.add_argument("--workers", type=int, default=2, help="tokenising processes")
    args = parser.parse_args()
    try:
        build(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    run(main)
