"""Compares the logits of two checkpoints on a text."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.huggingface.folder import check_own_code
from megatron_mlra.checkpoint.verify.forward import hidden_states, output_head
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.data.tokenizers import TokenizerSpec, build_tokenizer
from megatron_mlra.description.model import CheckpointError

TOLERANCE = 1e-4
TOKENS = 64
"""Tokens whose logits are compared at a time."""
_APART = {
    *("dtype", "tokenizer_type", "tokenizer_model", "eod_token_id", "max_position_embeddings"),
    *("mtp_num_layers", "mtp_use_repeated_layer"),
}
"""Fields of a description that do not change the decoder's function."""


@dataclass(frozen=True)
class Comparison:
    """Differences between the logits of two models, A and B, over a text."""

    tokens: int
    max_difference: float
    """Largest |logit of A - logit of B|."""
    mean_difference: float
    """Mean of |logit of A - logit of B|."""
    max_logit: float
    """Largest |logit of A|."""
    kl: float
    """Mean over tokens of KL(A || B), in nats."""
    top1: float
    """Fraction of tokens for which both models predict the same next token."""
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether no logit differs by more than the tolerance; False if a difference is NaN."""
        return self.max_difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "within" if self.same else "NOT within"
        return (
            f"{self.tokens} tokens: logits differ by at most {self.max_difference:.3g}, on average"
            f" {self.mean_difference:.3g} (largest logit {self.max_logit:.3g}), KL {self.kl:.3g}"
            f" nats, same top-1 {self.top1:.2%}: {verdict} the tolerance {self.tolerance:g}"
        )


@torch.no_grad()
def compare(
    a: CheckpointFolder,
    b: CheckpointFolder,
    tokens: Tensor,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> Comparison:
    """Run both models over `tokens` `[sequences, s]` layer by layer, in float32.

    Raises:
        CheckpointError: the models differ in architecture; see `check_same_function`.
    """
    check_same_function(a, b)
    passes = zip(hidden_states(a, tokens), hidden_states(b, tokens), strict=True)
    total = a.description.num_layers + 1
    for pair in bar(passes, desc="comparing", total=total, unit="layers", shown=progress):
        ours, theirs = pair
    head, their_head = output_head(a), output_head(b)
    parts = zip(ours.flatten(0, 1).split(TOKENS), theirs.flatten(0, 1).split(TOKENS), strict=True)
    return measure(((head(x), their_head(y)) for x, y in parts), tolerance)


@torch.no_grad()
def compare_with_transformers(
    a: CheckpointFolder, b: CheckpointFolder, tokens: Tensor, tolerance: float = TOLERANCE
) -> Comparison:
    """As `compare`, but B, a Hugging Face folder, is run by transformers with the code in the
    folder, which shares no code with the conversion. The whole of B is in memory, in float32.

    Raises:
        CheckpointError: the models differ in architecture, B is of another kind, or its code is not
            that of this version.
    """
    check_same_function(a, b)
    if b.kind != "huggingface":
        raise CheckpointError(f"{b.path} is a {b.kind} folder; transformers runs exported folders")
    check_own_code(b.path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        b.path, trust_remote_code=True, dtype=torch.float32
    )
    *_, ours = hidden_states(a, tokens)
    head = output_head(a)
    parts = ((head(ours[:, i]), model(tokens[i : i + 1]).logits[0]) for i in range(len(tokens)))
    return measure(parts, tolerance)


def measure(parts: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> Comparison:
    """Compare logits that come in parts.

    Args:
        parts: pairs of logits of A and B, `[tokens, V]` float32.
    """
    largest = largest_logit = 0.0
    sums = torch.zeros(3, dtype=torch.float64)  # differences, KL, equal top-1
    count = 0
    for ours, theirs in parts:
        difference = (ours - theirs).abs()
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum()
        equal = (ours.argmax(-1) == theirs.argmax(-1)).sum()
        sums += torch.stack((difference.sum() / ours.size(-1), kl, equal)).double()
        # NaN is larger than any number here, unlike in Python's max.
        largest = torch.stack((torch.tensor(largest), difference.max())).max().item()
        largest_logit = max(largest_logit, ours.abs().max().item())
        count += ours.size(0)
    mean, kl, top1 = (sums / count).tolist()
    return Comparison(count, largest, mean, largest_logit, kl, top1, tolerance)


def check_same_function(a: CheckpointFolder, b: CheckpointFolder) -> None:
    """Check that two checkpoints have the same architecture.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    different = [
        f"{field.name} is {left} and {right}"
        for field in dataclasses.fields(a.description)
        if field.compare and field.name not in _APART
        for left, right in [(getattr(f.description, field.name) for f in (a, b))]
        if left != right
    ]
    if different:
        raise CheckpointError(f"{a.path} and {b.path} differ: {'; '.join(different)}")


def sample_tokens(
    folder: CheckpointFolder, text: str | None, tokenizer: str | None, count: int, length: int
) -> tuple[Tensor, str]:
    """Token ids `[sequences, length]` int64 of a text, and a line that names text and tokenizer.

    Args:
        text: default: the source of Python's module `textwrap`.
        tokenizer: 'byte', or a tokenizer.json or its folder; default: that of `folder`, else bytes.
        count: of tokens, rounded up to whole sequences.
        length: of a sequence.

    Raises:
        CheckpointError: the text is too short, or an id is beyond the model's vocabulary.
    """
    length = min(length, folder.description.max_position_embeddings)
    if count < 1 or length < 1:
        raise CheckpointError(f"{count} tokens in sequences of {length} are too few; use 1 or more")
    length = min(length, count)
    source = "given text" if text is not None else "sample text"
    if text is None:
        text = Path(textwrap.__file__).read_text(encoding="utf-8")
    files = folder.tokenizer_files() or folder.named_tokenizer()
    found = [path for path in files if path.name == "tokenizer.json"]
    named = tokenizer or (str(found[0]) if found else "byte")
    spec = TokenizerSpec("byte") if named == "byte" else TokenizerSpec("hf", named)
    ids = build_tokenizer(spec).tokenize(text)
    sequences = min(-(-count // length), len(ids) // length)
    if not sequences:
        raise CheckpointError(f"the text has {len(ids)} tokens; {length} are needed")
    tokens = torch.tensor(ids[: sequences * length]).view(sequences, length)
    vocabulary = folder.description.vocab_size
    if named == "byte":
        tokens = tokens % vocabulary
    elif int(tokens.max()) >= vocabulary:
        raise CheckpointError(
            f"tokenizer {named} gives id {int(tokens.max())}, beyond the vocabulary of {vocabulary}"
        )
    return tokens, f"{source}, {'bytes as ids' if named == 'byte' else f'tokenizer {named}'}"
