"""Preprocessing, end to end: real files of each format, read back with Megatron's own reader."""

import base64
import gzip
import hashlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_mlra.checkpoint.tokenizer import checkpoint_tokenizer
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.data import (
    ByteTokenizer,
    HFTokenizer,
    TiktokenTokenizer,
    pipeline,
    read_metadata,
)
from megatron_mlra.data.cli import main
from megatron_mlra.data.encode import Encoded, token_dtype
from megatron_mlra.data.readers import BATCH_BYTES
from megatron_mlra.data.sources import Source
from megatron_mlra.data.writer import SUFFIXES

TEXTS = ["Hello, world\n", "naïve café ☕ 𓀀", 'tabs\tand "quotes"\r\nlines', "<|endoftext|>"]


@pytest.fixture(scope="session")
def indexed_dataset():
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture
def read(indexed_dataset):
    """Documents of a dataset as lists of ids, through Megatron's document boundaries."""

    def documents(prefix: Path) -> list[list[int]]:
        dataset = indexed_dataset.IndexedDataset(str(prefix))
        # One sequence a document.
        assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
        return [dataset[i].tolist() for i in range(len(dataset))]

    return documents


@pytest.fixture(scope="session")
def hf_file(tmp_path_factory) -> Path:
    """A small BPE tokenizer whose file also asks for truncation and padding."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the hat"] * 50, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_token="<|pad|>", pad_id=0)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    path.write_text(
        "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))
    )
    return path


def run(inputs, prefix, *options: str) -> int:
    names = [str(path) for path in inputs]
    return main(["--input", *names, "--output-prefix", str(prefix), *options])


def byte_documents(texts) -> list[list[int]]:
    return [[*text.encode(), 256] for text in texts]


def json_lines(texts, key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "id": 1}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path, read, name):
    raw = json_lines(TEXTS)
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    (tmp_path / name).write_bytes(compress.get(Path(name).suffix, bytes)(raw))
    assert run([tmp_path / name], tmp_path / "out", "--tokenizer", "byte") == 0
    assert read(tmp_path / "out") == byte_documents(TEXTS)


def test_json_lines_with_bom_blank_lines_no_final_newline_and_key(tmp_path, read):
    raw = b"\xef\xbb\xbf" + json_lines(TEXTS, "body") + b"\n  \n" + json_lines(["end"], "body")
    (tmp_path / "a.jsonl").write_bytes(raw.rstrip(b"\n"))
    options = ["--tokenizer", "byte", "--json-key", "body"]
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", *options) == 0
    assert read(tmp_path / "out") == byte_documents([*TEXTS, "end"])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files_and_their_lines(tmp_path, read, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    texts = ["one\n\ntwo\r\n  three", "ünï\n"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt{suffix}").write_bytes(compress[suffix](text.encode()))
    pattern = tmp_path / f"*.txt{suffix}"
    assert run([pattern], tmp_path / "files", "--tokenizer", "byte") == 0
    assert read(tmp_path / "files") == byte_documents(texts)
    assert run([pattern], tmp_path / "lines", "--tokenizer", "byte", "--split-lines") == 0
    assert read(tmp_path / "lines") == byte_documents(["one", "two", "  three", "ünï"])


def test_several_zstd_frames(tmp_path, read):
    frame = zstandard.ZstdCompressor().compress
    data = frame(json_lines(["first " * 50_000])) + frame(json_lines(["second"]))
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert run([tmp_path / "a.jsonl.zst"], tmp_path / "out", "--tokenizer", "byte") == 0
    assert read(tmp_path / "out") == byte_documents(["first " * 50_000, "second"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_parquet(tmp_path, read, kind):
    texts = [f"{text} {i}" for i in range(40) for text in TEXTS]
    column = (
        pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts, type=kind)
    )
    table = pa.table({"id": range(len(texts)), "body": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    options = ["--tokenizer", "byte", "--parquet-column", "body"]
    assert run([tmp_path / "a.parquet"], tmp_path / "out", *options) == 0
    assert read(tmp_path / "out") == byte_documents(texts)


def test_formats_mix_in_the_order_given(tmp_path, read):
    (tmp_path / "b.jsonl").write_bytes(json_lines(["b"]))
    (tmp_path / "a.txt").write_text("a")
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet")
    inputs = [tmp_path / name for name in ("b.jsonl", "a.txt", "c.parquet")]
    assert run(inputs, tmp_path / "out", "--tokenizer", "byte") == 0
    assert read(tmp_path / "out") == byte_documents(["b", "a", "c"])


def test_without_eod(tmp_path, read):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    options = ["--tokenizer", "byte", "--no-append-eod"]
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", *options) == 0
    assert read(tmp_path / "out") == [list(text.encode()) for text in TEXTS]


def test_the_bars_clock_starts_with_the_first_documents(monkeypatch):
    """And not while workers start."""
    bars, first = [], []

    def encoded():
        time.sleep(0.05)
        first.append(time.time())
        yield Encoded(0, np.zeros(3, np.uint16), np.array([3]), consumed=3)

    monkeypatch.setattr(pipeline, "bar", lambda **named: bars.append(bar(**named)) or bars[0])
    writer, source = SimpleNamespace(add=lambda *_: None), Source("a", "text", None, 3)
    pipeline._write(writer, encoded(), [source], "fail", print, progress=True)
    assert bars[0].start_t >= first[0]


def test_output_does_not_depend_on_workers(tmp_path, hf_file):
    """Several batches with bad records among them, so that order and counts could differ."""
    lines = []
    for i in range(3000):
        text = f"{i} the cat and the hat " * (i % 97)
        lines.append(json.dumps({"text": text}) if i % 500 != 7 else "{broken")
    raw = "\n".join(lines).encode()
    assert len(raw) > 3 * BATCH_BYTES
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.txt").write_text("the end")
    outputs = []
    for workers in (1, 3):
        prefix = tmp_path / f"out{workers}"
        options = ["--tokenizer", "hf", "--tokenizer-model", str(hf_file.parent)]
        options += ["--workers", str(workers), "--on-error", "skip"]
        assert run([tmp_path / "a.jsonl", tmp_path / "b.txt"], prefix, *options) == 0
        outputs.append([Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES])
    assert outputs[0] == outputs[1]
    metadata = read_metadata(str(tmp_path / "out3"))
    assert metadata["bad_records"] == 6
    assert metadata["empty_documents"] == sum(i % 97 == 0 for i in range(3000))
    assert metadata["documents"] == 3001 - 6 - metadata["empty_documents"]


def test_metadata_describes_the_dataset(tmp_path, read, hf_file):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["the cat", ""]) + b"[1]\n")
    (tmp_path / "b.txt").write_text("the dog")
    options = ["--tokenizer", "hf", "--tokenizer-model", str(hf_file), "--on-error", "skip"]
    assert run([tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "out", *options) == 0
    documents = read(tmp_path / "out")
    metadata = read_metadata(str(tmp_path / "out"))
    sources = metadata.pop("sources")
    tokenizer = metadata.pop("tokenizer")
    sums = metadata.pop("sha256")
    assert sums == {
        suffix: hashlib.sha256((tmp_path / f"out{suffix}").read_bytes()).hexdigest()
        for suffix in (".bin", ".idx")
    }
    assert metadata == {
        "version": 1,
        "vocab_size": Tokenizer.from_file(str(hf_file)).get_vocab_size(),
        "eod_id": 1,
        "append_eod": True,
        "dtype": "uint16",
        "documents": 2,
        "tokens": sum(map(len, documents)),
        "empty_documents": 1,
        "bad_records": 1,
        "on_error": "skip",
    }
    assert [source["documents"] for source in sources] == [1, 1]
    assert [source["bad_records"] for source in sources] == [1, 0]
    assert sources[0]["path"] == str(tmp_path / "a.jsonl")
    assert tokenizer["type"] == "hf" and len(tokenizer["sha256"]) == 64
    assert read_metadata(str(tmp_path / "absent")) is None


def test_hf_tokenizer_keeps_documents_whole(tmp_path, read, hf_file):
    long = "the cat and the dog " * 30
    (tmp_path / "a.jsonl").write_bytes(json_lines([long, *TEXTS]))
    options = ["--tokenizer", "hf", "--tokenizer-model", str(hf_file)]
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", *options) == 0
    documents = read(tmp_path / "out")
    decoder = Tokenizer.from_file(str(hf_file))
    byte_of = {char: byte for byte, char in _byte_level_alphabet().items()}
    for text, ids in zip([long, *TEXTS], documents, strict=True):
        assert ids[-1] == 1 and 1 not in ids[:-1]  # written <|endoftext|> is no EOD
        symbols = "".join(decoder.id_to_token(i) for i in ids[:-1])
        assert bytes(byte_of[char] for char in symbols).decode() == text


def _byte_level_alphabet() -> dict[int, str]:
    """Byte to symbol of byte-level BPE: printable bytes as they are, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def test_hf_eod_token_by_name(hf_file):
    assert HFTokenizer(str(hf_file), "<|pad|>").eod == 0


