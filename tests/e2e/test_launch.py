"""The launcher with real processes: signal, save, relaunch; what it refuses; hosts that disagree;
which checkpoints are kept. SLURM's part is in tests/cluster."""

import functools
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_mlra.fault_tolerance.retention import prune
from megatron_mlra.launch.ports import reserve_port
from support import ENV, ROOT
from support.runs import wait_for, wait_for_end

LAUNCH = ROOT / "examples" / "launch.sh"


TWO = {"NODES": "2", "RDZV_ENDPOINT": "localhost:29500"}


def launch(
    preset: Path, save: Path, out: Path, ranks: int, *flags: object, env: dict | None = None
) -> subprocess.Popen:
    command = ["bash", LAUNCH, preset, save, "--log-interval", 1, *flags]
    own = {"PYTHON": sys.executable, "GPUS_PER_NODE": str(ranks), "MAX_RESTARTS": "0"}
    env = ENV | own | (env or {})
    with open(out, "w") as file:
        # Of a shell's background job children would ignore SIGINT.
        return subprocess.Popen(
            [*map(str, command)],
            env=env,
            stdout=file,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def test_a_signal_saves_and_a_relaunch_goes_on(preset, warm_python, tmp_path):
    save, out = tmp_path / "save", tmp_path / "out.txt"
    run = launch(preset, save, out, 2, "--train-iters", 100000, "--eval-iters", 0)
    wait_for(out, "step 3/")
    run.send_signal(signal.SIGINT)
    assert run.wait(300) == 0, out.read_text()
    said = out.read_text()
    assert said.count("note: stopping in order; ") == 1
    assert "by SIGTERM, which is saved" in said
    step = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert step >= 3

    again = tmp_path / "again.txt"
    flags = ("--train-iters", 100000, "--exit-interval", step + 2, "--eval-iters", 0)
    flags += ("--save-interval", 1, "--keep-last", 2)
    warm = {"PYTHON": str(warm_python)}
    assert launch(preset, save, again, 1, *flags, env=warm).wait(300) == 0, again.read_text()
    said = again.read_text()
    assert f"step {step + 1}/" in said and f"step {step}/" not in said
    kept = tmp_path / "kept"
    steps = sorted(path.name for path in save.glob("iter_*"))
    shutil.copytree(save, kept)
    newest = int((kept / "latest_checkpointed_iteration.txt").read_text())

    # The newest stays whatever is asked; one that is damaged counts for nothing.
    assert steps == [f"iter_{step + 1:07d}", f"iter_{step + 2:07d}"]
    assert prune(kept, 2) == []
    damaged = kept / "iter_0000001"
    shutil.copytree(kept / steps[0], damaged)
    (damaged / ".metadata").unlink()
    deleted = prune(kept, 1)
    assert deleted == [s for s in sorted((int(n[5:]) for n in steps), reverse=True) if s < newest]
    assert {path.name for path in kept.glob("*iter_*")} == {f"iter_{newest:07d}", damaged.name}


def test_ranks_whose_launcher_is_killed_save_and_end(preset, tmp_path):
    save, out = tmp_path / "save", tmp_path / "out.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["1", ROOT / "pretrain_mlra.py", "--config", preset, "--save", save]
    command += ["--train-iters", "100000", "--log-interval", "1", "--eval-iters", "0"]
    with open(out, "w") as file:
        launcher = subprocess.Popen(command, env=ENV, stdout=file, stderr=file)
    wait_for(out, "step 3/")
    (rank,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    wait_for(out, "by SIGTERM, which is saved")
    wait_for_end([rank.pid])
    assert int((save / "latest_checkpointed_iteration.txt").read_text()) >= 3


def without_packages(folder: Path) -> Path:
    """A Python without torch: this one, without its packages."""
    bare = folder / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -S "$@"\n')
    bare.chmod(0o755)
    return bare


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        (["mlra4_7b"], {}, "usage: examples/launch.sh"),
        (["nothing", "runs/x"], {}, "there is no preset megatron_mlra/presets/nothing.yaml"),
        (["debug", "x"], {"NODES": "2"}, "set RDZV_ENDPOINT"),
        (["debug", "x"], {"NODES": "1:2"}, "NODES is '1:2'; give one number"),
        (["debug", "x"], {"NODES": "a[$(touch {ran})]"}, "give one number"),
        (["debug", "x"], {"GPUS_PER_NODE": "a[$(touch {ran})]"}, "GPUS_PER_NODE is 'a[$(touch"),
        (["debug", "x"], {"JOIN_TIMEOUT": "a[$(touch {ran})]"}, "JOIN_TIMEOUT is 'a[$(touch"),
        (["debug", "x"], {"PYTHON": "/no/python"}, "there is no /no/python; set PYTHON"),
        (["debug", "x"], {"PYTHON": "{bare}"}, "cannot import torch"),
        (["debug", "x"], {"PYTHON": "{old}"}, "/old is Python 3.6; set PYTHON to the Python, 3.12"),
        (["debug", "x"], TWO | {"RDZV_ENDPOINT": "node"}, "node is not HOST:PORT"),
        (["debug", "x"], TWO | {"RDZV_ENDPOINT": "no.such.host.invalid:1"}, "there is no host"),
        (["debug", "x"], TWO | {"RDZV_ENDPOINT": "localhost:{taken}"}, "by another program"),
        (["debug", "x"], TWO | {"LOCAL_ADDR": "192.0.2.1"}, "is no address of this host"),
    ],
)
def test_launch_errors_are_one_line(argv, env, message, warm_python, tmp_path):
    bare, ran = without_packages(tmp_path), tmp_path / "ran"
    # Says what an old Python would.
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho 3.6\n")
    old.chmod(0o755)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        words = {"ran": ran, "bare": bare, "old": old, "taken": other.getsockname()[1]}
        env = {name: value.format(**words) for name, value in env.items()}
        command = ["bash", LAUNCH, *argv]
        env = ENV | {"PYTHON": str(warm_python)} | env
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300
        )
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not ran.exists()


