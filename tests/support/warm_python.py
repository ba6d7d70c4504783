# Copied by support/warm.py behind a first line that names the interpreter.
"""Stands for Python: has ARGV run in a fork of the process behind SOCKET, and ends as it does."""

import json
import os
import signal
import socket
import sys

if "SLURM_JOB_ID" in os.environ:
    # SLURM kills a job's tree of processes, in which the program that started this one is not: that
    # one is the fork's child. It is killed with its own stand-in, and this one with it.
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1)

# A signal that comes before the program has begun waits.
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
connection = socket.socket(socket.AF_UNIX)
connection.connect("SOCKET")
connection.recv(16)
job = {"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "executable": __file__}
job["blocked"] = [*blocked]
socket.send_fds(connection, [b"p"], [0, 1, 2])
connection.sendall(json.dumps(job).encode() + b"\n")
for number in FORWARDED:
    signal.signal(number, lambda number, _: connection.send(bytes([number])))
signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
status = connection.recv(4)
code = os.waitstatus_to_exitcode(int.from_bytes(status, "little")) if status else 1
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
