"""Ctrl-C and SIGTERM in every phase of a run, workers included: it ends with 130 or 143 and goes on bit by bit."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import signalled_run
from lucidetr.training.checkpoint import training_checkpoints
from signalled_run import EVALUATIONS, STEPS, command

from .test_durability import PRELOADED, fate

PHASES = ("step", "evaluation", "saving", "start-up", "preflight")
WORKERS = (0, 2)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LONGEST = {
    "step": 0.05,
    "evaluation": 0.05,
    "saving": 0.02,
    "start-up": 2.0,
    "preflight": 0.3,
}  # seconds until it comes
CALLS = {"step": STEPS - 1, "evaluation": EVALUATIONS - 1, "saving": EVALUATIONS - 1, "preflight": 1}  # not the last


def status(code: int | None) -> int:
    """Return the exit status that a shell sees: 128 and the signal's number where one ended the process."""
    assert code is not None
    return code if code >= 0 else 128 - code


def left_over(session: int) -> list[str]:
    """Return the processes that live on in a session, where the system lists them in /proc."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended a moment ago
            state, _, _, its, *_ = file.read_text().rpartition(")")[2].split()
            if int(its) == session and state != "Z":
                found.append(file.parent.name)
    return found


def forked(*arguments) -> int:
    """Run the command line in a process forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=signalled_run.run, args=arguments)
    process.start()
    process.join()
    assert left_over(process.pid) == []
    return status(process.exitcode)


def from_the_shell(arguments: list[str], log: Path, delay: float) -> int:
    """Run the command line as a shell does, and send it SIGTERM after so many seconds."""
    with open(log, "ab") as file:
        command = [sys.executable, "-m", *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    assert left_over(process.pid) == []
    return status(process.returncode)


def stop_and_go_on(folder: Path, number: int, phase: str, workers: int, random: np.random.Generator) -> dict:
    """Stop a run in a phase by a signal to it and its workers, resume it to its end, and return all that it leaves."""
    run, log, again = folder / "run", folder / "stopped.txt", folder / "resumed.txt"
    folder.mkdir(parents=True)
    quick = () if phase in ("start-up", "preflight") else ("--preflight", "off")
    arguments = command(run, "--workers", workers, *quick)
    delay = float(random.choice([0.0, random.uniform(0, LONGEST[phase])]))
    if phase == "start-up":
        code = from_the_shell(arguments, log, delay)
    else:
        code = forked(arguments, log, number, phase, int(random.integers(1, CALLS[phase] + 1)), delay)
    said = log.read_text()
    assert code == 128 + number, said
    assert "Traceback" not in said
    saved = re.search(r"stopped and saved after step (\d+); --resume goes on from there", said)
    held = training_checkpoints(run / "checkpoints")
    assert bool(saved) == bool(held)
    if phase in ("step", "evaluation", "saving"):
        assert saved
    assert forked([*arguments, "--resume"], again) == 0, again.read_text()
    went_on = f"resumed after step {saved[1]}" if saved else "nothing to resume: starting at step 0"
    assert went_on in again.read_text()
    return fate(run)


def signals(folder: Path, seed: int, number: int) -> Counter[str]:
    """Stop so many runs, phase after phase, without and with workers, and return how many in each phase.

    Each 20 in a row hold every phase with either number of workers and either signal; at start-up it is SIGTERM.
    """
    assert forked(command(folder / "whole", "--preflight", "off"), folder / "whole.txt") == 0, (
        folder / "whole.txt"
    ).read_text()
    expected, random = fate(folder / "whole"), np.random.default_rng(seed)
    for i in range(number):
        phase, workers = PHASES[i % len(PHASES)], WORKERS[i % len(WORKERS)]
        sent = SIGNALS[(i + i // 10) % 2] if phase != "start-up" else signal.SIGTERM
        try:
            assert stop_and_go_on(folder / str(i), sent, phase, workers, random) == expected
        except AssertionError as error:
            error.add_note(f"number {i} of seed {seed}: {sent.name} in {phase}, {workers} workers")
            raise
    return Counter(PHASES[i % len(PHASES)] for i in range(number))


SIZES = [(0, 2), pytest.param(1, 12, marks=pytest.mark.slow), pytest.param(2, 200, marks=pytest.mark.record)]


@pytest.mark.parametrize(("seed", "number"), SIZES, ids=["2", "12", "200"])
def test_a_run_ends_and_goes_on_after_a_signal_in_every_phase(tmp_path, seed, number):
    assert signals(tmp_path, seed, number).total() == number
