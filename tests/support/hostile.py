"""Makes hostile files from an honest folder. Each runs code, or takes far more memory or time than
its size, if a reader trusts it. Code that runs makes the canary, a path given by the test."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.files.torch_dist_index import read_metadata
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY


class Code:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


class Writer(torch.nn.Module):
    """A TorchScript module whose loading writes a file: `torch.load` runs __setstate__."""

    def __init__(self, canary: str) -> None:
        super().__init__()
        self.canary = canary

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.canary, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.canary = state[0]
        self.training = state[1]
        torch.save([torch.ones(1)], self.canary)

    def forward(self) -> str:
        return self.canary


def script(canary: Path) -> bytes:
    """A TorchScript archive that makes the canary when it is loaded."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Writer(str(canary))), file)
    return file.getvalue()


def saved(value: object) -> bytes:
    """The bytes that `torch.save` writes for a value."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unseal(folder: Path) -> None:
    """Remove the checksums, as an attacker would."""
    for manifest in folder.rglob(MANIFEST):
        manifest.unlink()


def change_index(folder: Path, change: Callable[[object], object]) -> None:
    """Rewrite `.metadata` after a change to it."""
    unseal(folder)
    index = read_metadata(folder)
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def replace_entry(folder: Path, name: str, data: bytes) -> None:
    """Store `data` as the entry `name` of a torch_dist folder, as bytes rather than a tensor."""
    unseal(folder)
    index = read_metadata(folder)
    file = folder / "__0_0.distcp"
    start = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(data)
    at = next((at for at in index.storage_data if at.fqn == name), MetadataIndex(name))
    info = next(iter(index.storage_data.values()))
    index.state_dict_metadata[name] = BytesStorageMetadata()
    index.storage_data[at] = type(info)(info.relative_path, start, len(data))
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def code_in_index(folder: Path, canary: Path) -> None:
    """Make a complete `.metadata` that also runs code."""

    def add(index) -> None:
        index.planner_data = Code(canary)

    change_index(folder, add)


def code_in_common_state(folder: Path, canary: Path) -> None:
    replace_entry(folder, COMMON_KEY, saved([{"args": Code(canary)}]))


def script_in_common_state(folder: Path, canary: Path) -> None:
    replace_entry(folder, COMMON_KEY, script(canary))


def code_in_common_file(folder: Path, canary: Path) -> None:
    unseal(folder)
    (folder / "common.pt").write_bytes(saved({"args": Code(canary)}))


def script_in_common_file(folder: Path, canary: Path) -> None:
    unseal(folder)
    (folder / "common.pt").write_bytes(script(canary))


def code_in_random_state(folder: Path, canary: Path) -> None:
    replace_entry(folder, "rng_state/shard_0.0_1.1", saved(Code(canary)))


def code_in_extra_state(folder: Path, canary: Path) -> None:
    """Store a pickle in a tensor of bytes, as Transformer Engine stores its scales."""
    inside = torch.frombuffer(bytearray(pickle.dumps(Code(canary))), dtype=torch.uint8)
    replace_entry(folder, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1", saved(inside))


CODE = (
    code_in_index,
    code_in_common_state,
    script_in_common_state,
    code_in_common_file,
    script_in_common_file,
    code_in_random_state,
    code_in_extra_state,
)
"""Ways to put code into a torch_dist folder where Megatron's loader unpickles."""


# -- pickles that grow -----------------------------------------------------------------------------


def memo_bomb() -> bytes:
    """Asks for a memo of 2^31 values, for which the C unpickler allocates at least 16 GiB."""
    return b"\x80\x02Nr" + struct.pack("<I", (1 << 31) - 1) + b"."


def bytearray_bomb() -> bytes:
    """Announces an array of 1 TiB."""
    return b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."


def nested_key() -> bytes:
    """A dictionary key of nested tuples, each holding its predecessor twice: a hash takes 2^60
    steps."""
    return b"\x80\x02}(K\x01" + b"2\x86" * 60 + b"Nu."


def laughing_lists() -> bytes:
    """Nested lists, each holding its predecessor ten times: 10^12 values when printed."""
    lists = [b"]q\x00K\x01a"]
    lists += [b"]q%c(%be" % (i, b"h%c" % (i - 1) * 10) for i in range(1, 13)]
    return b"\x80\x02" + b"".join(lists) + b"."


def deep_tuples() -> bytes:
    """100,000 nested tuples."""
    return b"\x80\x02N" + b"\x85" * 100_000 + b"."


def _called(name: str, *arguments: bytes) -> bytes:
    """Pickle opcodes that call the function `name`; the arguments are opcodes too."""
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


