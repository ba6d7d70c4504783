"""One run at a time in a `--save` folder: a lock file that names its owner.

The lock is the file `run.lock` in the folder. Its creation succeeds for exactly one of several
runs. The owner touches the file every `BEAT` seconds. Another run takes the lock over if the owner
is gone:

- on the owner's machine, as soon as its process and its asynchronous writers have ended;
- on any other machine, once the lock has not been touched for `STALE` seconds.

Only rank 0 holds the lock, for all ranks of its run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_mlra.command_line.foreign_text import parse_json, read_json

NAME = "run.lock"
BEAT = 5.0
"""Seconds between two touches of the lock by its owner."""
STALE = 60.0
"""Seconds without a touch after which an owner on another machine counts as gone."""
_HALF_WRITTEN = 2.0
"""Seconds for which a lock file may be empty after its creation."""
_LONGEST = 65536
"""Most bytes of a lock file that are read."""
_WRITERS = 15.0
"""Seconds for which a new run waits for the asynchronous writers of an owner that has ended."""
_ENDING = 5.0
"""Seconds for which an ending run waits for its own asynchronous writers."""


@dataclass(frozen=True)
class Owner:
    """The owner of a lock: the content of the lock file."""

    token: str
    """Random, 32 hexadecimal digits."""
    host: str
    pid: int
    born: str
    """Start time of the process, in clock ticks since boot: process ids are reused."""
    machine: str
    """Boot id and pid namespace, within which `pid` is unique."""
    job: str
    """Id of the SLURM or torchrun job, or empty."""
    since: str
    """Local time at which the lock was made."""

    @classmethod
    def this_process(cls) -> Owner:
        """This process, as the owner of a lock."""
        pid = os.getpid()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=pid,
            born=_born(pid) or "",
            machine=_machine(),
            job=os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "",
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    @classmethod
    def read(cls, text: str) -> Owner:
        """The owner that a lock file names.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: the file holds something else.
        """
        found = parse_json(text)
        owner = cls(**{field.name: found[field.name] for field in fields(cls)})
        # Checked, since anybody who can write to the folder may have written the file: `token`
        # becomes part of a path, the other fields part of a message.
        texts = [value for name, value in asdict(owner).items() if name != "pid"]
        if not (
            re.fullmatch("[0-9a-f]{32}", owner.token)
            and isinstance(owner.pid, int)
            and all(isinstance(value, str) and value.isprintable() for value in texts)
        ):
            raise ValueError("this is no owner of a lock")
        return owner

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"host {self.host}, pid {self.pid}{job}, since {self.since}"


class RunLock:
    """The lock of one folder.

    Args:
        folder: made if it does not exist.
        say: called with a line before a wait of several seconds.
        lost: called with a line, in another thread, when the lock has another owner: this process
            was stopped for longer than `STALE`, and must not write to the folder any more.
    """

    def __init__(
        self,
        folder: str | Path,
        say: Callable[[str], None] = lambda _: None,
        lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / NAME
        self.owner = Owner.this_process()
        self._say, self._lost = say, lost
        self._ended = threading.Event()
        self._made = False

    def acquire(self) -> None:
        """Become the owner, and touch the lock regularly from now on.

        Raises:
            ValueError: another run owns the folder; names the run and how to release the lock.
        """
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self._create(self.path):
            self._check_plain()
            there = self._read()
            if there is None:
                continue
            if not self._is_gone(there):
                raise ValueError(self._refusal(there))
            if self._replace(there):
                break
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _check_plain(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            if not stat.S_ISREG(self.path.lstat().st_mode):
                raise ValueError(
                    f"--save {self.folder}: {self.path} is no plain file (a link, a folder or a"
                    " pipe), so no run made it; remove it, or use another --save"
                )

    def is_mine(self) -> bool:
        """Whether this run owns the folder."""
        there = self._read()
        return isinstance(there, Owner) and there.token == self.owner.token

    def successor(self) -> Owner | None:
        """The other run that owns the folder now, if any."""
        there = self._read()
        taken = isinstance(there, Owner) and there.token != self.owner.token
        return there if taken else None

    def release(self) -> None:
        """Remove the lock, and the folder if this run made it and it is empty.

        The asynchronous writers of this run get `_ENDING` seconds to end. If one goes on, the lock
        stays, and the next run waits for the writer.
        """
        self._ended.set()
        with contextlib.suppress(OSError):
            if self.is_mine() and self._writers_end(_ENDING):
                self.path.unlink()
            if self._made:
                self.folder.rmdir()

    def release_within(self, seconds: float) -> None:
        """`release`, but return after `seconds` even if the file server does not answer."""
        thread = threading.Thread(target=self.release, daemon=True)
        thread.start()
        thread.join(seconds)

    def _create(self, path: Path) -> bool:
        try:
            # O_EXCL is atomic, over NFS too.
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with open(file, "w") as stream:
                json.dump(asdict(self.owner), stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:  # a full disk: an empty lock would keep the next run waiting
            path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
        return True

    def _read(self) -> Owner | str | None:
        """The owner; the text of a file that names no owner; None without a lock."""
        deadline, text = time.monotonic() + _HALF_WRITTEN, ""
        while True:
            try:
                with open(self.path, "rb", opener=_plain) as file:
                    text = file.read(_LONGEST).decode(errors="replace")
                return Owner.read(text)
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError, RecursionError):
                # Another run may just have created the file, and not written it yet.
                if time.monotonic() > deadline:
                    return text
            time.sleep(0.05)

    def _is_gone(self, there: Owner | str) -> bool:
        if isinstance(there, Owner) and there.machine == self.owner.machine:
            return _born(there.pid) != there.born and self._writers_end(_WRITERS)
        return self._stops_beating(there)

    def _writers_end(self, seconds: float) -> bool:
        """Whether the asynchronous writers of the lock's owner end within `seconds`."""
        deadline = time.monotonic() + seconds
        while _is_held(self.path):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _stops_beating(self, there: Owner | str) -> bool:
        """Watch the lock until it is touched, or has not been touched for `STALE` seconds.

        Returns:
            Whether the owner is gone.
        """
        first = _touched(self.path)
        if first is None:
            return True
        # Only the file system's clock is used, since the clocks of two machines may differ. The
        # file may still be dated ahead.
        left = min(STALE, STALE - (self._now_of_folder() - first))
        if left > 0:
            who = there if isinstance(there, Owner) else "an unnamed run"
            self._say(
                f"--save {self.folder} is locked by {who}: waiting up to {left:.0f} s to see"
                " whether that run is alive"
            )
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(1.0, left))
            if _touched(self.path) != first:
                return self._read() != there
        return True

    def _now_of_folder(self) -> float:
        probe = self.folder / f".{NAME}.{self.owner.token}.now"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _replace(self, gone: Owner | str) -> bool:
        """Take the lock over from an owner that is gone; False if another run was faster."""
        token = gone.token if isinstance(gone, Owner) else "unnamed"
        # Of all runs that find this owner gone, only the one that creates this file takes over.
        claim = self.folder / f".{NAME}.after-{token}"
        if not self._create(claim):
            age = self._now_of_folder() - (_touched(claim) or self._now_of_folder())
            if age > STALE:
                raise ValueError(
                    f"--save {self.folder} was being taken over by a run that ended in the act;"
                    f" make sure that no run uses the folder, then delete {claim} and {self.path}"
                )
            time.sleep(0.05)
            return False
        try:
            if self._read() != gone:
                return False
            mine = self.folder / f".{NAME}.{self.owner.token}"
            self._create(mine)
            mine.rename(self.path)
            return True
        finally:
            claim.unlink()

    def _refusal(self, there: Owner | str) -> str:
        who = str(there) if isinstance(there, Owner) else f"an unnamed run ({there!r:.40})"
        alive = "is alive"
        if isinstance(there, Owner) and there.machine == self.owner.machine and _is_held(self.path):
            alive = "still writes a checkpoint"
        return (
            f"--save {self.folder} is in use by another run ({who}), which {alive}; end that run"
            f" or use another --save (if it is gone for certain, delete {self.path})"
        )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                there = self._read()
                if there is None and self.folder.is_dir():
                    # The lock was deleted by hand. This run still owns the folder.
                    self._create(self.path)
                elif isinstance(there, Owner) and there.token != self.owner.token:
                    break
                else:
                    os.utime(self.path, follow_symlinks=False)
            except OSError:
                continue  # the file server does not answer now, or the folder is gone
        if not self._ended.is_set():
            self._lost(
                f"--save {self.folder} belongs to another run now ({there}): the lock of this one"
                f" was deleted, or not touched for {STALE:.0f} s; nothing more is written"
            )


def hold(path: str | Path) -> None:
    """Let this process, an asynchronous writer, count as part of the lock's owner until it ends.

    It holds a lock of the operating system (flock), on the owner's machine only: file servers
    differ in how they treat the flocks of a machine that is gone.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        if read_json(path)["machine"] == _machine():
            fcntl.flock(_plain(path, os.O_RDONLY), fcntl.LOCK_SH)  # never closed


def _plain(path: str | Path, flags: int) -> int:
    """Open a file without following a link or blocking on a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_held(path: Path) -> bool:
    try:
        file = _plain(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without such locks
    finally:
        os.close(file)
    return False


def _touched(path: Path) -> float | None:
    """Modification time of a file, None if it is gone. Opening the file refreshes NFS's cache."""
    try:
        with open(path, "rb", opener=_plain) as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _born(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, None if it does not run."""
    try:
        # The program's name, in parentheses, may contain spaces and parentheses.
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if rest[0] in "ZX" else rest[19]
