"""Megatron's flags of memory and overlap: what each does with this project's layers.

`ROWS` has every such flag of Megatron's parser (a test compares them), and
`python -m megatron_mlra.training.memory_flags` prints the table of docs/parallelism.md.
"""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from typing import NamedTuple

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_mlra.command_line.parser import flag

TESTED = "works"
UPSTREAM = "Megatron's"
REFUSED = "refused"


class Row(NamedTuple):
    """Flags of Megatron that share one verdict and one note."""

    flags: str
    verdict: str
    """`works`: a test compares a run with the flag and one without; `Megatron's`: does not touch
    the attention, and no test here compares; `refused`: an error in one line before the run."""
    note: str


ROWS = (
    Row(
        "--recompute-granularity --recompute-method --recompute-num-layers --recompute-modules"
        " --recompute-activations",
        TESTED,
        "`full`; `core_attn`, `mla_up_proj`, `mlp`, `moe`, `shared_experts`; `layernorm` and"
        " `moe_act` with Transformer Engine alone, not run here; `gdn_norm_out` has nothing here",
    ),
    Row(
        "--distribute-saved-activations --moe-layer-recompute",
        UPSTREAM,
        "of whole layers; of experts",
    ),
    Row(
        "--fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size"
        " --activation-offload-fraction --delta-offload-bytes-across-pp-ranks"
        " --fine-grained-offloading-max-inflight-offloads",
        TESTED,
        "`qkv_linear`: all up to the queries; `core_attn`: absorption, core and the branches' sum;"
        " `attn_proj`: gate and output projection. Needs Transformer Engine and"
        " `NVTE_CPU_OFFLOAD_V1=1`. Refused with full recomputation; `core_attn` with recomputation"
        " of `core_attn` or `mla_up_proj`; the three under CUDA graphs, and for GTA, MFA and TPA",
    ),
    Row(
        "--delay-offload-until-cuda-graph",
        UPSTREAM,
        "of the experts' modules: the attention's are not offloaded under CUDA graphs",
    ),
    Row(
        "--cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers",
        UPSTREAM,
        "of whole layers by Transformer Engine, refused without it; the absorbed query is kept"
        " then, not rebuilt",
    ),
    Row(
        "--overlap-moe-expert-parallel-comm --ep-overlap-early-attn-memory-release",
        TESTED,
        "needs expert parallelism and 16-bit weights; refused for GTA, MFA and TPA",
    ),
    Row(
        "--delay-wgrad-compute",
        TESTED,
        "of every linear; the latents' up-projection and the norms have their gradients in"
        " backward. Needs Transformer Engine and `--overlap-moe-expert-parallel-comm`; compared on"
        " one GPU, by layer",
    ),
    Row(
        "--use-megatron-fsdp --data-parallel-sharding-strategy",
        TESTED,
        "data parallel alone, all four strategies; needs einops. Refused with any other"
        " parallelism, and with `--save` and `--load`, whose files would be `fsdp_dtensor`, which"
        " nothing here reads: `--use-distributed-optimizer` has checkpoints",
    ),
    Row(
        "--fsdp-double-buffer --fsdp-manual-registration"
        " --megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype"
        " --megatron-fsdp-grad-comm-dtype --megatron-fsdp-enable-fine-grained-param-gather"
        " --megatron-fsdp-max-pool-double-buffer --fsdp-db-use-persist-buf-on-alloc-fail"
        " --no-gradient-reduce-div-fusion --disable-strict-fsdp-dtensor-load",
        UPSTREAM,
        "of Megatron-FSDP",
    ),
    Row(
        "--num-distributed-optimizer-instances --outer-dp-sharding-strategy"
        " --enable-full-sharding-in-hsdp",
        UPSTREAM,
        "refused with Megatron-FSDP",
    ),
    Row(
        "--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward",
        REFUSED,
        "Megatron's wrapping fails on tied embeddings; `--use-megatron-fsdp`",
    ),
    Row(
        "--init-model-with-meta-device",
        REFUSED,
        "weights of this project's layers would have no values",
    ),
    Row(
        "--tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards",
        REFUSED,
        "knows the weights of Megatron's own linears alone",
    ),
    Row(
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
        " --no-gradient-accumulation-fusion",
        TESTED,
        "",
    ),
    Row(
        "--use-precision-aware-optimizer --main-grads-dtype --exp-avg-dtype --exp-avg-sq-dtype"
        " --fp8-param-gather --dist-ckpt-optim-fully-reshardable",
        TESTED,
        "trained with on GPUs ([training.md](performance/training.md)); the last is the default",
    ),
    Row(
        "--overlap-param-gather-with-optimizer-step --no-align-param-gather --ddp-num-buckets"
        " --ddp-bucket-size --ddp-pad-buckets-for-high-nccl-busbw --use-nccl-ub"
        " --nccl-communicator-config-path --fp4-param-gather"
        " --distrib-optim-fully-reshardable-mem-efficient"
        " --disable-ckpt-load-validate-sharding-integrity --save-wgrads-interval"
        " --disable-fp8-wgrad",
        UPSTREAM,
        "of data parallelism, its optimizer and Transformer Engine's products",
    ),
    Row(
        "--optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload"
        " --overlap-cpu-optimizer-d2h-h2d",
        UPSTREAM,
        "of the optimizer",
    ),
    Row(
        "--tp-comm-overlap --tp-comm-overlap-cfg --disable-tp-comm-bulk-wgrad"
        " --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad",
        UPSTREAM,
        "of the MLP and the output projection: the other projections share one collective, which"
        " is not theirs",
    ),
    Row(
        "--no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush"
        " --defer-embedding-wgrad-compute --wgrad-deferral-limit",
        UPSTREAM,
        "of the pipeline and the output layer",
    ),
    Row(
        "--moe-shared-expert-overlap --overlap-dispatch-backward-with-experts-wgrad"
        " --moe-ncclep-static-shape --moe-ncclep-zero-copy --moe-paged-stash"
        " --moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda"
        " --moe-paged-stash-buffer-size-factor-cpu",
        UPSTREAM,
        "of the experts",
    ),
    Row(
        "--record-memory-history --memory-snapshot-path --empty-unused-memory-level"
        " --nccl-all-reduce-for-prefill",
        UPSTREAM,
        "changes no step",
    ),
)