@pytest.fixture
def meet(warm_python) -> Callable[..., subprocess.Popen]:
    """A function that starts one of several launchers on this machine."""
    return functools.partial(start_one, str(warm_python))


def start_one(
    python: str, out: Path, save: Path, port: int, nodes: int, preset: str = "debug", **env: str
) -> subprocess.Popen:
    host = {"NODES": str(nodes), "RDZV_ENDPOINT": f"localhost:{port}", "LOCAL_ADDR": own_address()}
    env = ENV | {"PYTHON": python, "GPUS_PER_NODE": "1", "RDZV_ID": "x"} | host | env
    with open(out, "w") as file:
        command = ["bash", str(LAUNCH), preset, str(save)]
        return subprocess.Popen(command, env=env, stdout=file, stderr=file)


def wait_until_met(port: int) -> None:
    """Wait until the first host's store is there."""
    deadline = time.monotonic() + 300
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


def lines(out: Path) -> list[str]:
    """What was said, without the line of what is loaded."""
    return [line for line in out.read_text().splitlines() if not line.startswith("loading ")]


def own_address() -> str:
    """An address of this machine that is not its loopback."""
    found = [e.address for entries in psutil.net_if_addrs().values() for e in entries]
    return next(a for a in found if a.count(".") == 3 and not a.startswith("127."))


@pytest.fixture
def port() -> Iterator[int]:
    """A port where the hosts of a test meet."""
    with reserve_port() as kept:
        yield kept.getsockname()[1]


def test_hosts_that_were_told_differently_end_soon(port, tmp_path):
    outs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    one = start_one(sys.executable, outs[0], tmp_path / "save", port, 2)
    two = start_one(sys.executable, outs[1], tmp_path / "save", port, 2, NODES="3")
    for launcher, out in ((one, outs[0]), (two, outs[1])):
        assert launcher.wait(300) == 2, out.read_text()
        (line,) = lines(out)
        message = "error: NODES is [23] on host .* and [23] on host .*; give all hosts the same"
        assert re.fullmatch(message, line)