def test_tiktoken_ranks_file(tmp_path, read, ranks_file):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["the cat, the", "<|endoftext|>"]))
    options = ["--tokenizer", "tiktoken", "--tokenizer-model", str(ranks_file)]
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", *options) == 0
    first = [257, *b" cat,", 258, 259]
    assert read(tmp_path / "out") == [first, [*b"<|endoftext|>", 259]]
    assert read_metadata(str(tmp_path / "out"))["vocab_size"] == 260


def test_tiktoken_eod_id_and_pattern(ranks_file):
    tokenizer = TiktokenTokenizer(str(ranks_file), eod_id=300, pattern=r"[^e]+|e")
    assert (tokenizer.eod, tokenizer.vocab_size) == (300, 301)
    assert tokenizer.tokenize(" the") == [32, 256, 101]
    assert tokenizer.detokenize([257, 300]) == "the"


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    for text in TEXTS:
        assert tokenizer.tokenize(text) == list(text.encode())
        assert tokenizer.detokenize([*tokenizer.tokenize(text), 256]) == text
    assert tokenizer.detokenize([0xC3, 65, 300]) == "\ufffdA\ufffd"


@pytest.mark.parametrize(
    "options", [["hf"], ["hf", "<|pad|>"], ["tiktoken"], ["byte"]], ids="-".join
)
def test_a_model_speaks_what_its_data_was_made_with(options, tmp_path, read, hf_file, ranks_file):
    file = tmp_path / "model"
    source = {"hf": hf_file, "tiktoken": ranks_file}.get(options[0])
    named = ["--tokenizer", options[0]]
    if source:
        file.write_bytes(source.read_bytes())
        named += ["--tokenizer-model", str(file)]
    if options[0] == "hf":
        named += ["--eod-token", *(options[1:] or ["<|endoftext|>"])]
    elif options[0] == "tiktoken":
        named += ["--eod-id", "299", "--tiktoken-pattern", r"[^e]+|e"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:1]))
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", *named) == 0
    folder = SimpleNamespace(
        path="model",
        args=SimpleNamespace(data_path=["0.5", str(tmp_path / "absent"), str(tmp_path / "out")]),
        tokenizer_files=list,
        named_tokenizer=list,
        description=SimpleNamespace(vocab_size=512),
    )
    tokenizer = checkpoint_tokenizer(folder)
    assert read(tmp_path / "out") == [[*tokenizer.tokenize(TEXTS[0]), tokenizer.eod]]
    if source:
        file.write_bytes(file.read_bytes() + b"\n")
        with pytest.raises(ValueError, match="is not the file the data was made with"):
            checkpoint_tokenizer(folder)
        assert checkpoint_tokenizer(folder, "byte").vocab_size == 257


