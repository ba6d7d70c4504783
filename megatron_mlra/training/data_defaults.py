"""Arguments that follow from others: the vocabulary from the data, steps from samples.

What a command line says wins; a preset's values, made for other data or another length, give way.
"""

from __future__ import annotations

import re
from argparse import Namespace

from megatron_mlra.command_line.parser import flag, flags_given
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.metadata import read_metadata

_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_NUMBER = re.compile(r"[-+.\deE]+")


def complete(args: Namespace, argv: list[str]) -> None:
    """Fill in what the command line `argv` leaves open."""
    given = flags_given(argv)
    _take_vocabulary(args, given)
    if "--train-samples" in given and "--train-iters" not in given:
        _count_samples(args, given)


def _take_vocabulary(args: Namespace, given: set[str]) -> None:
    """Vocabulary and end of document of the data's metadata, which says what the ids mean."""
    if args.tokenizer_type != "NullTokenizer" or args.mock_data:
        return
    known = []
    for prefix in dict.fromkeys(p for name in _DATA for p in getattr(args, name) or ()):
        if not _NUMBER.fullmatch(prefix):
            try:
                known.append(read_metadata(prefix) or {})
            except InputError:  # named when the data are checked
                known.append({})
    if "--vocab-size" in given:
        _fit_padding(args)
    else:
        sizes = [m["vocab_size"] for m in known if isinstance(m.get("vocab_size"), int)]
        if sizes and max(sizes) > (args.vocab_size or 0):
            args.vocab_size = max(sizes)
            _fit_padding(args)
    ends = {m.get("eod_id") for m in known}
    if "--null-tokenizer-eod-id" not in given and len(ends) == 1 and ends != {None}:
        args.null_tokenizer_eod_id = ends.pop()


def _fit_padding(args: Namespace) -> None:
    """The rows that a preset pads to are those of its own vocabulary."""
    if args.padded_vocab_size is not None and args.padded_vocab_size < args.vocab_size:
        args.padded_vocab_size = None


def _count_samples(args: Namespace, given: set[str]) -> None:
    """A preset's schedule in steps as the same one in samples, as Megatron wants it."""
    args.train_iters = None
    batch = args.global_batch_size or args.micro_batch_size
    for steps, samples, none in (
        ("lr_warmup_iters", "lr_warmup_samples", 0),
        ("lr_decay_iters", "lr_decay_samples", None),
    ):
        count = getattr(args, steps)
        if flag(steps) in given or not count:
            continue
        setattr(args, steps, none)
        if flag(samples) not in given:
            setattr(args, samples, count * batch)
