"""Refuse a damaged or foreign checkpoint before loading, a disk too small before training."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.folder import TRACKER, tracked_step
from megatron_mlra.checkpoint.megatron.torch_dist import TorchDistFolder
from megatron_mlra.command_line import parser
from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.fault_tolerance.optimizer_state import check_optimizer
from megatron_mlra.fault_tolerance.rope_change import changes

_ITERATION = re.compile(r"iter_(\d+)").fullmatch

ARCHITECTURE = (
    "attention",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_latent_heads",
    "num_branches",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "output_gate",
    "attention_output_gate",
    "qk_layernorm",
    "variance_scaling",
    "tpa_q_rank",
    "tpa_kv_rank",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "position_embedding_type",
    "rotary_percent",
    "use_rope_scaling",
    "rotary_seq_len_interpolation_factor",
    "normalization",
    "layernorm_epsilon",
    "swiglu",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
    "padded_vocab_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
)
"""Arguments that make two models different functions of their weights; RoPE's own, which may change
by flags, are in rope_change.py."""

_NOT_ALWAYS_SAVED = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
}
"""Arguments that converters leave out, and what they mean then."""

_LATENT = {"num_latent_heads", "num_branches", "q_lora_rank", "kv_lora_rank", "qk_head_dim"}
_LATENT |= {"qk_pos_emb_head_dim", "v_head_dim", "variance_scaling"}
_TPA = {"tpa_q_rank", "tpa_kv_rank"}
_UNUSED = {
    "mlra": _TPA,
    "gqa": _LATENT | _TPA,
    "gta": (_LATENT | _TPA) - {"qk_pos_emb_head_dim"},
    "mfa": (_LATENT | _TPA) - {"q_lora_rank"},
    "tpa": _LATENT,
}
"""Of these, what each kind of attention does not read."""


def latest_step(folder: str | Path) -> int | None:
    """The step of the checkpoint that `folder` names as its latest, None where it names none.

    Raises:
        ValueError: for a tracker file that names no step, or cannot be read.
    """
    text = tracked_step(Path(folder))
    if text is None:
        return None
    if text == "release":
        return 0
    if not text:
        # The job or its machine died between truncating the file and writing it. Whatever folder
        # is complete was saved before, or just now.
        return max(steps(folder), default=None)
    return int(text)


def mend_tracker(load: str | Path, step: int) -> None:
    """Write `step` into a tracker file that is empty, which Megatron cannot read, or gone."""
    tracker = Path(load) / TRACKER
    if not tracker.is_file() or not tracker.read_text().strip():
        parser.write_text(tracker, str(step))


def candidates(load: str | Path, step: int | None = None) -> list[Path]:
    """Checkpoint folders to load from, best first: the one that the tracker names, then earlier
    steps; only `step` if it is given. What is later than the tracker was never completed. Without a
    tracker: every step whose save came to its end, newest first.

    Raises:
        ValueError: for a tracker file that names no step, a folder that cannot be read.
    """
    load = Path(load)
    if step:
        return [load / f"iter_{step:07d}"]
    latest = latest_step(load)
    if latest is None:
        return saved_without_tracker(load)
    if not latest:
        return [load / "release"]
    earlier = sorted((other for other in steps(load) if other < latest), reverse=True)
    return [load / f"iter_{number:07d}" for number in (latest, *earlier)]


def saved_without_tracker(folder: str | Path) -> list[Path]:
    """Checkpoints of a folder that has no tracker file, newest first: it was lost, or the folders
    were copied without it. A run that was killed in its first save leaves neither a tracker nor any
    of the files that are written last.

    Raises:
        ValueError: the folder cannot be read, or holds a `release` checkpoint.
    """
    folder = Path(folder)
    if (folder / "release").is_dir():
        raise ValueError(
            f"{folder} holds release/, but no {TRACKER}; write the word release into that file"
        )
    newest_first = sorted(steps(folder), reverse=True)
    paths = [folder / f"iter_{number:07d}" for number in newest_first]
    return [path for path in paths if any((path / name).exists() for name in _WRITTEN_LAST)]


_WRITTEN_LAST = (".metadata", "metadata.json", MANIFEST)
"""Files of a checkpoint that are written once all tensors are."""


def steps(folder: str | Path) -> set[int]:
    """Steps of which `folder` holds an `iter_*` folder, complete or not.

    Raises:
        ValueError: the folder is there but cannot be read: what it holds is unknown.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ValueError(f"checkpoint folder {folder} cannot be read ({error.strerror})") from None
    return {int(found[1]) for name in names if (found := _ITERATION(name))}


def first_usable(
    folders: list[Path], check: Callable[[Path], None]
) -> tuple[Path | None, list[str]]:
    """The first folder that `check` does not refuse, and why those before it were.

    Raises:
        ValueError: if there are folders and all are refused; names the first.
    """
    refused: list[str] = []
    for folder in folders:
        try:
            check(folder)
        except ValueError as error:
            refused.append(str(error))
        else:
            return folder, refused
    if not refused:
        return None, []
    raise ValueError(f"{refused[0]}; {_others(folders)}")


def _others(folders: list[Path]) -> str:
    """Which steps could be loaded in place of these folders, all of which were refused."""
    if len(folders) > 1:
        return f"the {len(folders) - 1} earlier ones are damaged too"
    there = sorted(path.name for path in folders[0].parent.glob("iter_*") if path != folders[0])
    if not there:
        return "there is no other"
    return f"there is {', '.join(there)}: --ckpt-step names the step to load"


