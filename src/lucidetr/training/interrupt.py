"""Ctrl-C and a scheduler's SIGTERM, heeded between two steps, so that what is saved is whole."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

HEEDED = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Say that a run was stopped from outside after it had saved; `status` is the shell's exit status."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interruption:
    """Remember that a signal came; a second one is obeyed at once."""

    def __init__(self):
        self.number: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.before = {number: signal.signal(number, self.note) for number in HEEDED}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal."""
        if self.number is not None:
            raise Stopped(number)
        self.number = number
