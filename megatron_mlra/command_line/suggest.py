"""Suggestions for an unknown name of a flag, a preset, a preset's key or a command.

First the names that other programs use for the same thing are tried, then similarity: of letters (a
slip of the keyboard) and of words (`--num-heads` for `--num-attention-heads`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

ELSEWHERE = {
    # Transformers, DeepSpeed, LitGPT, nanoGPT, torchtitan, lm-eval, vLLM -> here.
    "num-attention-heads": "num-heads n-heads n-head nhead heads",
    "num-query-groups": "num-key-value-heads num-kv-heads n-kv-heads kv-heads n-query-groups",
    "num-layers": "num-hidden-layers n-layers n-layer layers depth",
    "hidden-size": "d-model n-embd dim embed-dim embedding-dim hidden-dim model-dim width",
    "ffn-hidden-size": "intermediate-size ffn-dim mlp-dim d-ff intermediate-dim",
    "seq-length": "max-seq-len max-seq-length seq-len sequence-length context-length block-size"
    " n-ctx max-length max-sequence-length",
    "micro-batch-size": "batch-size per-device-train-batch-size train-micro-batch-size-per-gpu"
    " micro-batch mbs device-batch-size",
    "global-batch-size": "train-batch-size gradient-accumulation-steps grad-accum"
    " gradient-accumulation accumulate-grad-batches gbs total-batch-size batch-size",
    "lr": "learning-rate max-lr peak-lr base-lr",
    "min-lr": "min-learning-rate end-lr",
    "lr-warmup-iters": "warmup-steps num-warmup-steps warmup-iters warmup lr-warmup-steps",
    "lr-warmup-fraction": "warmup-ratio warmup-fraction",
    "lr-decay-style": "lr-scheduler-type lr-scheduler scheduler lr-schedule schedule",
    "train-iters": "max-steps num-steps steps total-steps iters max-iters train-steps epochs"
    " num-train-steps num-train-epochs num-epochs num-iterations max-iterations",
    "adam-eps": "adam-epsilon eps epsilon",
    "adam-beta1": "beta1",
    "adam-beta2": "beta2",
    "weight-decay": "wd",
    "clip-grad": "max-grad-norm grad-clip gradient-clipping clip-grad-norm gradient-clip-val",
    "save": "output-dir save-dir checkpoint-dir out-dir ckpt-dir save-path default-root-dir",
    "load": "resume resume-from-checkpoint load-checkpoint resume-from checkpoint ckpt init-from",
    "save-interval": "save-steps save-every checkpoint-interval save-freq checkpoint-every",
    "log-interval": "logging-steps log-every log-freq print-every log-steps",
    "eval-interval": "eval-steps eval-every eval-freq val-interval validation-interval",
    "eval-iters": "eval-batches max-eval-batches val-steps",
    "data-path": "dataset data train-data data-dir dataset-path train-file dataset-name data-file",
    "tensor-model-parallel-size": "tp tp-size tensor-parallel-size tensor-parallel"
    " tensor-parallel-degree model-parallel-size",
    "pipeline-model-parallel-size": "pp pp-size pipeline-parallel-size pipeline-parallel"
    " pipeline-parallel-degree",
    "context-parallel-size": "cp cp-size context-parallel context-parallel-degree",
    "expert-model-parallel-size": "ep ep-size expert-parallel-size expert-parallel",
    "moe-router-topk": "num-experts-per-tok experts-per-token num-experts-per-token",
    "num-experts": "n-experts num-local-experts n-routed-experts",
    "rotary-base": "rope-theta rope-base",
    "norm-epsilon": "rms-norm-eps norm-eps layer-norm-eps layernorm-eps",
    "bf16": "dtype precision mixed-precision torch-dtype",
    "recompute-granularity": "gradient-checkpointing activation-checkpointing"
    " checkpoint-activations activation-checkpoint",
    "untie-embeddings-and-output-weights": "tie-word-embeddings tie-embeddings weight-tying",
    "use-distributed-optimizer": "zero zero-stage fsdp deepspeed",
    "swiglu": "hidden-act activation-function",
    "config": "preset model model-config config-file model-name config-path",
    "wandb-exp-name": "run-name wandb-name wandb-run-name",
    "wandb-project": "report-to use-wandb wandb",
    "qk-nope-head-dim": "qk-nope-dim nope-head-dim",
    "query-head-norm": "qk-norm qk-head-norm query-norm q-norm q-layernorm",
    "qk-rope-head-dim": "qk-rope-dim rope-head-dim",
    "finetune": "fine-tune",
    "gpus": "num-gpus n-gpus ngpus devices world-size nproc-per-node",
    "gpu": "gpu-type device-type accelerator",
    "decode-batch": "batch-size",
    "cp": "context-parallel-size cp-size context-parallel",
    "tp": "tensor-parallel-size tensor-model-parallel-size",
    "tp-layout": "latent-tp-layout",
    "fp8": "fp8-format",
    "contexts": "context seq-len",
    "max-new-tokens": "max-tokens max-length max-new-token n-predict num-tokens gen-length",
    "temperature": "temp",
    "cache-dtype": "kv-cache-dtype",
    "kv-cache-dtype": "cache-dtype",
    "max-model-len": "context max-seq-len seq-length context-length max-length",
    "stop": "stop-sequences stop-strings",
    "task": "tasks",
    "max-batch": "batch-size max-batch-size",
    "export-to": "output-dir out export",
    "input": "data file files text dataset",
    "output-prefix": "output out output-dir",
    "workers": "num-workers num-proc jobs",
    "output": "out output-file save",
    "json": "output out output-file output-path",
    "png": "plot figure",
    "plot": "png figure",
    "eod-token": "eos-token append-eos",
    "nproc-per-node": "gpus num-gpus nproc gpus-per-node",
    "nnodes": "nodes num-nodes",
    # Commands.
    "pretrain": "train fit run finetune sft trainer",
    "generate": "sample infer inference complete completion run prompt",
    "serve": "server api chat vllm deploy",
    "preprocess": "tokenize tokenise prepare data preprocess-data",
    "convert": "export import convert-checkpoint export-hf import-hf convert-hf",
    "launch": "torchrun start",
    "presets": "list models configs list-models",
    "plan": "estimate memory cost layout",
    "evaluate": "eval perplexity test lm-eval",
    "benchmark-training": "bench benchmark",
}
"""A name of this project -> the names that other programs have for it."""

_NEAR = 0.72
"""Least similarity, from 0 to 1, of a name that is suggested."""
_SAME_WORD = 0.8
_WORDS = {"steps": "iters", "iterations": "iters", "sequence": "seq", "learning-rate": "lr"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' with the known name most like `name`, or '' if none is alike.

    Args:
        name: as the user gave it: `--num-heads`, `num_heads`, `trian`.
        known: valid names of the same kind.
    """
    by_plain: dict[str, str] = {}
    for each in known:
        by_plain.setdefault(_plain(each), each)
    wanted = _plain(name)
    brought = [
        (theirs, ours)
        for ours, names in ELSEWHERE.items()
        if ours in by_plain
        for theirs in names.split()
    ]
    for theirs, ours in brought:
        if wanted == theirs:
            return f"; did you mean {by_plain[ours]}?"
    spelt = wanted
    for theirs, ours in _WORDS.items():
        spelt = re.sub(rf"\b{theirs}\b", ours, spelt)
    ranked = [
        (max(_by_letters(each, plain), _by_words(each, plain)), -len(plain), plain)
        for plain in by_plain
        for each in {wanted, spelt}
    ]
    ranked += [(_by_letters(wanted, theirs), -len(ours), ours) for theirs, ours in brought]
    best = max(ranked, default=(0.0, 0, ""))
    return f"; did you mean {by_plain[best[2]]}?" if best[0] >= _NEAR else ""


