"""Refuse a damaged or foreign checkpoint before loading it, and a disk too small before training."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader

TRACKER = "latest_checkpointed_iteration.txt"

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
    "variance_scaling",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "rotary_base",
    "rope_type",
    "normalization",
    "layernorm_epsilon",
    "swiglu",
    "add_bias_linear",
    "untie_embeddings_and_output_weights",
    "padded_vocab_size",
    "num_experts",
)
"""Arguments that make two models different functions of their weights."""

_LATENT = {"num_latent_heads", "num_branches", "q_lora_rank", "kv_lora_rank", "qk_head_dim"}
_LATENT |= {"qk_pos_emb_head_dim", "v_head_dim", "variance_scaling"}


def iteration_folder(load: str | Path, step: int | None = None) -> Path | None:
    """The `iter_*` folder that loading `load` reads, or None where there is no checkpoint.

    Raises:
        ValueError: for a tracker file that names no step, or a step whose folder is gone.
    """
    load = Path(load)
    tracker = load / TRACKER
    if step is None:
        if not tracker.is_file():
            return None
        text = tracker.read_text().strip()
        if text == "release":
            return load / "release"
        if not text.isdigit():
            raise ValueError(f"checkpoint tracker {tracker} holds {text!r:.40}, not a step")
        step = int(text)
    folder = load / f"iter_{step:07d}"
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is missing, though {tracker} names it")
    return folder


def check_load(args: Namespace) -> None:
    """Check what `--load` will read: complete, and of this architecture.

    Raises:
        ValueError: names the checkpoint, and the damaged file or the arguments that differ.
    """
    if args.load is None:
        return
    if not Path(args.load).exists():
        if args.exit_on_missing_checkpoint or args.load != args.save:
            raise ValueError(f"--load {args.load} does not exist")
        return
    folder = iteration_folder(args.load, args.ckpt_step)
    if folder is None:
        if args.load != args.save:
            raise ValueError(f"--load {args.load} holds no checkpoint (no {TRACKER})")
        return
    check_complete(folder)
    check_architecture(folder, args)


def check_complete(folder: Path) -> None:
    """Check that every file a torch_dist checkpoint's metadata refers to is there, at full length.

    Raises:
        ValueError: names the first missing or short file.
    """
    if not (folder / ".metadata").is_file():
        raise ValueError(f"checkpoint {folder} is incomplete: it has no .metadata")
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data
    except Exception as error:
        raise ValueError(f"checkpoint {folder}: .metadata cannot be read ({error})") from None
    needed: dict[str, int] = {}
    for item in stored.values():
        end = item.offset + item.length
        needed[item.relative_path] = max(end, needed.get(item.relative_path, 0))
    for name, size in sorted(needed.items()):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing")
        if path.stat().st_size < size:
            raise ValueError(
                f"checkpoint {folder} is truncated: {name} has {path.stat().st_size} of {size} bytes"
            )


def check_architecture(folder: Path, args: Namespace) -> None:
    """Compare the arguments a checkpoint was saved with to these.

    Raises:
        ValueError: names every argument that differs, with both values.
    """
    try:
        saved = dist_checkpointing.load_common_state_dict(str(folder)).get("args")
    except Exception as error:
        raise ValueError(f"checkpoint {folder}: common state cannot be read ({error})") from None
    if saved is None:
        raise ValueError(
            f"checkpoint {folder} names no arguments; it was not written by this trainer"
        )
    different = []
    for name in ARCHITECTURE:
        there, here = getattr(saved, name, None), getattr(args, name, None)
        if name in _LATENT and args.attention != "mlra":
            continue
        if there != here:
            different.append(f"{name} is {there} there, {here} here")
    if different:
        raise ValueError(f"checkpoint {folder} is of another architecture: {'; '.join(different)}")


def check_save(args: Namespace, parameters: int) -> None:
    """Check that `--save` can be written and has room for one checkpoint.

    A checkpoint holds 16-bit or 32-bit weights and, with the optimizer, three 32-bit numbers a weight.

    Raises:
        ValueError: names the folder and the bytes needed.
    """
    if args.save is None:
        return
    folder = Path(args.save)
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--save {folder} cannot be written ({existing} is not a writable folder)")
    weight_bytes = 2 if args.bf16 or args.fp16 else 4
    needed = parameters * (weight_bytes + (0 if args.no_save_optim else 12))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"--save {folder} has {free / 1e9:.1f} GB free and a checkpoint needs {needed / 1e9:.1f} GB"
        )
