"""Text to Megatron datasets (imports neither torch nor Megatron until it writes)."""

from .demo_corpus import CorpusSize, write_demo_corpus
from .errors import BadRecordError, InputError
from .metadata import read_metadata
from .pipeline import PreprocessConfig, preprocess
from .tokenizers import (
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
