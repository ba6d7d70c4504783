"""What a user can get wrong: each ends with a line that names it and the fix and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.runs import check_refused

TP = "--tensor-model-parallel-size"
PP = "--pipeline-model-parallel-size"
CP = "--context-parallel-size"
DISTRIBUTED = "--use-distributed-optimizer"

FLAGS = [
    # What Megatron would find late, or never.
    (["--num-layer", "3"], "unknown flag --num-layer; did you mean --num-layers?"),
    (["--num-layer=3"], "unknown flag --num-layer; did you mean --num-layers?"),
    (["mlra4"], "unknown argument mlra4"),
    (["--num-layers", "two"], "argument --num-layers: invalid int value: 'two'"),
    (["--lr"], "argument --lr: expected one argument"),
    (["--config"], "argument --config: expected one argument"),
    (["--attention", "mla"], "argument --attention: invalid choice: 'mla' (choose from "),
    (
        ["--attention-backend", "cudnn"],
        "argument --attention-backend: invalid choice 'cudnn'; use one of flash, fused, unfused",
    ),
    (["--num-layers", "0"], "--num-layers is 0; it must be at least 1"),
    (["--micro-batch-size", "-2"], "--micro-batch-size is -2; it must be at least 1"),
    (["--save-interval", "0"], "--save-interval is 0; it must be at least 1"),
    (["--lr", "0"], "--lr 0 is not positive; use e.g. 3e-4"),
    (["--min-lr", "1"], "--min-lr 1 is above --lr 0.002; use at most --lr"),
    (["--lr-warmup-iters", "8"], "--lr-warmup-iters 8 leaves nothing of the 8 steps"),
    (
        ["--max-position-embeddings", "16"],
        "--max-position-embeddings 16 is shorter than --seq-length 32; use --max",
    ),
    (["--global-batch-size", "7"], "--global-batch-size 7 does not divide into micro-batches of 2"),
    (["--eval-micro-batch-size", "3"], "--eval-global-batch-size 4 does not divide into"),
    (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other; use --bf16"),
    (["--wandb-project", "p"], "--wandb-project p needs "),
    # Flags of Megatron that would not do here what they say.
    (
        ["--multi-latent-attention"],
        "--multi-latent-attention is Megatron's own MLA; use --attention",
    ),
    (["--yaml-cfg", "x.yaml"], "argument --yaml-cfg: x.yaml would replace all flags; use --config"),
    (["--spec", "a", "b"], "--spec replaces the attention; use --attention"),
    (["--mtp-num-layers", "-1"], "--mtp-num-layers -1 is negative; use e.g. 1, or leave it out"),
    (
        ["--mtp-num-layers", "1", "--reset-attention-mask"],
        "--mtp-num-layers 1 would predict across documents with --reset-attention-mask; use"
        " --packed-sequences",
    ),
    (
        ["--no-initialization"],
        "--no-initialization leaves the weights as the memory was, and there",
    ),
    (
        ["--pipeline-model-parallel-comm-backend", "nccl"],
        "--pipeline-model-parallel-comm-backend nccl needs a GPU, and there is none; leave it out",
    ),
    (["--cuda-graph-impl", "local"], "--cuda-graph-impl local needs a GPU, and there is none; lea"),
    (
        ["--external-cuda-graph"],
        "--external-cuda-graph needs a GPU, and there is none; leave it out",
    ),
    (["--use-te-activation-func"], "--use-te-activation-func needs Transformer Engine and a GPU;"),
    (
        ["--record-memory-history"],
        "--record-memory-history needs a GPU, and there is none; leave it",
    ),
    (
        ["--optimizer-cuda-graph"],
        "--optimizer-cuda-graph needs a GPU, and there is none; leave it ",
    ),
    (
        ["--log-device-memory-used"],
        "--log-device-memory-used needs a GPU, and there is none; leave",
    ),
    (
        ["--optimizer-cpu-offload", "--use-precision-aware-optimizer", DISTRIBUTED],
        "--optimizer-cpu-offload needs a GPU, and there is none; leave it out",
    ),
    (["--use-sharp"], "--use-sharp needs a GPU, and there is none; leave it out"),
    (["--reuse-grad-buf-for-mxfp8-param-ag"], "--reuse-grad-buf-for-mxfp8-param-ag is for weights"),
    (["--full-validation"], "--full-validation fails in Megatron 0.19.2"),
    (["--sft"], "--sft reads conversations; use --packed-sequences to keep documents apart"),
    (["--hybrid-context-parallel"], "--hybrid-context-parallel is not supported; use --context-"),
    # The model.
    (
        ["--num-latent-heads", "5"],
        "num_latent_heads 5 does not divide kv_lora_rank 64; use num_lat",
    ),
    (["--num-latent-heads", "0"], "num_latent_heads is 0; it must be a whole number of at least 1"),
    (
        ["--num-branches", "3"],
        "num_branches 3 does not divide num_latent_heads 4; use num_branches",
    ),
    (
        ["--num-branches", "1", "--num-attention-heads", "6"],
        "num_attention_heads 6 does not divide into 4 head groups",
    ),
    (
        ["--attention", "gqa", "--num-attention-heads", "6"],
        "--num-attention-heads 6 does not divide --hidden-size 64; give --kv-channels",
    ),
    (["--qk-rope-head-dim", "7"], "qk_rope_head_dim 7 is odd and RoPE rotates pairs; use 8"),
    (["--q-lora-rank", "0"], "q_lora_rank is 0; use at least 1, or leave it out"),
    (["--rotary-base", "-1"], "rotary_base is -1; use a positive one, e.g. 10000"),
    (
        ["--reset-attention-mask", "--core-backend", "te"],
        "--reset-attention-mask: the causal core of --core-backend te does not see the mask; use",
    ),
    (["--core-backend", "te"], "core_backend te needs Transformer Engine, which is not installed"),
    (["--normalization", "LayerNorm"], "normalization ('LayerNorm') does not work with MLRA: use"),
    (["--qk-layernorm"], "qk_layernorm (True) does not work with MLRA"),
    (["--window-size", "8,0"], "window_size ((8, 0)) does not work with MLRA"),
    (["--tokenizer-type", "GPT4Tokenizer"], "argument --tokenizer-type: invalid choice"),
    # Without a GPU.
    (["--transformer-impl", "transformer_engine"], "--transformer-impl transformer_engine needs a"),
    (
        ["--distributed-backend", "nccl"],
        "--distributed-backend nccl needs a GPU, and there is none",
    ),
    (["--latent-kernels", "mlra_kernels"], "--latent-kernels mlra_kernels needs a GPU"),
    (
        ["--core-backend", "mlra_kernels", "--core-form", "materialized"],
        "core_backend mlra_kernels attends in latent space; use core_form absorbed, or core_",
    ),
    (["--core-backend", "mlra_kernels"], "core_backend mlra_kernels computes in bf16 or fp16; use"),
    (
        ["--core-backend", "mlra_kernels", "--bf16"],
        "core_backend mlra_kernels takes latent heads of 32, 64 or 128 dims and 16, 32 or 64 RoPE",
    ),
    (
        [
            "--core-backend=mlra_kernels",
            "--bf16",
            "--kv-lora-rank=128",
            "--qk-rope-head-dim=16",
            "--qk-nope-head-dim=32",
        ],
        "core_backend mlra_kernels runs on Hopper GPUs (H100, H200); use one, or core_backend auto",
    ),
    (["--fp8-linears", "most"], "argument --fp8-linears: invalid choice: 'most'"),
    (["--fp8-format", "hybrid"], "--fp8-format hybrid needs Transformer Engine on a GPU; install"),
    # Parallelism without, or with too few, processes.
    ([TP, "2"], f"{TP} 2 needs a multiple of 2 processes and there are 1; launch with torchrun"),
    ([PP, "2"], f"{TP} 1 x {PP} 2 needs a multiple of 2 processes and there are 1; launch with"),
    (
        ["--decoder-last-pipeline-num-layers", "1"],
        "--decoder-last-pipeline-num-layers 1 is about a pipeline's stages, and --pipeline-model-",
    ),
    ([CP, "2"], f"{TP} 1 x {CP} 2 needs a multiple of 2 processes and there are 1; launch with"),
    # Packed sequences.
    (
        ["--packed-sequences", "--reset-attention-mask"],
        "--packed-sequences and --reset-attention-mask both keep documents apart; leave out",
    ),
    (
        ["--packed-sequences", "--attention", "gta"],
        "--packed-sequences does not work with --attention gta: use --attention mlra",
    ),
    (
        ["--packed-sequences", "--attention", "gqa"],
        "--packed-sequences does not work with --attention gqa: Megatron's own attention needs",
    ),
    (
        ["--packed-sequences", "--cuda-graph-impl", "local"],
        "--cuda-graph-impl local replays one batch's documents on all with --packed-sequences",
    ),
    # Megatron's own assertions, with and without a message.
    (["--overlap-param-gather"], "--overlap-param-gather only supported with distributed optim"),
    (["--distribute-saved-activations"], "can distribute recomputed activations only across tens"),
    (
        ["--end-weight-decay", "1"],
        "Megatron refuses these arguments: `assert args.end_weight_decay",
    ),
    (["--attention-backend", "local"], "Megatron refuses these arguments: `assert args.spec[0] =="),
    (["--checkpoint-activations"], "Megatron refuses these arguments"),
    # Data.
    (["--data-path", "no/data"], "data file no/data.idx does not exist; make it with mlra prepro"),
    (["--data-path", "{corpus}.bin"], "names a file; leave .bin out: {corpus}"),
    (["--data-path", "{corpus}.idx"], "names a file; leave .idx out: {corpus}"),
    (
        ["--data-path", "{corpus}", "--train-data-path", "{corpus}"],
        "the command line names data by --data-path and by --train-data-path; leave one out",
    ),
    (
        ["--data-args-path", "no.txt"],
        "data arguments: [Errno 2] No such file or directory: 'no.txt'",
    ),
    (["--split", "most"], "--split most is not three shares such as 969,30,1"),
    (["--split", "1,0,0"], "--split 1,0,0 leaves nothing for validation; use another, or --eval"),
    (["--split", "99999,1,0"], "for validation; use more documents (mlra preprocess --split-lines"),
    (["--null-tokenizer-eod-id", "0"], "ends documents with id 256, the model is told 0; use"),
    # Folders.
    (
        ["--save", "{corpus}.bin"],
        "--save {corpus}.bin cannot be written: {corpus}.bin is not a fol",
    ),
    (["--save", "{corpus}.bin/run"], "cannot be written: {corpus}.bin is not a folder"),
    (["--save", "/proc/run"], "--save /proc/run cannot be written"),
    (["--tensorboard-dir", "{corpus}.bin"], "--tensorboard-dir {corpus}.bin cannot be written: "),
    (
        ["--vocab-size", "100"],
        "has a vocabulary of 257, the model one of 100; use --vocab-size 257",
    ),
    (["--load", "nowhere"], "--load nowhere is not a folder; give the --save of an earlier run"),
    (["--load", "."], "--load . holds no checkpoint (no latest_checkpointed_iteration.txt)"),
]
WORLDS = [
    # (processes, flags, error)
    (3, [TP, "2"], f"{TP} 2 needs a multiple of 2 processes and there are 3"),
    (3, [TP, "3"], "tensor parallel size 3 does not divide num_attention_heads 4; use"),
    (8, [TP, "8"], "tensor parallel size 8 does not divide num_attention_heads 4; use"),
    (
        2,
        ["--global-batch-size", "2"],
        "--global-batch-size 2 does not divide into micro-batches of",
    ),
    (
        2,
        [CP, "2", "--seq-length", "30"],
        f"--seq-length 30 does not divide into the 4 chunks of {CP}",
    ),
    (
        8,
        [CP, "2", TP, "4", "--sequence-parallel", "--seq-length", "28"],
        f"--seq-length 28 does not divide into the 4 chunks of {CP} 2 and 4 sequence-parallel"
        " ranks; use 32",
    ),
    (2, [CP, "2", "--cp-comm-type", "a2a"], "--cp-comm-type a2a is for attentions that send keys"),
    (2, [CP, "2", "--attention", "mfa"], f"{CP} 2 does not work with --attention mfa: use"),
    (
        2,
        [PP, "2", "--packed-sequences"],
        "--packed-sequences sends one row of tokens between pipeline stages, and --micro-batch-",
    ),
    (2, [PP, "2", "--num-layers", "3"], "Number of layers should be divisible by the pipeline"),
    (
        4,
        [PP, "4", "--num-layers", "4", "--reset-attention-mask"],
        f"--reset-attention-mask with {PP} 4: stages in the middle do not see the mask",
    ),
    (
        2,
        [PP, "2", "--num-virtual-stages-per-pipeline-rank", "1", "--reset-attention-mask"],
        f"--reset-attention-mask with {PP} 2: stages in the middle do not see the mask",
    ),
]

PRESETS = [
    ("num_latent_head: 4", "unknown key 'num_latent_head'; did you mean num_latent_heads?"),
    ("num_layers: two", "num_layers is 'two', not a valid int"),
    ("num_layers: 2.5", "num_layers is 2.5, not a valid int"),
    ("num_layers: true", "num_layers is True, not a valid int"),
    ("num_layers: [1, 2]", "num_layers is [1, 2], not a valid int"),
    ("save: {a: b}", "save is {'a': 'b'}, not a valid str"),
    ("output_gate: sometimes", "output_gate is 'sometimes'; use true or false"),
    ("attention: mla", "attention is 'mla'; use one of mlra, gqa, gta, mfa, tpa"),
    ("attention_backend: cudnn", "attention_backend: invalid choice 'cudnn'; use one of flash"),
    ("base: nowhere.yaml", "nowhere.yaml: no such file"),
    ("base: 3", "base is 3; use the name of another preset"),
    ("base: preset.yaml", "preset.yaml: base leads back to this file; remove it"),
    ("config: other.yaml", "unknown key 'config'"),
    ("lr: 1.0e-3\nlr: 2.0e-3", "lr is given twice; leave one"),
    ("- a\n- b", "expected lines of `key: value`, found ['a', 'b']"),
    ("", "expected lines of `key: value`, found None"),
    ("a: [", "while parsing a flow node"),
    ("{text}: \x00", "unacceptable character"),
    ("num_layers: 2", "--hidden-size is missing; give it, or a preset with --config"),
    ("multi_latent_attention: true", "--multi-latent-attention is Megatron's own MLA"),
]


@pytest.mark.parametrize(("argv", "error"), FLAGS, ids=[" ".join(case[0]) for case in FLAGS])
def test_flags(entry, preset, corpus, tmp_path, argv, error):
    argv = [word.replace("{corpus}", str(corpus)) for word in argv]
    check_refused(
        entry.run(tmp_path, "--config", preset, *argv), error.replace("{corpus}", str(corpus))
    )


@pytest.mark.parametrize(
    "argv", [("--data-path", "{corpus}", "{other}"), ("--held-out", "x={other}")]
)
def test_data_of_two_tokenizers(entry, preset, corpus, tmp_path, argv):
    """No --null-tokenizer-eod-id fits both, so none is proposed."""
    (tmp_path / "data").mkdir()
    other = tmp_path / "data" / "other"
    for suffix in (".bin", ".idx"):
        Path(f"{other}{suffix}").write_bytes(Path(f"{corpus}{suffix}").read_bytes())
    metadata = json.loads(Path(f"{corpus}.json").read_text()) | {"eod_id": 0}
    Path(f"{other}.json").write_text(json.dumps(metadata))
    argv = [word.format(corpus=corpus, other=other) for word in argv]
    check_refused(
        entry.run(tmp_path, "--config", preset, *argv),
        f"data {other} ends documents with id 0, data {corpus} with 256; all data of a run need"
        " one tokenizer: make one of them again by mlra preprocess, or leave it out\n",
    )


@pytest.mark.parametrize(("size", "argv", "error"), WORLDS)
def test_worlds(entry, preset, tmp_path, size, argv, error):
    env = {"WORLD_SIZE": size, "RANK": 0, "LOCAL_RANK": 0}
    check_refused(entry.run(tmp_path, "--config", preset, *argv, env=env), error)


def test_only_the_first_rank_of_a_machine_speaks(entry, preset, tmp_path):
    env = {"WORLD_SIZE": 3, "RANK": 1, "LOCAL_RANK": 1}
    run = entry.run(tmp_path, "--config", preset, TP, 2, env=env)
    assert (run.code, run.out, run.err) == (2, "", "")


@pytest.mark.parametrize(("text", "error"), PRESETS)
def test_presets(entry, tmp_path, text, error):
    (tmp_path / "preset.yaml").write_text(text)
    check_refused(entry.run(tmp_path, "--config", "preset.yaml"), error)


def test_missing_preset_names_the_nearest(entry, tmp_path):
    (tmp_path / "preset.yaml").write_text("num_layers: 2")
    check_refused(
        entry.run(tmp_path, "--config", "presets.yaml"),
        "--config presets.yaml: no such file; did you mean preset.yaml?",
    )


REQUIRED = {
    "num_layers": "--num-layers is missing",
    "num_attention_heads": "--num-attention-heads is missing",
    "seq_length": "--seq-length is missing",
    "micro_batch_size": "--micro-batch-size is missing",
    "lr": "--lr is missing",
    "train_iters": "--train-iters is missing; say how many steps to train",
    "data_path": "no data: give --data-path PREFIX",
}


@pytest.mark.parametrize("missing", REQUIRED)
def test_required(entry, preset, tmp_path, missing):
    (tmp_path / "preset.yaml").write_text(f"base: {preset}\n{missing}: null")
    check_refused(entry.run(tmp_path, "--config", "preset.yaml"), REQUIRED[missing])
