"""Ctrl-C and a scheduler's SIGTERM, heeded between two steps, so that what is saved is whole."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

TWINS = 1.0  # seconds: a service manager and a wrapper may each pass on one and the same signal


class Stopped(KeyboardInterrupt):
    """Say that a run was stopped from outside after it had saved; `status` is the shell's exit status."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Interruption:
    """Obey Ctrl-C at once until the steps begin; from then on remember the first signal, obey a later second one."""

    def __init__(self):
        self.number: int | None = None
        self.since = 0.0
        self.patient = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.heed(signal.SIGINT)  # SIGTERM ends the process by itself, even where it waits for others
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def heed(self, number: int) -> None:
        """Note a kind of signal from now on."""
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.before.setdefault(number, signal.signal(number, self.note))

    def wait(self) -> None:
        """Remember signals from now on, instead of obeying them; one that some library has swallowed counts too.

        A terminal that is closed sends SIGHUP, which nohup has the run ignore.
        """
        self.patient = True
        self.heed(signal.SIGTERM)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self.heed(signal.SIGHUP)
        if self.number is not None:
            raise Stopped(self.number)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember or obey a signal."""
        if self.patient and self.number is None:
            self.number, self.since = number, time.monotonic()
        elif not self.patient or time.monotonic() - self.since > TWINS:
            self.number = number
            raise Stopped(number)