def table() -> str:
    """The Markdown table of docs/parallelism.md."""
    lines = ["| Megatron's flag | here | |", "|---|---|---|"]
    for row in ROWS:
        names = ", ".join(f"`{name}`" for name in row.flags.split())
        lines.append(f"| {names} | {row.verdict} | {row.note} |")
    return "\n".join(lines)


def check(args: Namespace) -> None:
    """Refuse flags that cannot work, and set the arguments that Megatron-FSDP needs.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    for name, why in (
        ("use_torch_fsdp2", "fails on tied embeddings; use --use-megatron-fsdp"),
        ("init_model_with_meta_device", "leaves MLRA's weights without values; leave it out"),
    ):
        if getattr(args, name):
            raise ValueError(f"{flag(name)} {why}")
    for name in ("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"):
        if (getattr(args, name) or 1) > 1:
            raise ValueError(
                f"{flag(name)} {getattr(args, name)} cuts the weights of Megatron's own linears"
                " alone; leave it out"
            )
    if args.use_megatron_fsdp:
        _check_megatron_fsdp(args)
    elif args.ckpt_format != "torch_dist":
        raise ValueError(
            f"--ckpt-format {args.ckpt_format} is not read here; leave it out, for torch_dist"
        )
    offloads = [name for name in _OFFLOADING if getattr(args, name)]
    if args.dry_run is not None:
        if offloads:
            raise ValueError(
                f"--dry-run does not count what {flag(offloads[0])} moves; leave one out"
            )
        return
    _check_precision_aware(args)
    if args.optimizer_cpu_offload and not torch.cuda.is_available():
        raise ValueError("--optimizer-cpu-offload needs a GPU, and there is none; leave it out")
    if args.reuse_grad_buf_for_mxfp8_param_ag and not (
        args.fp8 and args.fp8_recipe == "mxfp8" and args.fp8_param_gather
    ):
        raise ValueError(
            "--reuse-grad-buf-for-mxfp8-param-ag is for weights kept in MXFP8; add --fp8-format"
            " hybrid --fp8-recipe mxfp8 --fp8-param-gather, or leave it out"
        )
    for name in (*offloads, *(["delay_wgrad_compute"] if args.delay_wgrad_compute else ())):
        if args.transformer_impl != "transformer_engine" and name != "optimizer_cpu_offload":
            raise ValueError(
                f"{flag(name)} needs Transformer Engine and a GPU; install the extra"
                " megatron-mlra[te], or leave it out"
            )
    recomputed = set(args.recompute_modules or ()) if args.recompute_granularity else set()
    if "layernorm" in recomputed and args.transformer_impl != "transformer_engine":
        # There Megatron takes "no FP8" for FP8, and asks Transformer Engine for the FP8 state.
        raise ValueError(
            "--recompute-modules layernorm fails in Megatron 0.19.2 without Transformer Engine;"
            " leave layernorm out"
        )


_OFFLOADING = (
    "fine_grained_activation_offloading",
    "cpu_offloading_num_layers",
    "optimizer_cpu_offload",
)


def _check_precision_aware(args: Namespace) -> None:
    """Refuse what Megatron would refuse only once all ranks have met."""
    asked = "--use-precision-aware-optimizer"
    if not args.use_precision_aware_optimizer:
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(args, name) != "fp32":
                raise ValueError(
                    f"{flag(name)} {getattr(args, name)} needs {asked}; add it, or leave"
                    f" {flag(name)} out"
                )
    elif not (args.use_distributed_optimizer or args.use_megatron_fsdp):
        raise ValueError(f"{asked} needs --use-distributed-optimizer; add it, or leave it out")
    elif not (HAVE_TE or args.optimizer_cpu_offload):
        raise ValueError(
            f"{asked} needs Transformer Engine's Adam on a GPU; install the extra"
            " megatron-mlra[te], or leave it out"
        )


def _check_megatron_fsdp(args: Namespace) -> None:
    asked = "--use-megatron-fsdp"
    if args.dry_run is not None:
        raise ValueError(f"--dry-run does not count what {asked} cuts; leave one out")
    for name in ("save", "load"):
        if getattr(args, name):
            raise ValueError(
                f"{asked} with --{name} {getattr(args, name)}: nothing here reads its checkpoints;"
                " use --use-distributed-optimizer, whose checkpoints are"
            )
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "num_distributed_optimizer_instances",
    ):
        if getattr(args, name) > 1:
            raise ValueError(
                f"{asked} with {flag(name)} {getattr(args, name)} has not been tried; use 1, or"
                " --use-distributed-optimizer"
            )
    if importlib.util.find_spec("einops") is None:
        raise ValueError(f"{asked} needs einops; pip install einops")
    # Megatron-FSDP accepts no other format, and checksums exist for torch_dist alone.
    args.ckpt_format, args.verify_integrity = "fsdp_dtensor", False
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        # cli.py sets 1 for tensor parallelism, which is off here; Megatron-FSDP refuses 1.
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    if not torch.cuda.is_available():
        # gloo has no reduction that scales its sum.
        args.gradient_reduce_div_fusion = False


if __name__ == "__main__":
    print(table())
