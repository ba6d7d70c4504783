"""Stop signals before the entry can heed them and after it is done, in real processes."""

import subprocess
import sys

START = """
import os, signal, sys
from megatron_mlra.fault_tolerance import stopping
class Handler:
    _signal_received = False
    def signals_received(self):
        return [self._signal_received, False]
handler = Handler()
def tell():
    os.kill(os.getpid(), signal.SIGTERM)
"""


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True)


def test_a_signal_that_waited_is_heeded_and_handed_over():
    done = run(
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "tell()\n"
        "stopping.listen(signal.SIGTERM)\n"
        "assert not stopping.any_rank_asked()\n"
        "stopping.hand_over(handler)\n"
        "print(stopping.any_rank_asked(), stopping.by())\n"
    )
    assert (done.returncode, done.stdout) == (0, "True  by SIGTERM\n"), done.stderr


def test_another_rank_is_named():
    done = run(
        "stopping.listen(signal.SIGTERM)\n"
        "Handler.signals_received = stopping.remember_told(lambda handler: [False, True])\n"
        "stopping.hand_over(handler)\n"
        "print(stopping.any_rank_asked(), stopping.by())\n"
    )
    assert done.stdout == "True  by a signal to rank 1\n", done.stderr


def test_a_signal_on_the_way_out_kills_no_rank_that_is_done():
    # Python gives signals their default action back before it ends.
    late = "class Late:\n    def __del__(self):\n        tell()\nsys.late = Late()\n"
    assert run(f"stopping.listen(signal.SIGTERM)\nstopping.close()\n{late}").returncode == 0


def test_without_a_handler_a_signal_ends_the_process():
    done = run("stopping.listen(signal.SIGTERM)\ntell()\nstopping.ignore_no_more()\n")
    assert done.returncode == -15


def test_a_thread_sets_nothing():
    done = run(
        "import threading\n"
        "thread = threading.Thread(target=stopping.listen, args=(signal.SIGTERM,))\n"
        "thread.start(), thread.join()\n"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)\n"
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
