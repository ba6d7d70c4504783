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


OLD_THREAD = """
import ctypes, threading
old = threading.Thread(target=time.sleep, args=(60,), daemon=True)  # as numpy has, once imported
old.start()
stopping.listen_to_interrupts(lambda: (say_error("ended"), os._exit(3)))
def again():
    for _ in range(2):
        time.sleep(0.3)
        signal.pthread_kill(old.ident, signal.SIGINT)
"""


def test_an_interrupt_is_heard_whichever_thread_is_given_it():
    """The main thread is in a call that no signal ends, as an import or a collective is."""
    begin = "import time\nfrom megatron_mlra.command_line.output import say_error\n"
    busy = "threading.Thread(target=again).start()\nctypes.CDLL(None).sleep(60)\n"
    done = run(begin + OLD_THREAD + busy)
    assert done.returncode == 3, done.stderr
    note, ended = done.stderr.splitlines()
    assert note.startswith("note: stopping in order; the run is still starting, and ends before")
    assert ended == "ended"


def test_two_interrupts_at_once_are_one():
    """`timeout -s INT` sends one to its child and, at once, another to their process group."""
    begin = "import time\nfrom megatron_mlra.command_line.output import say_error\n"
    listens = "stopping.listen_to_interrupts(lambda: (say_error('ended'), os._exit(3)))\n"
    twice = "for _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.02)\n"
    goes_on = "time.sleep(0.5)\nprint('went on', flush=True)\n"
    again = "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    done = run(begin + listens + twice + goes_on + again)
    assert (done.returncode, done.stdout) == (3, "went on\n"), done.stderr
    assert done.stderr.count("note: stopping in order") == done.stderr.count("ended\n") == 1


def test_without_a_handler_an_interrupt_is_pythons():
    begin = "import time\nfrom megatron_mlra.command_line.output import say_error\n"
    for kill in ("os.kill(os.getpid(), signal.SIGINT)", "signal.pthread_kill(old.ident, 2)"):
        waits = f"stopping.ignore_no_more()\ntry:\n    {kill}\n"
        waits += "    while True:\n        time.sleep(0.01)\n"
        done = run(begin + OLD_THREAD + waits + "except KeyboardInterrupt:\n    print('heard')\n")
        assert (done.stdout, done.stderr) == ("heard\n", "")
