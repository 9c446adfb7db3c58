"""SIGTERM in every phase of a run: it ends with 143, says what it saved, and goes on as if nothing had been."""

import multiprocessing
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import signalled_run
from lucidetr.training.checkpoint import training_checkpoints
from signalled_run import EVALUATIONS, STEPS, command

from .test_durability import fate

PHASES = ("step", "evaluation", "saving", "start-up", "preflight")
WORKERS = (0, 2)
LONGEST = {
    "step": 0.05,
    "evaluation": 0.05,
    "saving": 0.02,
    "start-up": 6.0,
    "preflight": 0.3,
}  # seconds until it comes
CALLS = {"step": STEPS - 1, "evaluation": EVALUATIONS - 1, "saving": EVALUATIONS - 1, "preflight": 1}  # not the last
PRELOADED = ["lucidetr.cli.train", "lucidetr.training.loop", "lucidetr.inspection.curves", "torch.utils.tensorboard"]


def status(code: int | None) -> int:
    """Return the exit status that a shell sees: 128 and the signal's number where one ended the process."""
    assert code is not None
    return code if code >= 0 else 128 - code


def forked(*arguments) -> int:
    """Run the command line in a process forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=signalled_run.run, args=arguments)
    process.start()
    process.join()
    return status(process.exitcode)


def from_the_shell(arguments: list[str], log: Path, delay: float) -> int:
    """Run the command line as a shell does, and send it SIGTERM after so many seconds."""
    with open(log, "ab") as file:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=file, stderr=file)
        time.sleep(delay)
        process.terminate()
        return status(process.wait())


def stop_and_go_on(folder: Path, phase: str, workers: int, random: np.random.Generator) -> dict[str, object]:
    """Stop a run in a phase, resume it to its end, and return all that it leaves."""
    run, log, again = folder / "run", folder / "stopped.txt", folder / "resumed.txt"
    folder.mkdir(parents=True)
    quick = () if phase in ("start-up", "preflight") else ("--preflight", "off")
    arguments = command(run, "--workers", workers, *quick)
    delay = float(random.choice([0.0, random.uniform(0, LONGEST[phase])]))
    if phase == "start-up":
        code = from_the_shell(arguments, log, delay)
    else:
        code = forked(arguments, log, phase, int(random.integers(1, CALLS[phase] + 1)), delay)
    said = log.read_text()
    assert code == 143, said
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
    """Stop so many runs, phase after phase, without and with workers, and return how many in each phase."""
    assert forked(command(folder / "whole", "--preflight", "off"), folder / "whole.txt") == 0, (
        folder / "whole.txt"
    ).read_text()
    expected, random = fate(folder / "whole"), np.random.default_rng(seed)
    for i in range(number):
        phase, workers = PHASES[i % len(PHASES)], WORKERS[i % len(WORKERS)]
        try:
            assert stop_and_go_on(folder / str(i), phase, workers, random) == expected
        except AssertionError as error:
            error.add_note(f"number {i} of seed {seed}: {phase}, {workers} workers")
            raise
    return Counter(PHASES[i % len(PHASES)] for i in range(number))


SIZES = [(0, 2), pytest.param(1, 12, marks=pytest.mark.slow), pytest.param(2, 200, marks=pytest.mark.record)]


@pytest.mark.parametrize(("seed", "number"), SIZES, ids=["2", "12", "200"])
def test_a_run_ends_and_goes_on_after_sigterm_in_every_phase(tmp_path, seed, number):
    assert signals(tmp_path, seed, number).total() == number
