"""Opens a checkpoint folder of any format."""

from __future__ import annotations

from pathlib import Path

from megatron_mlra.checkpoint.files.tracker import is_megatron
from megatron_mlra.checkpoint.folder import CheckpointFolder, read_config
from megatron_mlra.checkpoint.huggingface.folder import HuggingFaceFolder
from megatron_mlra.checkpoint.megatron.folder import MegatronFolder
from megatron_mlra.checkpoint.research.folder import ResearchFolder
from megatron_mlra.command_line.early import a_folder
from megatron_mlra.description.model import CheckpointError


def open_checkpoint(
    path: str | Path, vocab_size: int | None = None, *, verify: bool = True
) -> CheckpointFolder:
    """Open a Megatron `--save` folder (or one of its `iter_*`), a Hugging Face or research folder.

    Args:
        vocab_size: vocabulary of a Megatron checkpoint, without padding, if its arguments do not
            name it.
        verify: compare the files with the checkpoint's checksums, if it has any.

    Raises:
        CheckpointError: the folder is no checkpoint of a known kind, is damaged, or does not hold
            the tensors that its model needs; see `check_tensors`.
    """
    path = Path(path)
    try:
        a_folder(path, "checkpoint")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    try:
        return _open(path, vocab_size, verify)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: its config or arguments are no model's ({type(error).__name__}: {said:.200})"
        ) from None


def _open(path: Path, vocab_size: int | None, verify: bool) -> CheckpointFolder:
    if is_megatron(path):
        return MegatronFolder(path, vocab_size, verify)
    config = read_config(path, verify)
    if config.get("model_type") in ("mlra", "llama"):
        return HuggingFaceFolder(path, verify)
    if "n_layer" in config:
        return ResearchFolder(path, verify)
    raise CheckpointError(
        f"{path}/config.json is of model_type {config.get('model_type')!r}; an exported folder says"
        " 'mlra' or 'llama' and a research folder has n_layer"
    )
