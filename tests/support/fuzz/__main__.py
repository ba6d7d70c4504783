"""Try many inputs by hand: `PYTHONPATH=tests python -m support.fuzz --inputs 1000 --seed 7`."""

from __future__ import annotations

import argparse
import resource
import sys
import time

from support.fuzz.runner import SHARE, Fuzz, numbers


def main() -> int:
    """Print every fault; returns 1 if there is any."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--inputs", type=int, default=300)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--only", type=int, help="number of one input")
    all_tools = "run every tool that reads an input, not a share of them"
    flags.add_argument("--all-tools", action="store_true", help=all_tools)
    flags.add_argument("--keep", action="store_true", help="leave the inputs of faults")
    args = flags.parse_args()
    start = time.monotonic()
    fuzz = Fuzz(args.seed, args.keep, 1 if args.all_tools or args.only is not None else SHARE)
    found = fuzz.warm_up()
    print(f"ready in {time.monotonic() - start:.0f} s, {fuzz.root}", flush=True)
    for fault in found:
        print(fault, flush=True)
    bad = len(found)
    start = time.monotonic()
    for number in numbers(args.inputs, args.only):
        for fault in fuzz.try_one(number):
            bad += 1
            print(f"--- {fault.number}: {fault.changed}", flush=True)
            print(f"    {fault.tool}\n    {fault.what}\n    {fault.said}", flush=True)
    print(
        f"{args.inputs} inputs, {sum(fuzz.runs.values())} runs {fuzz.runs},"
        f" {time.monotonic() - start:.0f} s, {_processor():.0f} s of one core with the start,"
        f" slowest {fuzz.slowest[0]:.1f} s (number {fuzz.slowest[1]}), bad = {bad}"
    )
    if not args.keep:
        fuzz.close()
    return 1 if bad else 0


def _processor() -> float:
    """Seconds that this process and those it waited for have computed."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    sys.exit(main())
