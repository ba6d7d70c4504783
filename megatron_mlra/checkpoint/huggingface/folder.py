"""Hugging Face folders: written from any checkpoint, and read back.

An exported model with latent attention includes its own code (`megatron_mlra/hf`), so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs only transformers. A
model with MHA, MQA or GQA is exported as transformers' Llama.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.checkpoint.files.safetensors_writer import MAX_SHARD_BYTES, write_safetensors
from megatron_mlra.checkpoint.files.staging import written_aside
from megatron_mlra.checkpoint.files.tokenizer_copy import say_nothing
from megatron_mlra.checkpoint.files.weight_files import WeightFiles, common_dtype
from megatron_mlra.checkpoint.folder import CheckpointFolder, check_tensors, read_config
from megatron_mlra.checkpoint.huggingface.card import model_card
from megatron_mlra.checkpoint.huggingface.config import (
    AHEAD,
    AUTO_MAP,
    from_hf_config,
    to_hf_config,
)
from megatron_mlra.checkpoint.huggingface.names import (
    HF_EMBEDDING,
    HF_EXPERT_BIAS,
    HF_OUTPUT,
    rules,
)
from megatron_mlra.checkpoint.huggingface.tokenizer import has_chat_template, write_tokenizer
from megatron_mlra.checkpoint.rules import their_shapes
from megatron_mlra.checkpoint.stream import TensorStream
from megatron_mlra.description.model import CheckpointError, check_layers
from megatron_mlra.description.tensors import dtype_of

CODE = Path(__file__).parents[2] / "hf"
"""Folder of the code that is copied into exports."""


class HuggingFaceFolder(CheckpointFolder):
    """`config.json` (model_type `mlra` or `llama`) and `model*.safetensors` or `.bin` weights."""

    kind = "huggingface"

    def __init__(self, path: Path, verify: bool) -> None:
        self.path = path
        self.verify = verify
        config = read_config(path, verify)
        self.files = WeightFiles(path, verify)
        try:
            weights = {n: d for n, d in self.files.dtypes.items() if not n.endswith(HF_EXPERT_BIAS)}
            dtype = common_dtype(weights, path)
            layers = config.get("num_hidden_layers")
            check_layers("config.json: num_hidden_layers", layers, len(self.files.shapes))
            check_layers(f"config.json: {AHEAD}", config.get(AHEAD), len(self.files.shapes))
            self.description = from_hf_config(config, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.rules = rules(self.description)
        shapes = dict(self.files.shapes)
        if self.description.tie_embeddings and HF_OUTPUT in shapes:
            if not torch.equal(*(self.files.tensor(n) for n in (HF_OUTPUT, HF_EMBEDDING))):
                raise CheckpointError(
                    f"{path}: tie_word_embeddings is true and {HF_OUTPUT} is not {HF_EMBEDDING}"
                )
            del shapes[HF_OUTPUT]
        expected = their_shapes(self.description, self.rules)
        check_tensors(f"{path} ({self.description.variant})", shapes, expected)

    def _read(self, name: str) -> torch.Tensor:
        """See CheckpointFolder.tensor."""
        rule = self.rules[name]
        dtype = getattr(torch, dtype_of(name, self.description.dtype))
        return rule.join([self.files.tensor(their).to(dtype) for their in rule.theirs])


def check_own_code(folder: Path) -> None:
    """Check that transformers would run only the code that this version exports.

    Raises:
        CheckpointError: the folder has other code, or its config names other code; names the first
            such file or entry.
    """
    own = {path.name: path.read_bytes() for path in CODE.glob("*_mlra.py")}
    for path in sorted(folder.rglob("*")):
        is_code = path.suffix in (".py", ".so", ".pyc")
        if is_code and (path.parent != folder or own.get(path.name) != path.read_bytes()):
            raise CheckpointError(
                f"{path} is not the code that this version exports, and is not run; export the"
                " folder again"
            )
    config = read_config(folder)
    named = config.get("auto_map")
    if named != (AUTO_MAP if config.get("model_type") == "mlra" else None):
        raise CheckpointError(f"{folder}/config.json: auto_map names other code ({named!r:.200})")


def write_huggingface(
    source: CheckpointFolder,
    destination: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
    say: Callable[[str], object] = say_nothing,
) -> str | None:
    """Write a folder for `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`.

    Args:
        dtype: of the weights, default the source's.
        tokenizer, chat_template: see `write_tokenizer`.
        max_shard_bytes: see `write_safetensors`.
        say: called with one line per copied tokenizer file, and one about what is left out.

    Returns:
        None, or one line with the reason why the folder has no tokenizer.

    Raises:
        CheckpointError: see `to_hf_config`, `write_tokenizer`, TensorStream and `written_aside`.
    """
    ahead = source.description.attention == "mlra"
    if source.ahead and not ahead:
        say(f"{source.path}: {source.ahead} is left out, which Llama has not")
    with TensorStream(source, dtype, progress, ahead) as stream:
        model = stream.description
        config = to_hf_config(model)
        table = rules(model)

        def parts() -> Iterator[tuple[str, torch.Tensor]]:
            for name in stream.shapes:
                yield from table[name].store(stream.take(name))

        with written_aside(destination, stream.bytes) as folder:
            text = json.dumps(config, indent=2, sort_keys=True)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")
            missing = write_tokenizer(
                source, model, folder, tokenizer, chat_template=chat_template, say=say
            )
            shapes = their_shapes(model, table)
            dtypes = {t: stream.dtype_of(name) for name in table for t in table[name].theirs}
            write_safetensors(folder, shapes, dtypes, parts(), max_shard_bytes)
            stream.finish()
            if model.attention == "mlra":
                for file in sorted(CODE.glob("*_mlra.py")):
                    shutil.copyfile(file, folder / file.name)
            card = model_card(
                source,
                model,
                Path(destination).name,
                tokenizer=(folder / "tokenizer.json").is_file(),
                chat=has_chat_template(folder),
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            manifest.write(folder, made_from=manifest.identity(source.folder))
            return missing
