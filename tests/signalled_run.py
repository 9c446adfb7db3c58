"""`lucidetr train` in a process of its own, which is sent SIGTERM in a phase of its run."""

import os
import signal
import sys
import threading
from pathlib import Path

from lucidetr.cli import main
from lucidetr.training import loop
from run_tools import TINY

WITHIN = {
    "preflight": (loop, "preflight"),
    "step": (loop.Run, "step"),
    "evaluation": (loop, "detect"),
    "saving": (loop, "save_training"),
}
STEPS, EVALUATIONS = 6, 3


def command(out: Path, *more: object) -> list[str]:
    """Return the arguments of a run of seconds, which saves after every second step."""
    settings = {
        "data": TINY, "out": out, "steps": STEPS, "evaluations": EVALUATIONS, "batch": 4, "micro-batch": 2,
        "statistics": 0, "device": "cpu", "model.backbone.width": 8, "model.d-model": 32, "model.num-heads": 2,
        "model.head-dim": 16, "model.feed-forward": 64, "images.size": 64, "images.max-size": 64, "optimiser.ema": 0.2,
    }  # fmt: skip
    options = [str(each) for name, value in settings.items() for each in (f"--{name}", value)]
    return ["lucidetr", "train", "detr-xs", *options, *map(str, more)]


def run(arguments: list[str], log: Path, phase: str | None = None, call: int = 1, delay: float = 0.0) -> None:
    """Run the command line, its words into `log`; SIGTERM comes `delay` seconds into a phase's call of that number."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if phase:
        send_within(phase, call, delay)
    sys.argv = arguments
    main()


def send_within(phase: str, call: int, delay: float) -> None:
    """Let a phase begin with a signal that is sent to this process."""
    owner, name = WITHIN[phase]
    real, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM))
            timer.daemon = True
            timer.start()
            if not delay:
                timer.join()
        return real(*args, **kwargs)

    setattr(owner, name, signalled)
