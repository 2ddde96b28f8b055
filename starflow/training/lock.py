"""Lock on the folder of a run, so that only one run trains in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from ..errors import StarflowError

try:
    import fcntl
except ImportError:
    # Windows has no such module.
    fcntl = None

LOCK = ".lock"


class Lock:
    """Lock on a run, which ends with the process at the latest. Some file systems have no locks: there it does nothing.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: Path):
        self.path = Path(run) / LOCK
        self._file: BinaryIO | None = None

    def check(self) -> None:
        """Check that no other process holds the lock; the processes of a run may all do so.

        Raises:
            StarflowError: another process holds it.
        """
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            self._lock(file.fileno(), shared=True)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            StarflowError: another process holds it, or the file system refuses to make its file.
        """
        if fcntl is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                with contextlib.ExitStack() as stack:
                    file = stack.enter_context(open(self.path, "ab"))
                    with contextlib.suppress(OSError):
                        self._lock(file.fileno(), shared=False)
                    # Another process may have removed the file before it was locked.
                    if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                        self._file = file
                        stack.pop_all()
        except OSError as error:
            raise StarflowError(f"cannot write {self.path}: {error.strerror}") from None

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _lock(self, descriptor: int, shared: bool) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
        except BlockingIOError:
            raise StarflowError(f"{self.path.parent}: another process trains this run") from None
