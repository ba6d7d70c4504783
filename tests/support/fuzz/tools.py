"""The tools that read each kind of input. A tool is run by its own `main` in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_mlra.checkpoint.cli import main as convert
from megatron_mlra.data.cli import main as preprocess
from megatron_mlra.evaluation.analysis.cli import main as analyze
from megatron_mlra.evaluation.cli import main as evaluate
from megatron_mlra.inference.cli import main as generate
from megatron_mlra.planner.cli import main as plan
from megatron_mlra.planner.twin_cli import main as twin
from megatron_mlra.training import cli as training


@dataclass(frozen=True)
class Call:
    """One run of a tool.

    Attributes:
        name: the tool and its main flags.
        writes: the folder, file or prefix that the tool makes.
        may_fail: exit codes other than 0 and 2 that are right for some inputs.
    """

    name: str
    main: Callable[[list[str]], int | None]
    argv: tuple[object, ...]
    writes: Path | None = None
    may_fail: tuple[int, ...] = ()

    def run(self) -> int:
        """The exit code."""
        try:
            return self.main([*map(str, self.argv)]) or 0
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1


class Met(BaseException):
    """Raised where `mlra pretrain` has checked all that it checks before ranks meet."""


def entry(argv: list[str]) -> int:
    """Run `mlra pretrain` up to the meeting of ranks, with rank 0's checks of the data. Call once
    per process."""
    from megatron_mlra.training import batches, meeting

    def meet(args, given, lock):
        batches.check_data_contents(args, lambda _: None)
        raise Met

    meeting.meet_all = meet
    sys.argv = ["mlra pretrain", *argv]
    try:
        return training.main()
    except Met:
        return 0


def calls(kind: str, folder: Path, out: Path) -> Iterator[Call]:
    """The tools that read this kind of input, in order; `mlra pretrain` comes last."""
    source = folder / "in"
    if kind in ("megatron", "huggingface", "research"):
        yield from _checkpoint(kind, source, out)
    if kind == "megatron":
        config = ("--config", folder / "preset.yaml", "--mock-data", "--vocab-size", 257)
        yield Call("entry --load", entry, (*config, "--load", source, "--no-load-optim"))
    elif kind == "data":
        prefix = source / "text"
        yield Call(
            "evaluate --data",
            evaluate,
            (folder.parent / "honest/model", "--data", f"x={prefix}", "--device", "cpu"),
        )
        data = ("--data-path", prefix, "--data-cache-path", out / "cache")
        yield Call("entry --data-path", entry, ("--config", folder / "preset.yaml", *data))
    elif kind == "preset":
        preset = source / "preset.yaml"
        yield Call("plan", plan, ("--config", preset, "--gpus", 2, "--json"), None, (1,))
        yield Call("twin", twin, (preset, "--attention", "gqa", "--output", out / "twin.yaml"))
        yield Call("entry --config", entry, ("--config", preset, "--mock-data"))
    elif kind == "text":
        yield from _text(source, out)
    elif kind == "tokenizer":
        text = folder.parent / "honest/text.txt"
        model = ("--tokenizer", "hf", "--tokenizer-model", source)
        argv = ("--input", text, "--output-prefix", out / "made", *model)
        yield Call("preprocess --tokenizer-model", preprocess, argv, out / "made", (1,))
        honest = folder.parent / "honest/wide"
        argv = (honest, out / "hf", "--tokenizer", source, "--quiet")
        yield Call("export-hf --tokenizer", convert, ("export-hf", *argv), out / "hf")
        argv = (honest, "--text", text, "--tokenizer", source, "--device", "cpu")
        yield Call("evaluate --tokenizer", evaluate, argv)


def _checkpoint(kind: str, source: Path, out: Path) -> Iterator[Call]:
    yield Call("inspect", convert, ("inspect", source), None, (1,))
    names = {
        "megatron": ("export-hf", "export-official", "reshard", "reshard --weights-only"),
        "huggingface": ("import-hf", "export-official"),
        "research": ("import-official", "export-hf"),
    }
    for name in names[kind]:
        command, *more = name.split()
        to = out / name.replace(" ", "")
        yield Call(name, convert, (command, source, to, "--quiet", *more), to)
    sizes = ("--tokens", 16, "--length", 8, "--quiet")
    yield Call("verify", convert, ("verify", source, source, *sizes))
    argv = (source, "--prompt", "ab", "--max-new-tokens", 2, "--output", out / "said.jsonl")
    yield Call("generate", generate, argv, out / "said.jsonl")
    argv = (source, "--text", source.parents[1] / "honest/text.txt", "--device", "cpu")
    yield Call("evaluate", evaluate, argv)
    if kind == "megatron":  # the honest ones of the other kinds have no latents
        yield Call("analyze", analyze, (*argv, "--tokens", 32, "--max-length", 16))


def _text(source: Path, out: Path) -> Iterator[Call]:
    """Tools that read text. The path is a pattern, because the edit may have removed the file."""
    honest = source.parents[1] / "honest/model"
    shards = any(source.glob("shard*"))
    tokenizer = ("--eod-id", 256) if shards else ("--tokenizer", "byte")
    for more in ((), ("--on-error", "skip"), ("--split-lines", "--max-record-mb", "0.001")):
        if more and shards:
            continue
        to = out / f"made{len(more)}"
        argv = ("--input", f"{source}/[st]*", "--output-prefix", to, *tokenizer, *more)
        yield Call("preprocess", preprocess, argv, to, (1,))
    for file in sorted(source.glob("text.jsonl")):
        argv = (honest, "--prompt-file", file)
        argv += ("--max-new-tokens", 2, "--output", out / "said.jsonl")
        yield Call("generate --prompt-file", generate, argv, out / "said.jsonl")
        yield Call("evaluate --task", evaluate, (honest, "--task", file, "--device", "cpu"))
        yield Call("evaluate --text", evaluate, (honest, "--text", file, "--device", "cpu"))
