"""Data: text to Megatron datasets, and tokenizers.

Start with pipeline.py (all of preprocessing) and tokenizers.py. index.py and contents.py check the
files that a trainer reads.

May import:   command_line; numpy, pyarrow, tokenizers, and no torch
Imported by:  benchmarks, checkpoint, evaluation, training
Never:        torch or Megatron, until a dataset is written
Held by:      tests/unit/data
"""

from megatron_mlra.data.demo_corpus import CorpusSize, write_demo_corpus
from megatron_mlra.data.errors import BadRecordError, InputError
from megatron_mlra.data.metadata import read_metadata
from megatron_mlra.data.pipeline import PreprocessConfig, preprocess
from megatron_mlra.data.tokenizers import (
    ByteTokenizer,
    HFTokenizer,
    TiktokenTokenizer,
    TokenizerSpec,
    build_tokenizer,
)

__all__ = [
    "BadRecordError",
    "ByteTokenizer",
    "CorpusSize",
    "HFTokenizer",
    "InputError",
    "PreprocessConfig",
    "TiktokenTokenizer",
    "TokenizerSpec",
    "build_tokenizer",
    "preprocess",
    "read_metadata",
    "write_demo_corpus",
]
