"""What guesses of multi-token prediction are worth, by a small model that is trained for it.

    python examples/reproduce/multi_token.py --tokens TOKENS --work WORK

TOKENS is the folder that tokenized.py wrote. WORK gets the checkpoint, a JSON per measurement and
multi_token.json. A stage whose file is there is skipped. WORK/commands.json tells by which commands
a file is made: with other flags the folder is refused. The stages:

1. A model of the ladder is trained with one layer of multi-token prediction.
2. The engine continues pieces of the held-out books by it, without guesses and with them: how many
   guesses are right, and what the small model gains, which the host bounds.
3. The steps of a large model with random weights are timed, without guesses and with them. Random
   weights make no right guesses, but a step takes as long as with right ones.

The last column of the table is no measurement of one model: it is the tokens per step of the small
model (stage 2) over the ratio of the large model's step times (stage 3).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import made_by  # noqa: E402

sys.path.remove(str(HERE))  # its modules have everyday names, which would shadow others'

from megatron_mlra.command_line.parser import (  # noqa: E402
    OneLineParser,
    fail,
    make_folder,
    run,
    write_json,
)

Record = dict[str, Any]


def train(args: Any, checkpoint: Path) -> list[str]:
    """The command that trains the small model."""
    flags = [
        *("--config", args.config, "--mtp-num-layers", 1),
        *("--data-path", args.tokens / "train", "--held-out", f"books={args.tokens / 'books'}"),
        *("--train-iters", args.steps, "--lr", args.lr, "--min-lr", args.lr / 10),
        *("--seed", 1, "--data-seed", 1234, "--data-cache-path", args.work / "cache"),
        # A stage that was interrupted goes on where it stopped.
        *("--save", checkpoint, "--load", checkpoint),
    ]
    if args.rehearse:
        flags.append("--no-bf16")
    return [sys.executable, str(ROOT / "pretrain_mlra.py"), *map(str, flags)]


def measure(words: list[Any], file: Path) -> list[str]:
    """The command that measures guesses and writes `file`."""
    command = [sys.executable, "-m", "megatron_mlra.command_line", "benchmark-decoding"]
    return [*command, "--speculate", *map(str, words), "--json", str(file)]


def stages(args: Any) -> list[tuple[list[str], Path]]:
    """(Command, the file that it writes at its end) of each stage."""
    checkpoint = args.work / "checkpoint"
    batches = ["--batches", *args.batches]
    own = [checkpoint, "--data", args.tokens / "books", "--temperature", *args.temperature]
    own += ["--contexts", args.prompt, "--new-tokens", args.new_tokens, *batches]
    shape = ["--configs", args.shape, "--contexts", args.context, "--new-tokens", 48, *batches]
    if args.rehearse:
        shape = ["--rehearse", "--configs", args.shape, "--contexts", 40, "--new-tokens", 4]
        shape += batches
    trained, large = args.work / "trained.json", args.work / "large.json"
    return [
        (train(args, checkpoint), checkpoint / "held_out.json"),
        (measure(own, trained), trained),
        (measure(shape, large), large),
    ]


def origins(args: Any) -> dict[str, list[list[str]]]:
    """What the stages leave in WORK, by name -> the commands that it comes of, flags alone: the
    second stage measures the first one's model."""
    (train, checkpoint), (own, trained), (shape, large) = stages(args)
    made = {checkpoint.parent: [train], trained: [train, own], large: [shape]}
    return {what.name: [_flags(args, each) for each in made[what]] for what in made}


def _flags(args: Any, command: list[str]) -> list[str]:
    """A command from its first flag on; WORK and the checkout may be moved."""
    return made_by.flags_of(command, {str(args.work): "WORK", str(ROOT): "ROOT"})


def joined(trained: list[Record], large: list[Record]) -> list[Record]:
    """The records of the trained model, each with the steps of the large model at its batch."""
    steps = {r["batch"]: r for r in large}
    found = []
    for r in trained:
        other = steps[r["batch"]]
        ratio = other["guessing_ms"] / other["plain_ms"]
        found.append({
            **r, "acceptance": r["right"] / max(r["guessed"], 1), "large": other["label"],
            "large_context": other["context"], "large_plain_ms": other["plain_ms"],
            "large_guessing_ms": other["guessing_ms"],
            "implied_speed_up": r["guessing_tokens_per_step"] / ratio,
        })  # fmt: skip
    return found


def table(records: list[Record], shape: str) -> str:
    """Markdown, one line per batch and temperature."""
    lines = [
        "| batch | temperature | guesses right | tokens per step | small model, tokens/s"
        f" | with guesses | speed-up | {shape}, ms per step | with guesses | implied speed-up |",
        "|---" * 10 + "|",
    ]
    for r in records:
        rates = [
            1e3 * r["batch"] * r[f"{way}_tokens_per_step"] / r[f"{way}_ms"]
            for way in ("plain", "guessing")
        ]
        lines.append(
            f"| {r['batch']} | {r['temperature']:g} | {r['right']} of {r['guessed']}"
            f" ({r['acceptance']:.0%}) | {r['guessing_tokens_per_step']:.2f} | {rates[0]:,.0f}"
            f" | {rates[1]:,.0f} | {r['speed_up']:.2f} | {r['large_plain_ms']:.2f}"
            f" | {r['large_guessing_ms']:.2f} | {r['implied_speed_up']:.2f} |"
        )
    return "\n".join(lines)


def parser() -> OneLineParser:
    """The flags."""
    flags = OneLineParser(description=__doc__.split("\n", 1)[0])
    add = flags.add_argument
    add("--tokens", type=Path, required=True, help="folder of tokenized.py")
    add("--work", type=Path, required=True, help="folder of the checkpoint and the measurements")
    add("--config", default=str(HERE / "presets" / "small_mlra4.yaml"), help="what is trained")
    add("--steps", type=int, default=900, help="of training (default: 900, 59 M tokens)")
    add("--lr", type=float, default=3e-3, help="peak rate (default: the ladder's best, 3e-3)")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.7])
    add("--batches", type=int, nargs="+", default=[1, 8])
    add("--prompt", type=int, default=256, help="tokens of a prompt (default: 256)")
    add("--new-tokens", type=int, default=256, help="behind each prompt (default: 256)")
    add("--shape", default="mlra4_2.9b", help="preset whose steps are timed")
    add("--context", type=int, default=8192, help="tokens in its cache (default: 8192)")
    add("--rehearse", action="store_true", help="on a CPU; of --shape nothing is timed")
    return flags


def main() -> int:
    """Run the stages; returns the exit code of one that failed, 2 for a WORK of other flags, or
    0."""
    args = parser().parse_args()
    args.tokens, args.work = args.tokens.resolve(), args.work.resolve()
    try:
        make_folder(args.work, f"--work {args.work}")
        made_by.begin(args.work, origins(args), "give another --work, or remove it")
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    for command, file in stages(args):
        if file.is_file():
            continue
        print(f"stage: {' '.join(command[1:4])} ... -> {file}", flush=True)
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode or not file.is_file():
            return done.returncode or 1
    read = [json.loads((args.work / f"{n}.json").read_text()) for n in ("trained", "large")]
    records = joined(*(told["records"] for told in read))
    about = {k: v for k, v in read[0].items() if k != "records"}
    write_json(args.work / "multi_token.json", {**about, "records": records}, indent=1)
    print(table(records, args.shape))
    return 0


if __name__ == "__main__":
    run(main)