def is_elsewhere(name: str, known: Iterable[str]) -> bool:
    """Whether other programs, or other commands, have this name for one of the known flags."""
    ours = {_plain(each) for each in known}
    return any(_plain(name) in ELSEWHERE.get(each, "").split() for each in ours)


def _plain(name: str) -> str:
    """A name in lower case with dashes, without leading dashes and without `no-`."""
    return name.lstrip("-").replace("_", "-").removeprefix("no-").casefold()[:200]


def _by_letters(one: str, other: str) -> float:
    """Similarity of two names' letters, 1 for equal names, 0 below `_NEAR`."""
    letters = difflib.SequenceMatcher(None, one, other)
    # Cheap bounds first: Megatron's parser has a thousand flags.
    if letters.real_quick_ratio() < _NEAR or letters.quick_ratio() < _NEAR:
        return 0.0
    return letters.ratio()


def _by_words(one: str, other: str) -> float:
    """Similarity by words: 0 unless every word of `one` is a word of `other`, else from 0.65 to 1
    by the share of `other`'s words that `one` has."""
    ours, theirs = one.split("-"), other.split("-")
    if len(one) < 4 or not all(any(_is_word(a, b) for b in theirs) for a in ours):
        return 0.0
    return 0.65 + 0.35 * min(1.0, len(ours) / len(theirs))


def _is_word(one: str, other: str) -> bool:
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    if len(short) < 3:
        return False
    return long.startswith(short) or (
        len(long) > 4 and difflib.SequenceMatcher(None, one, other).ratio() >= _SAME_WORD
    )


def _is_tensor_parallel(name: str) -> bool:
    flag = "tensor-model-parallel-size"
    return _plain(name) in (flag, *ELSEWHERE[flag].split())


def refusal(message: str, known: Iterable[str]) -> str:
    """An argparse error, with a suggestion where it names an unknown flag or choice.

    Args:
        message: argparse's message.
        known: the parser's flags.
    """
    unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message)
    if unknown:
        name = unknown[1]
        what = "flag" if name.startswith("-") else "argument"
        near = did_you_mean(name, known) if what == "flag" else ""
        if not near and "--weight-mode" in known and _is_tensor_parallel(name):
            near = (
                "; it is the number of processes: torchrun --nproc-per-node N --no-python mlra ..."
            )
        if what == "argument" and "--prompt" in known:
            near = "; give a prompt as --prompt 'TEXT', in quotes"
        return f"unknown {what} {name}{near}"
    choice = re.fullmatch(
        r"(.*invalid choice: '([^']*)') \(choose from (.*)\)", message, flags=re.DOTALL
    )
    if choice:
        near = did_you_mean(choice[2], re.findall(r"'([^']*)'", choice[3]))
        return f"{message}{near}"
    return message