def check_load(args: Namespace, argv: list[str] | None = None) -> None:
    """Check what `--load` will read: complete, and of this architecture; rank 0 says what of it the
    command line `argv` changes.

    Raises:
        ValueError: names the checkpoint, and the damaged file or the arguments that differ.
    """
    if args.load is None:
        return
    starts_anew = args.load == args.save and not args.exit_on_missing_checkpoint
    if not Path(args.load).is_dir():
        if starts_anew and not os.path.lexists(args.load):
            return
        raise ValueError(f"--load {args.load} is not a folder; give the --save of an earlier run")
    folder, _ = first_usable(candidates(args.load, args.ckpt_step), _check_readable)
    if folder is None:
        if starts_anew:
            return
        also = ""
        if (Path(args.load) / "config.json").is_file():
            also = "; an exported folder is made one by mlra convert import-hf"
        raise ValueError(
            f"--load {args.load} holds no checkpoint (no {TRACKER}); give the --save of an earlier"
            f" run{also}"
        )
    given = parser.flags_given(sys.argv[1:] if argv is None else argv)
    changed = check_architecture(folder, args, given)
    if changed and args.rank == 0:
        parser.say(f"{folder}: {', '.join(changed)}, as asked")
    check_optimizer(TorchDistFolder(folder), args)


def _check_readable(folder: Path) -> None:
    check_complete(folder)
    _common_state(folder)


def _common_state(folder: Path) -> dict[str, Any]:
    """The entries of a checkpoint that are no tensors.

    Raises:
        ValueError: it cannot be read.
    """
    return TorchDistFolder(folder).common_state()


def check_complete(folder: Path) -> None:
    """Check that every file a torch_dist checkpoint's metadata refers to is there, at full length,
    and that what Megatron unpickles holds no code.

    Raises:
        ValueError: names the first missing or short file, or the code.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is missing")
    TorchDistFolder(folder)
    if (folder / "metadata.json").is_file():
        read_json(folder / "metadata.json")


def check_architecture(folder: Path, args: Namespace, given: Collection[str] = ()) -> list[str]:
    """Compare the arguments a checkpoint was saved with to these.

    Returns:
        what of its RoPE and lengths the flags `given` change.

    Raises:
        ValueError: names every argument that differs, with both values.
    """
    saved = _common_state(folder).get("args")
    if saved is None:
        raise ValueError(
            f"checkpoint {folder} names no arguments; it was not written by this trainer"
        )
    unused = set(_UNUSED[args.attention])
    if not getattr(saved, "num_experts", None) and not args.num_experts:
        unused |= {name for name in ARCHITECTURE if name.startswith("moe_")}
    different = []
    for name in ARCHITECTURE:
        default = _NOT_ALWAYS_SAVED.get(name)
        there, here = getattr(saved, name, default), getattr(args, name, default)
        if name in unused:
            continue
        if there != here:
            fix = ""
            if name == "padded_vocab_size":
                fix = f" (train with --padded-vocab-size {there}, or convert it with {here})"
            different.append(f"{name} is {there} there, {here} here{fix}")
    changed, unasked = changes(saved, args, set(given))
    different += unasked
    if different:
        raise ValueError(f"checkpoint {folder} is of another architecture: {'; '.join(different)}")
    return changed


def check_writable(flag: str, folder: str | Path) -> Path:
    """Check that a folder, which need not exist, can be written.

    Returns:
        the nearest folder that exists.

    Raises:
        ValueError: it cannot; names the flag and the folder.
    """
    existing = folder = Path(folder)
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{flag} {folder} cannot be written: {existing} is not a folder")
    try:
        # Asked of the file system itself: permission bits say nothing about a read-only mount.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written ({error.strerror}); use another folder"
        ) from None
    return existing


def check_save(args: Namespace, parameters: int) -> None:
    """Check that `--save` can be written, has room for one checkpoint and none of another run.

    A checkpoint holds the weights and, with the optimizer, Adam's two moments in 32 bits and beside
    16-bit weights a 32-bit copy of them.

    Raises:
        ValueError: names the folder, and the fix or the bytes needed.
    """
    if args.save is None:
        return
    folder = Path(args.save)
    existing = check_writable("--save", folder)
    check_unused(args)
    low = args.bf16 or args.fp16
    needed = parameters * ((2 if low else 4) + (0 if args.no_save_optim else 12 if low else 8))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"--save {folder} has {free / 1e9:.1f} GB free and a checkpoint needs"
            f" {needed / 1e9:.1f} GB; free some, or use another disk"
        )


def check_unused(args: Namespace) -> None:
    """Check that `--save` holds no checkpoints, unless this run continues them.

    Raises:
        ValueError: it does; names the newest, and the fix.
    """
    folder = Path(args.save)
    if args.load is not None and Path(args.load).resolve() == folder.resolve():
        return
    step = latest_step(folder)
    if step is None and (saved := saved_without_tracker(folder)):
        step = int(saved[0].name.removeprefix("iter_"))
    if step is not None:
        raise ValueError(
            f"--save {folder} holds a checkpoint of step {step:,}, which this run would replace;"
            f" add --load {folder} to continue it, or use another folder"
        )


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be written, in one line: the first rank's own error."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    # "Worker failure: An error is caught while starting worker 0, error: ..."
    return " ".join(str(error).split()).rpartition(", error: ")[2]
