"""The run as one sees it: a live line in a terminal, plain lines in a file or pipe."""

import sys
import time
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY = 15.0  # seconds between plain lines


class ProgressLine:
    """Show how far a run is, its loss, its AP and when it ends."""

    def __init__(self, quiet: bool = False):
        self.console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self.live: Progress | None = None
        self.last_plain = -PLAIN_EVERY
        if sys.stdout.isatty() and not quiet:
            columns = (BarColumn(bar_width=20), TextColumn("{task.percentage:3.0f}%  {task.description}"))
            self.live = Progress(*columns, console=self.console, transient=True)
            self.task = self.live.add_task("", total=1.0)
            self.live.start()

    def say(self, text: str) -> None:
        """Print a line that stays; a terminal or pipe that is closed must not keep the run from saving."""
        with suppress(OSError):
            self.console.print(text, markup=False)

    def show(self, progress: float, text: str) -> None:
        """Show the present state; outside a terminal only every few seconds."""
        if self.live:
            with suppress(OSError):
                self.live.update(self.task, completed=progress, description=text)
        elif time.monotonic() - self.last_plain >= PLAIN_EVERY:
            self.last_plain = time.monotonic()
            self.say(f"{progress:4.0%}  {text}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live:
            with suppress(OSError):
                self.live.stop()


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    >>> duration(42.0), duration(200.0), duration(7300.0)
    ('42 s', '3 min 20 s', '2 h 1 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
