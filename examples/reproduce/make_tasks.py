"""Make tasks from held-out books: a cloze set, and long contexts with known answers.

    python examples/reproduce/make_tasks.py --text DATA --tokens TOKENS --out TASKS

DATA is the folder that corpus.py wrote, TOKENS the folder that tokenized.py wrote. Writes
TASKS/cloze.jsonl, TASKS/long_LENGTH.jsonl for each length, and TASKS/tasks.json with the number of
items and the SHA-256 of each file.
`mlra evaluate CHECKPOINT --task TASKS/*.jsonl` scores them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from cloze import Book, cloze, sentences
from long_context import Maker, long_context
from megatron_mlra.command_line.parser import OneLineParser, lines_of, run, write_json, write_text

LENGTHS = (512, 1024, 2048, 4096, 8192)


def read_books(file: Path) -> list[Book]:
    """The documents of JSON lines {name, text}, as sentences."""
    found = []
    for line in filter(None, lines_of(file)):
        told = json.loads(line)
        found.append(Book(told["name"], sentences(told["text"])))
    return [book for book in found if book.sentences]


def write(file: Path, items: Iterable[dict]) -> dict:
    """Write items as JSON lines; returns the number of items and the file's SHA-256."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    text = "".join(lines)
    write_text(file, text)
    return {"items": len(lines), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def build(args) -> dict:
    """Write all tasks and tasks.json; returns the content of tasks.json.

    Raises:
        ValueError: the books are too few, or a length is too short.
    """
    from tokenizers import Tokenizer

    for file in (args.text / "books.jsonl", args.tokens / "tokenizer" / "tokenizer.json"):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; run corpus.py and tokenized.py")
    books = read_books(args.text / "books.jsonl")
    tokenizer = Tokenizer.from_file(str(args.tokens / "tokenizer" / "tokenizer.json"))
    args.out.mkdir(parents=True, exist_ok=True)

    @lru_cache(100_000)
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    made = {"cloze": write(args.out / "cloze.jsonl", cloze(books, args.cloze_items, *args.words))}
    maker = Maker(books, count)
    for length in args.lengths:
        items = long_context(maker, length, args.items, args.seed)
        made[f"long_{length}"] = write(args.out / f"long_{length}.jsonl", items)
    report = {"seed": args.seed, "books": len(books), "files": made}
    write_json(args.out / "tasks.json", report, indent=1)
    return report


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenized.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of an item")
    parser.add_argument("--items", type=int, default=50, help="items per long task and length")
    parser.add_argument("--cloze-items", type=int, default=2000, help="most items of the cloze set")
    parser.add_argument(
        "--words",
        type=int,
        nargs=2,
        default=(50, 100),
        metavar=("FEWEST", "MOST"),
        help="words of a cloze passage",
    )
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    try:
        for name, made in build(args)["files"].items():
            print(f"{name}: {made['items']:,} items, SHA-256 {made['sha256']}")
    except (ValueError, OSError, KeyError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    run(main)
