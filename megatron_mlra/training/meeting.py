"""The meeting of all ranks before a run: equal code, arguments and data, and a locked `--save`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_mlra.command_line.parser import say
from megatron_mlra.command_line.ranks import first_of_host
from megatron_mlra.fault_tolerance import fingerprint, saved_steps
from megatron_mlra.fault_tolerance.handshake import World, meet
from megatron_mlra.fault_tolerance.run_lock import RunLock
from megatron_mlra.training.arguments import join_world
from megatron_mlra.training.batches import check_data_contents, prefixes


def meet_all(args: Namespace, given: dict[str, str], lock: RunLock | None) -> World:
    """Wait for all ranks of the run, compare their fingerprints, and lock `--save` on rank 0.

    Args:
        args: validated.
        given: the fingerprint of the arguments as they were parsed.
        lock: of the folder `--save`; None without that flag.

    Raises:
        ValueError: names the host that differs and the difference, damaged data, or the fault of
            `--save`.
    """

    def enter() -> None:
        """Runs on rank 0, for all ranks."""
        check_data_contents(args, say)
        if lock is not None:
            lock.acquire()
            # Again, under the lock: another run may have saved since the check before.
            saved_steps.check_unused(args)

    join_world()
    same = {"environment": fingerprint.of_environment(), "code": fingerprint.of_code()}
    same["arguments"] = given
    if first_of_host():  # the ranks of a host see the same files
        same["data"] = fingerprint.of_files(_data_files(args))
    same["derived arguments"] = fingerprint.of_arguments(args)
    seconds = 60 * args.distributed_timeout_minutes
    return meet(args.rank, args.world_size, same, seconds=seconds, save=args.save, enter=enter)


def _data_files(args: Namespace) -> list[str]:
    """The files of a run's datasets."""
    paths = {prefix + end for prefix in prefixes(args) for end in (".bin", ".idx")}
    return [path for path in paths if Path(path).is_file()]