def test_token_dtype_is_megatrons_rule(indexed_dataset):
    for size in (257, 65499, 65500, 65536, 200_000):
        assert token_dtype(size) is indexed_dataset.DType.optimal_dtype(size)


def test_large_vocabulary_is_int32(tmp_path, indexed_dataset, ranks_file):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["the"]))
    options = ["--tokenizer", "tiktoken", "--tokenizer-model", str(ranks_file)]
    assert run([tmp_path / "a.jsonl"], tmp_path / "out", *options, "--eod-id", "100257") == 0
    dataset = indexed_dataset.IndexedDataset(str(tmp_path / "out"))
    document = dataset[0]  # lives in the dataset's memory map
    assert document.dtype == np.int32 and document.tolist() == [257, 100257]


def write_shard(path: Path, tokens: list[int]) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u2").tobytes())
    return path


@pytest.mark.parametrize("append", [True, False])
def test_shards_with_eod_first_and_a_document_cut_by_a_shard(tmp_path, read, append):
    eod = 50256
    a = write_shard(tmp_path / "a.bin", [eod, 1, 2, eod, eod, 3, 4])
    b = write_shard(tmp_path / "b.bin", [5, eod, 50255])
    assert run([a, b], tmp_path / "out", *([] if append else ["--no-append-eod"])) == 0
    end = [eod] if append else []
    assert read(tmp_path / "out") == [[1, 2, *end], [3, 4, 5, *end], [50255, *end]]
    metadata = read_metadata(str(tmp_path / "out"))
    assert (metadata["vocab_size"], metadata["eod_id"], metadata["documents"]) == (50257, eod, 3)


def test_shards_with_eod_last_across_chunks(tmp_path, read, monkeypatch):
    monkeypatch.setattr("megatron_mlra.data.shards._CHUNK_TOKENS", 5)
    random = np.random.default_rng(0)
    documents = [[*random.integers(1, 9, size=n).tolist(), 0] for n in random.integers(1, 20, 60)]
    stream = [token for document in documents for token in document]
    shards = [
        write_shard(tmp_path / "a.bin", stream[:307]),
        write_shard(tmp_path / "b.bin", stream[307:]),
    ]
    assert run(shards, tmp_path / "out", "--eod-id", "0", "--vocab-size", "9") == 0
    assert read(tmp_path / "out") == documents
