"""The launcher's command line: torchrun's flags, then the entry's script and its flags."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from megatron_mlra.command_line.loading import announce_loading
from megatron_mlra.command_line.output import guard
from megatron_mlra.command_line.ranks import REFUSED, SPEAKER
from megatron_mlra.command_line.suggest import refusal
from megatron_mlra.launch import call
from megatron_mlra.launch.control import (
    AGAIN,
    INTERRUPTED,
    LINGER,
    STOP_SIGNALS,
    Control,
    Ended,
    say,
)

if TYPE_CHECKING:
    from megatron_mlra.launch.hosts import Hosts

DEFAULT_JOIN_TIMEOUT = 600.0
"""Seconds, torchrun's default."""


def main(argv: list[str]) -> int:
    """Start this host's ranks and wait for their end.

    Args:
        argv: flags of torchrun, the script, the script's flags.

    Returns:
        The exit code: 0 if the ranks ended normally; STOPPED_CODE (environment, default 0) if a
        signal stopped them; 2 if the command line or the input was refused; 130 if a second Ctrl-C
        ended them at once; 1 otherwise.
    """
    # The thread of Watch waits for the blocked signals. The ranks inherit the block, and remove it
    # when they can handle the signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, heeded())
    control = Control()
    said = os.environ.get("STOPPED_CODE", "0")
    if not re.fullmatch("[0-9]{1,3}", said, re.ASCII) or int(said) > 255:
        return _refused(argv, f"STOPPED_CODE is {said!r}; give an exit code, 0 to 255")
    stopped_code = int(said)
    watch = Watch(control, stopped_code)
    watch.start()
    try:
        with _quiet_cpp():
            from torch.distributed import run as torchrun

            from megatron_mlra.launch import checks
    except ImportError as error:
        line = (
            f"{sys.executable} of host {socket.gethostname()} cannot import torch ({error}); set"
            " PYTHON to the Python of the environment that has it, as PYTHON=.venv/bin/python"
        )
        return _refused(argv, line)
    try:
        flags = torchrun.get_args_parser()
    except ValueError:
        return _refused(argv, checks.wrong_switch())
    flags.error = functools.partial(_refuse_flags, flags)
    # torchrun's own is `static`: no host can come later, and those without a number wait for ever.
    flags.set_defaults(rdzv_backend=os.environ.get("PET_RDZV_BACKEND", "c10d"))
    args = flags.parse_args(argv)
    args.signals_to_handle = "SIGQUIT"
    if args.nnodes in ("1", "1:1") and not args.rdzv_endpoint:
        args.standalone = True  # one host, torchrun's default, has no other to meet
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    try:
        checks.check(args)
        if args.standalone:
            args.local_addr = args.local_addr or "127.0.0.1"
        else:
            watch.hosts = _join(args, control)
    except ValueError as error:
        say(f"error: {error}")
        if args.rdzv_endpoint:
            call.refuse(args.rdzv_endpoint, args.nnodes, args.rdzv_id, str(error))
        return REFUSED
    except TimeoutError as error:
        say(f"error: {error}")
        return 1
    code, why = _run(args, control, watch.hosts)
    control.finished = True
    if code and watch.hosts is not None:
        watch.hosts.report(code, why)
    return stopped_code if control.asked and not code else code


def start() -> NoReturn:
    """Run the program `mlra launch` on `sys.argv`, and exit."""
    guard(ending=False)
    if "--standalone" in sys.argv:  # of several hosts each would say it
        announce_loading("PyTorch", "some seconds")
    code = 1
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's normal exit would end threads, and C++ aborts the process with exit code -6 if one of
    # them is in a request to the hosts' store.
    os._exit(code)


def heeded() -> set[signal.Signals]:
    """The stop signals, without those that the parent process ignored (`nohup`, or a script that
    starts this program in the background)."""
    may_be_ignored = (signal.SIGINT, signal.SIGHUP)
    ignored = {n for n in may_be_ignored if signal.getsignal(n) is signal.SIG_IGN}
    return {*STOP_SIGNALS} - ignored


def _next_signal(numbers: set[signal.Signals], seconds: float) -> signal.Signals | None:
    """The next of these blocked signals; None if there is none for that long.

    Not by `sigtimedwait`: if the process is stopped (SIGSTOP, `scontrol suspend`) until the time is
    up, Python 3.12 returns what lies in memory that nobody has written.
    """
    end = time.monotonic() + seconds
    while not (there := signal.sigpending() & numbers):
        if time.monotonic() > end:
            return None
        time.sleep(0.05)
    return signal.sigwait(there)


class Watch(threading.Thread):
    """The thread that receives stop signals, and ends the process when its agent cannot."""

    def __init__(self, control: Control, stopped_code: int) -> None:
        super().__init__(daemon=True)
        self.control, self.stopped_code = control, stopped_code
        self.hosts: Hosts | None = None

    def run(self) -> None:
        """Run until the process ends."""
        stops = heeded()
        while True:
            heard = _next_signal(stops, 0.5)
            if heard == signal.SIGINT:
                self.control.interrupt()
            elif heard:
                self.control.ask(heard.name)
            if self.hosts is not None:
                self.hosts.check()
            code = self.control.exit_code(self.stopped_code)
            if code is not None:
                if self.hosts is not None and self.hosts.reached is not None:
                    time.sleep(LINGER)
                os._exit(code)


