"""Whether two checkpoints are the same function: logits on text, to a tolerance."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_mlra.checkpoint.description import CheckpointError
from megatron_mlra.checkpoint.folders import CheckpointFolder
from megatron_mlra.checkpoint.forward import hidden_states, logits
from megatron_mlra.preprocess.tokenizers import TokenizerSpec, build_tokenizer

TOLERANCE = 1e-4
_STORAGE = {"dtype", "tokenizer_type", "tokenizer_model", "eod_token_id", "max_position_embeddings"}
"""Fields of a description that do not change the function."""


@dataclass(frozen=True)
class Comparison:
    """Differences of two models' logits over a text."""

    tokens: int
    max_difference: float
    mean_difference: float
    max_logit: float
    kl: float
    """Mean over tokens of KL(A || B), nats."""
    top1: float
    """Share of tokens whose likeliest next token is the same."""
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether no logit differs by more than the tolerance (NaN never is within it)."""
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
        CheckpointError: the two describe different functions; names what differs.
    """
    check_same_function(a, b)
    passes = zip(hidden_states(a, tokens), hidden_states(b, tokens), strict=True)
    total = a.description.num_layers + 1
    for pair in tqdm(passes, total=total, unit="layer", disable=not progress):
        states = pair
    return measure(logits(a, states[0]), logits(b, states[1]), tolerance)


def measure(ours: Tensor, theirs: Tensor, tolerance: float) -> Comparison:
    """The comparison of two `[..., V]` of logits."""
    difference = (ours - theirs).abs()
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return Comparison(
        tokens=ours[..., 0].numel(),
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        max_logit=ours.abs().max().item(),
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        top1=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        tolerance=tolerance,
    )


def check_same_function(a: CheckpointFolder, b: CheckpointFolder) -> None:
    """Refuse to compare models of different architecture.

    Raises:
        CheckpointError: names every field that differs, with both values.
    """
    different = [
        f"{field.name} is {left} and {right}"
        for field in dataclasses.fields(a.description)
        if field.name not in _STORAGE
        for left, right in [(getattr(f.description, field.name) for f in (a, b))]
        if left != right
    ]
    if different:
        raise CheckpointError(f"{a.path} and {b.path} differ: {'; '.join(different)}")


def sample_tokens(
    folder: CheckpointFolder, text: str | None, tokenizer: str | None, count: int, length: int
) -> tuple[Tensor, str]:
    """Ids `[sequences, length]` of a text, and a line that says where they come from.

    Without a text, the documentation of Python's `textwrap` and its source; without a tokenizer,
    that of the folder, else bytes as ids.

    Raises:
        CheckpointError: too little text, or ids beyond the model's vocabulary.
    """
    length = min(length, folder.description.max_position_embeddings)
    if count < 1 or length < 1:
        raise CheckpointError(f"{count} tokens in sequences of {length} are too few; use 1 or more")
    length = min(length, count)
    source = "given text" if text is not None else "sample text"
    if text is None:
        text = Path(textwrap.__file__).read_text(encoding="utf-8")
    found = [path for path in folder.tokenizer_files() if path.name == "tokenizer.json"]
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