@pytest.mark.parametrize("lacks", ["torch", "preset"])
def test_a_host_that_lacks_something_is_named_on_the_other(lacks, meet, port, tmp_path):
    outs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    one = meet(outs[0], tmp_path / "save", port, 2)
    wait_until_met(port)
    if lacks == "torch":
        two = meet(outs[1], tmp_path / "save", port, 2, PYTHON=str(without_packages(tmp_path)))
        why = "cannot import torch"
    else:
        two = meet(outs[1], tmp_path / "save", port, 2, preset="not-there")
        why = "there is no preset megatron_mlra/presets/not-there.yaml"
    for launcher, out in ((one, outs[0]), (two, outs[1])):
        assert launcher.wait(300) == 2, out.read_text()
        (line,) = lines(out)
        assert line.startswith("error: ") and why in line and f"host {socket.gethostname()}" in line
    assert outs[0].read_text().startswith(f"error: host {socket.gethostname()} ended: ")


def test_a_host_that_does_not_come(port, tmp_path):
    out = tmp_path / "out.txt"
    launcher = start_one(sys.executable, out, tmp_path / "save", port, 2, JOIN_TIMEOUT="5")
    assert launcher.wait(300) == 1, out.read_text()
    (line,) = out.read_text().splitlines()
    assert line.startswith("error: the hosts did not meet at localhost:") and "(timeout)" in line


def test_a_package_that_is_missing_is_one_line(tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()  # hides the real one
    out = tmp_path / "out.txt"
    path = {"PYTHONPATH": f"{tmp_path}:{ENV['PYTHONPATH']}", "MAX_RESTARTS": "3"}
    run = launch(Path("debug"), tmp_path / "save", out, 2, "--mock-data", env=path)
    assert run.wait(300) == 2
    (line,) = lines(out)
    assert re.match(
        r"error: .* lacks a package of the run \(No module named 'megatron\.core'", line
    )
    assert socket.gethostname() in line


def test_a_signal_while_waiting_for_other_hosts(meet, port, tmp_path):
    out = tmp_path / "out.txt"
    launcher = meet(out, tmp_path / "save", port, 2, STOPPED_CODE="75")
    wait_until_met(port)  # then asleep in torchrun's rendezvous
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(300) == 75
    said = "stopped by SIGUSR1 while no rank ran; there is nothing new to save\n"
    assert out.read_text() == said


def test_a_refusal_is_not_started_again(preset, warm_python, tmp_path):
    out, again = tmp_path / "out.txt", {"MAX_RESTARTS": "3", "PYTHON": str(warm_python)}
    run = launch(preset, tmp_path / "save", out, 2, "--no-such-flag", env=again)
    soak = [warm_python, ROOT / "tools/soak.py", "--config", preset, "--ranks", 1, "--kills", 1]
    soak += ["--work", tmp_path / "soak", "--no-such-flag"]
    soaked = subprocess.run([*map(str, soak)], capture_output=True, text=True, env=ENV, timeout=300)
    assert run.wait(300) == 2
    (line,) = lines(out)
    assert line.startswith("error: unknown flag --no-such-flag")
    assert soaked.returncode == 2 and soaked.stderr.endswith(f"{line}\n")


def test_what_launch_hands_on(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nenv\n')
    python.chmod(0o755)
    given = {
        "PYTHON": str(python),
        "SLURM_GPUS_ON_NODE": "3",
        "PET_NNODES": "2",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
    }
    done = subprocess.run(
        ["bash", LAUNCH, "debug", "there", "--data-path", "x"],
        capture_output=True,
        text=True,
        env={name: value for name, value in ENV.items() if name != "GPUS_PER_NODE"} | given,
        cwd=tmp_path,
    )
    command, *env = done.stdout.splitlines()
    assert " --nproc-per-node 3 " in command
    assert command.endswith(
        f"{ROOT}/pretrain_mlra.py --config {ROOT}/megatron_mlra/presets/debug.yaml --save there"
        " --load there --data-path x"
    )
    # Of another launcher, for flags of torchrun.
    assert not [line for line in env if line.startswith("PET_")]
    # torch warns of the former name.
    assert "TORCH_FR_BUFFER_SIZE=7" in env
    assert not [line for line in env if line.startswith("TORCH_NCCL_TRACE_BUFFER_SIZE")]