def _join(args: Namespace, control: Control) -> Hosts:
    """Check the settings that several hosts need, and join the exchange of calls.

    Raises:
        ValueError: a setting is wrong.
        TimeoutError: the first host did not come.
    """
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend

    from megatron_mlra.launch import hosts, network

    if not args.nnodes.isdigit() or int(args.nnodes) < 1:
        raise ValueError(
            f"NODES {args.nnodes} is no number of hosts; a number that changes (as 1:2) is not"
            " supported"
        )
    host, port = network.parse_endpoint(args.rdzv_endpoint)
    here = socket.gethostname()
    network.resolve(host, port, here)
    found = network.own_address((host, port), args.local_addr)
    conf = dict(item.split("=", 1) for item in args.rdzv_conf.split(",") if "=" in item)
    join_timeout = _seconds(conf.get("join_timeout", str(DEFAULT_JOIN_TIMEOUT)))
    c10d_rendezvous_backend._matches_machine_hostname = network.is_here
    first = network.meet(host, port, join_timeout, say, here)
    if found is not None:
        address, interface = found
        if args.local_addr is None:
            say(
                f"note: {here} is a loopback address on {here} itself; other hosts are given"
                f" {address} ({interface}); LOCAL_ADDR and GLOO_SOCKET_IFNAME choose another"
            )
        args.local_addr = address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    own = call.Call(here, os.getpid(), args.nnodes, args.rdzv_id, node_rank=args.node_rank)
    joined = hosts.Hosts(control, own, (host, port), join_timeout)
    joined.start(judges=first)
    return joined


def _run(args: Namespace, control: Control, hosts: Hosts | None) -> tuple[int, str]:
    """Run torchrun; returns the exit code, and the reason for the other hosts."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
    from torch.distributed.elastic.rendezvous import api as rendezvous
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
    from torch.distributed.launcher import api

    from megatron_mlra.launch import agent, order, ports

    rendezvous.get_free_port = ports.keep_port
    DynamicRendezvousHandler._node_desc_generator = order.Numbered(args.node_rank)
    os.environ[SPEAKER] = "1"
    # Restarted ranks must not read the addresses of those that are gone (docs/fault_tolerance.md).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    api.LocalElasticAgent = functools.partial(agent.Agent, control=control)
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        failures, most = error.failures, args.max_restarts
        refused = any(failure.exitcode == REFUSED for failure in failures.values())
        told = agent.reason(failures)
        why = f"{agent.describe(failures)}{f': {told}' if told else ''}"
        if any(failure.exitcode == INTERRUPTED for failure in failures.values()):
            control.end(INTERRUPTED, AGAIN)
            return INTERRUPTED, why
        if refused and told:
            say(f"error: {'' if hosts is None else f'host {socket.gethostname()}: '}{told}")
        elif refused:
            say(f"error: {agent.describe(failures)}; not started again")
        else:
            no_more = "the run was told to stop" if control.asked else f"MAX_RESTARTS {most}"
            say(f"error: {agent.describe(failures)}; not started again ({no_more})")
        return (REFUSED if refused else 1), why
    except SignalException as stop:
        return 128 + stop.sigval, f"by {stop.sigval.name}"
    except Ended:
        return control.over, ""
    except RendezvousError as error:
        if control.over is not None:
            return control.over, ""
        late = isinstance(error, RendezvousTimeoutError)
        if not late and (control.ran or (hosts is not None and hosts.reached is not None)):
            host, _, port = args.rdzv_endpoint.rpartition(":")
            line = f"host {host}, where all meet ({host}:{port}), is gone or has ended"
            say(f"error: {line}")
            return 1, line
        name = type(error).__name__.removeprefix("Rendezvous").removesuffix("Error").lower()
        line = (
            f"the hosts did not meet at {args.rdzv_endpoint} ({name}); compare NODES,"
            f" RDZV_ENDPOINT and RDZV_ID ({args.nnodes}, {args.rdzv_endpoint}, {args.rdzv_id} here)"
            " on all"
        )
        say(f"error: {line}")
        return 1, line
    return 0, ""


def _refuse_flags(flags: ArgumentParser, message: str) -> NoReturn:
    """argparse's error in one line, without torchrun's page of usage."""
    if "required: training_script" in message:
        message = "give what to start: -m megatron_mlra.training, or a script, and its flags"
    say(f"error: {refusal(message, flags._option_string_actions)}")
    sys.exit(REFUSED)


def _seconds(said: str) -> float:
    """JOIN_TIMEOUT in seconds; `nan` and `inf` are refused.

    Raises:
        ValueError: the text is not a number from 0 to 1,000,000.
    """
    with contextlib.suppress(ValueError):
        if 0 < float(said) <= 1e6:
            return float(said)
    raise ValueError(f"JOIN_TIMEOUT (join_timeout) is {said!r}; give seconds, at most 1,000,000")


def _refused(argv: list[str], line: str) -> int:
    """Print why this host is refused, tell the other hosts, and return the exit code. For errors
    before torchrun's parser can be imported."""
    say(f"error: {line}")
    names = ("--rdzv-endpoint", "--nnodes", "--rdzv-id")
    if names[0] in argv:
        call.refuse(*(_after(argv, name) for name in names), line)
    return REFUSED


def _after(argv: list[str], name: str) -> str:
    """The word after a flag; empty if the flag is not given."""
    return dict(itertools.pairwise(argv)).get(name, "")


@contextlib.contextmanager
def _quiet_cpp() -> Iterator[None]:
    """Inside the block torch's C++ code prints no warnings. The ranks' environment is unchanged."""
    name = "TORCH_CPP_LOG_LEVEL"
    chosen = name in os.environ
    os.environ.setdefault(name, "FATAL")
    try:
        yield
    finally:
        if not chosen:
            del os.environ[name]
