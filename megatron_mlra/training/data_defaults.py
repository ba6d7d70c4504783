"""Arguments that follow from others: the vocabulary from the data, the unit of the schedule.

Values of the command line win. Values of a preset give way, since a preset was made for other data
or for another length.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_mlra.command_line.parser import flags_given
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.metadata import read_metadata
from megatron_mlra.data.prefixes import without_weights
from megatron_mlra.training import batch_schedule, data_sources, schedule


def complete(args: Namespace, argv: list[str]) -> None:
    """Set the arguments that follow from the data and from each other, unless `argv` sets them.

    Raises:
        ValueError: `argv` gives the schedule in two units (schedule.settle), or data by two flags.
    """
    given = flags_given(argv)
    data_sources.settle(args, given)
    _take_vocabulary(args, given)
    schedule.settle(args, given)
    batch_schedule.settle(args, given)


def _take_vocabulary(args: Namespace, given: set[str]) -> None:
    """Take vocabulary size and end-of-document id from the data's metadata."""
    if args.tokenizer_type != "NullTokenizer" or args.mock_data:
        return
    known = []
    for prefix in without_weights(
        p for name in data_sources.PREFIXES for p in getattr(args, name) or ()
    ):
        try:
            known.append(read_metadata(prefix) or {})
        except InputError:  # the check of the data reports the error
            known.append({})
    if "--vocab-size" in given:
        _fit_padding(args, given)
    else:
        sizes = [m["vocab_size"] for m in known if isinstance(m.get("vocab_size"), int)]
        if sizes and max(sizes) > (args.vocab_size or 0):
            args.vocab_size = max(sizes)
            _fit_padding(args, given)
    ends = {m.get("eod_id") for m in known}
    if "--null-tokenizer-eod-id" not in given and len(ends) == 1 and ends != {None}:
        args.null_tokenizer_eod_id = ends.pop()


def _fit_padding(args: Namespace, given: set[str]) -> None:
    """Drop a preset's padded vocabulary size where the vocabulary is larger."""
    if "--padded-vocab-size" in given:
        return  # the check of values refuses it
    if args.padded_vocab_size is not None and args.padded_vocab_size < args.vocab_size:
        args.padded_vocab_size = None
