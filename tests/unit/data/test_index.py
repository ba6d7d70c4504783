"""A damaged index, or one of other data, is refused before anything is trained on."""

import struct

import numpy as np
import pytest

from megatron_mlra.data.errors import InputError
from megatron_mlra.data.index import count_tokens, read_index

LENGTHS = [3, 1, 0, 7, 2]


def write(prefix, lengths=LENGTHS, bounds=(0, 1, 2, 3, 4, 5), code=8, itemsize=2):
    """An index by hand, as Megatron's format says, and its tokens."""
    ends = np.cumsum(lengths) * itemsize
    offsets = [0, *ends[:-1].tolist()]
    n, b = len(lengths), len(bounds)
    data = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, n, b)
    data += struct.pack(f"<{n}i{n}q{b}q", *lengths, *offsets, *bounds)
    prefix.with_suffix(".idx").write_bytes(data)
    prefix.with_suffix(".bin").write_bytes(bytes(int(ends[-1])))
    return data


def test_a_whole_index_is_read(tmp_path):
    write(tmp_path / "data")
    index = read_index(str(tmp_path / "data"))
    assert index.lengths.tolist() == LENGTHS
    assert (index.tokens(0, 5), index.tokens(2, 3), index.tokens(3, 5)) == (13, 0, 9)
    assert count_tokens(str(tmp_path / "data")) == 13


def test_documents_of_several_sequences_and_of_none_are_megatrons_too(tmp_path):
    write(tmp_path / "data", bounds=(0, 2, 2, 5))
    assert len(read_index(str(tmp_path / "data")).lengths) == 5


def test_every_byte_counts(tmp_path):
    prefix = tmp_path / "data"
    whole = write(prefix)
    start_of_bounds = len(whole) - 6 * 8
    for byte in range(len(whole)):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << (byte * 5 + byte // 8) % 8
        bounds = struct.unpack_from("<6q", damaged, start_of_bounds)
        prefix.with_suffix(".idx").write_bytes(damaged)
        if bounds[0] == 0 and bounds[-1] == 5 and list(bounds) == sorted(set(bounds)):
            assert byte < start_of_bounds
        elif list(bounds) == sorted(bounds) and (bounds[0], bounds[-1]) == (0, 5):
            continue  # other documents of the same sequences: only a checksum tells
        with pytest.raises(InputError, match=r"data\.(idx|bin) .*; preprocess the data again"):
            read_index(str(prefix))


@pytest.mark.parametrize("cut", [0, 8, 33, 34, 60, -8, -1])
def test_a_cut_index_is_refused(tmp_path, cut):
    prefix = tmp_path / "data"
    whole = write(prefix)
    prefix.with_suffix(".idx").write_bytes(whole[:cut])
    with pytest.raises(InputError, match=r"data\.idx is"):
        read_index(str(prefix))


DAMAGE = {
    "longer": (lambda d: d + bytes(8), "data.idx is damaged: 150 bytes, where 5 sequences take"),
    "many": (
        lambda d: d[:18] + struct.pack("<Q", 1 << 60) + d[26:],
        "data.idx is damaged: 142 bytes, where 1,152,921,504,606,846,976 sequences take",
    ),
    "negative": (
        lambda d: d[:38] + struct.pack("<i", -4) + d[42:],
        "data.idx is damaged: document 1 has -4 tokens",
    ),
    "shifted": (
        lambda d: d[:62] + struct.pack("<q", 4) + d[70:],
        "data.idx is damaged: document 1 begins at byte 4, not 6",
    ),
    "fewer": (
        lambda d: d[:-8] + struct.pack("<q", 4),
        "data.idx is damaged: its documents end at sequence 4 of 5",
    ),
    "floats": (
        lambda d: d[:17] + b"\7" + d[18:],
        "is not a Megatron index of tokens (version 1, t",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_damage_is_named(tmp_path, case):
    prefix = tmp_path / "data"
    change, said = DAMAGE[case]
    prefix.with_suffix(".idx").write_bytes(change(write(prefix)))
    with pytest.raises(InputError) as refused:
        read_index(str(prefix))
    assert said in str(refused.value)


@pytest.mark.parametrize(("size", "said"), [(25, "is truncated"), (28, "is not the data of its")])
def test_data_of_another_size_are_refused(tmp_path, size, said):
    write(tmp_path / "data")
    (tmp_path / "data.bin").write_bytes(bytes(size))
    with pytest.raises(InputError, match=rf"data.bin {said}.*: {size} of 26 bytes"):
        read_index(str(tmp_path / "data"))


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_data_without_a_token_are_refused(tmp_path, lengths):
    write(tmp_path / "data", lengths, bounds=range(len(lengths) + 1))
    with pytest.raises(InputError, match=r"data\.idx lists no tokens"):
        read_index(str(tmp_path / "data"))
