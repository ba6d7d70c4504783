"""A lock for building torch's C++ extensions that a killed process does not keep.

torch builds an extension once per user (Megatron's selective recomputation needs one). torch locks
the build by the existence of a file. A process that is killed while it builds leaves the file
behind, and every later run of that user would wait in silence, for ever.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

MARK = b"held as long as it is locked\n"
"""Content of the lock file. A marked file that no process has locked was left by a process that is
gone."""

FOREIGN = 600.0
"""Seconds after which a file without the mark (of another program's build) counts as left behind. A
build takes about half a minute."""


class BuildLock:
    """In place of `torch.utils.cpp_extension.FileBaton`: `try_acquire`, `wait`, `release`."""

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, **_: object) -> None:
        self.path = Path(lock_file_path)
        self.wait_seconds = wait_seconds
        self._held: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if no process holds it.

        Returns:
            whether this process now holds the lock.

        Raises:
            ValueError: the lock's path is no plain file, or cannot be opened.
        """
        try:
            file, new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:  # released meanwhile
                return False
            except OSError:
                raise self._no_lock() from None
            new = False
            if not stat.S_ISREG(os.fstat(file).st_mode):
                os.close(file)
                raise self._no_lock() from None
        try:
            # A process that only looks at the file locks it for a moment, so the file's creator
            # waits for that moment to pass.
            fcntl.flock(file, fcntl.LOCK_EX | (0 if new else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return False
        if not new and not (self._is_there(file) and self._is_left_behind(file)):
            os.close(file)
            return False
        os.pwrite(file, MARK, 0)
        self._held = file
        return True

    def wait(self) -> None:
        """Wait until no process builds.

        Raises:
            ValueError: see `try_acquire`.
        """
        while os.path.lexists(self.path):
            if self.try_acquire():
                self.release()
                return
            time.sleep(self.wait_seconds)

    def release(self) -> None:
        """Give the lock back."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _no_lock(self) -> ValueError:
        return ValueError(
            f"the build of an extension is locked by {self.path}, which is no plain file (a link, a"
            " folder or a pipe) or cannot be opened; remove it"
        )

    def _is_there(self, file: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), self.path.lstat())
        return False

    def _is_left_behind(self, file: int) -> bool:
        if os.pread(file, len(MARK), 0) == MARK:
            return True
        return time.time() - os.fstat(file).st_mtime > FOREIGN