_BILLIONS = b"\x8a\x05" + (3 << 30).to_bytes(5, "little")
_NESTED = b"K\x01" + b"2\x86" * 60
_NUMBERS = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(%st%stR"
_STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ"

CALLS = {
    "a bytearray of a size": _called("builtins.bytearray", _BILLIONS),
    "a bytearray of numbers": _called("builtins.bytearray", b"(K\x01t"),
    "text by another codec": _called("_codecs.encode", b"X\1\0\0\0a", b"X\3\0\0\0hex"),
    "a set of nested tuples": _called("builtins.set", b"](" + _NESTED + b"e"),
    "a counter of nested tuples": _called("collections.Counter", b"(" + _NESTED + b"t"),
    "an array of a size": _called("numpy.ndarray", b"(" + _BILLIONS + b"t"),
    "an array made with a size": _NUMBERS % (_BILLIONS, b"C\1b"),
    "a tensor of a size": _called("torch.Tensor", _BILLIONS),
    "a storage of a size": b"ctorch\nFloatStorage\n(" + _BILLIONS + b"tR",
    "a call in a call": _called(
        "torch._tensor._rebuild_from_type_v2",
        *(b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", b"(" + _BILLIONS + b"t", b"}"),
    ),
    "a tensor larger than its storage": _called(
        "torch._utils._rebuild_tensor_v2",
        *(_STORAGE, b"K\0(", _BILLIONS, b"t(K\1t", b"\x89ccollections\nOrderedDict\n)R"),
    ),
}
"""Description -> pickle opcodes of a call whose name is allowed, and which takes far more memory or
time than the file's size justifies."""


def repeated_key() -> bytes:
    """One tuple of 20,000 values, used 20,000 times as a dictionary key."""
    return b"\x80\x02(" + b"N" * 20_000 + b"tq\0}" + b"h\0Ns" * 20_000 + b"."


def repeated_path() -> bytes:
    """A path of 20,000 parts, made 20,000 times."""
    parts = b"(" + b"X\1\0\0\0a" * 20_000 + b"tq\0"
    return b"\x80\x02" + parts + b"cpathlib\nPosixPath\nq\x01" + b"h\1h\0R0" * 20_000 + b"."


PICKLES = {
    f.__name__: f()
    for f in (
        *(memo_bomb, bytearray_bomb, nested_key, laughing_lists, deep_tuples),
        *(repeated_key, repeated_path),
    )
}

# -- archives that do not hold what they say -------------------------------------------------------


def repacked(data: bytes, change: dict[str, bytes] | None = None, method: int = 0) -> bytes:
    """A torch archive written anew, with some records changed or added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        records = {name: old.read(name) for name in old.namelist()}
        root = next(iter(records)).partition("/")[0]
        for name, content in (change or {}).items():
            records[f"{root}/{name}"] = content
        for name, content in records.items():
            new.writestr(name, content)
    return out.getvalue()


def archives() -> dict[str, tuple[bytes, str]]:
    """Name -> (a torch archive that must be refused, a part of the error message)."""
    honest = saved({"w": torch.ones(64)})
    # The bytes of a tensor are a record of their own as well.
    start = honest.index(b"PK\3\4", 4)
    inner = honest[start : honest.index(b"PK\7\x08", start)]
    overlapping = bytearray(saved({"w": torch.frombuffer(bytearray(inner), dtype=torch.uint8)}))
    entry = overlapping.index(b"archive/.format_version", overlapping.index(b"PK\1\2")) - 46
    overlapping[entry + 42 : entry + 46] = struct.pack("<I", overlapping.index(inner, start + 1))
    renamed = bytearray(honest)
    at = renamed.index(b"archive/data/0")
    renamed[at : at + 14] = b"archive/data/1"

    def counting(field: int) -> bytes:
        """The archive with a wrong number in its end record: entries on this disk (8) or in all
        (10)."""
        inflated = bytearray(honest)
        end = inflated.rindex(b"PK\5\6")
        inflated[end + field : end + field + 2] = struct.pack("<H", 0xFFFE)
        return bytes(inflated)

    return {
        "of more records": (counting(10), "an archive "),
        "of more records on this disk": (counting(8), "does not end with its directory"),
        "compressed": (
            repacked(honest, {"data/0": bytes(1 << 22)}, zipfile.ZIP_DEFLATED),
            "compressed records",
        ),
        "larger than its record": (repacked(honest, {"data/0": bytes(8)}), "has a record of 8"),
        "without its record": (
            honest.replace(b"archive/data/0", b"archive/data/7"),
            "has no record",
        ),
        "with one more record": (repacked(honest, {"x.py": b""}), "record 'archive/x.py'"),
        "overlapping": (bytes(overlapping), "lie in one another"),
        "of two names": (bytes(renamed), "does not describe its records"),
        "with something in front": (b"MZ" + honest, "no pickle"),
        "with something behind": (honest + b"PK", "does not end with its directory"),
        "expanded": (
            saved({"w": torch.ones(1).expand(1 << 40)}),
            "of which 4 bytes are stored",
        ),
    }


def write_config(folder: Path, **changes: object) -> None:
    """Change values of a folder's config.json."""
    unseal(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
