"""Text to Megatron datasets (imports neither torch nor Megatron until it writes)."""

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
