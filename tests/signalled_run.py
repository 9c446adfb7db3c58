"""`lucidetr train` with its workers in a session of its own, all of which are sent a signal in a phase of the run."""

import multiprocessing
import os
import sys
import threading
from pathlib import Path

from lucidetr.cli import main
from lucidetr.inspection import curves
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
        "model.encoder-layers": 1, "model.decoder-layers": 1,
    }  # fmt: skip
    options = [str(each) for name, value in settings.items() for each in (f"--{name}", value)]
    return ["lucidetr", "train", "detr-xs", *options, *map(str, more)]


def run(arguments: list[str], log: Path, *when: object) -> None:
    """Run the command line, its words into `log`; a signal may come."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the system's own again, not the one that started this process
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    curves.draw_curves = lambda folder, path: path  # a second of computing that shows nothing here
    if when:
        send_within(*when)
    sys.argv = arguments
    main()


def send_within(number: int, phase: str, call: int, delay: float) -> None:
    """Send this process and its workers a signal so many seconds into a phase's call of that number."""
    owner, name = WITHIN[phase]
    real, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            timer = threading.Timer(delay, os.killpg, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            if not delay:
                timer.join()
        return real(*args, **kwargs)

    setattr(owner, name, signalled)
