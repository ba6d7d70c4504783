"""Checks of expert parallelism, before Megatron sees the flags.

Megatron refuses a number of processes that experts do not fit only once all processes have met. The
run would then end as after a fault, and a launcher would start the run again.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_mlra.command_line.numbers import largest_divisor

EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"


def check_experts(args: Namespace) -> None:
    """Refuse sizes of expert parallelism that fit neither the experts nor the processes.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    if args.moe_router_num_groups is not None and args.moe_router_group_topk is None:
        raise ValueError(
            f"--moe-router-num-groups {args.moe_router_num_groups} has no effect without"
            " --moe-router-group-topk; add it"
        )
    experts, ep = args.num_experts, args.expert_model_parallel_size
    if ep > 1 and not args.use_checkpoint_args:
        if not experts:
            raise ValueError(
                f"{EP} {ep} spreads experts over ranks, and there are none; add --num-experts, or"
                f" leave {EP} out"
            )
        if experts % ep:
            fits = largest_divisor(experts, ep)
            raise ValueError(f"{EP} {ep} does not divide --num-experts {experts}; use {fits}")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    ranks = ep * etp * pp
    if args.world_size % ranks == 0:
        return
    cuts = f"{EP} {ep}"
    if etp > 1:
        given = "" if args.expert_tensor_parallel_size else ", that of other layers,"
        cuts += f" x {ETP} {etp}{given}"
    if pp > 1:
        cuts += f" x --pipeline-model-parallel-size {pp}"
    whole = etp > 1 and args.world_size % (ep * pp) == 0
    fix = f"use {ETP} 1" if whole else f"launch with torchrun --nproc-per-node {ranks}"
    raise ValueError(
        f"{cuts} needs a multiple of {ranks} processes and there are {args.world_size}; {fix}"
    )
