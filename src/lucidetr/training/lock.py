"""One process at a time trains in a run's folder."""

import errno
from pathlib import Path
from types import TracebackType
from typing import IO

from lucidetr.errors import InputError


def lock(file: IO, wait: bool) -> bool:
    """Lock an open file until it is closed; say whether that was done, or nothing here knows how to."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:  # others than these two: a file system without locks
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


class Lock:
    """Hold a run's folder until closed, or until this process ends, however it ends.

    Its reading processes do not inherit it, as they would an `flock`: they may outlive a killed run for seconds.
    """

    def __init__(self, folder: Path):
        self.file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115  closed by __exit__
        if not lock(self.file, wait=False):
            self.file.close()
            raise InputError(f"{folder}: another process trains there; wait for it, or choose another --out")

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
