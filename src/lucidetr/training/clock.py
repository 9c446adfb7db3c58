"""How long a run is, how far it has come, and what time it is measured in."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lucidetr.config import TrainConfig
from lucidetr.errors import InputError


def stopwatch(config: TrainConfig, device: torch.device) -> Callable[[], float]:
    """Return what reads the time in seconds; the processor's own time counts sums over threads, so it asks for one."""
    if config.clock == "wall":
        return time.perf_counter
    if torch.get_num_threads() > 1 or config.workers or device.type != "cpu":
        raise InputError(
            f"--clock processor counts one thread of one process, but there are {torch.get_num_threads()} threads, "
            f"--workers {config.workers} and --device {device}: set OMP_NUM_THREADS=1, --workers 0 --device cpu"
        )
    return time.process_time


@dataclass
class Clock:
    """Know how far the run is: by steps where these are given, else by minutes of training time."""

    steps: int
    minutes: float
    step: int = 0
    seconds: float = 0.0  # of training: no start-up, no evaluation

    @property
    def progress(self) -> float:
        """Return the share of the run that is done, 0…1."""
        return min(self.step / self.steps if self.steps else self.seconds / (60 * self.minutes), 1.0)

    def due(self, evaluations: int) -> int:
        """Return how many of the run's evaluations are due by now."""
        return self.step * evaluations // self.steps if self.steps else int(self.progress * evaluations)

    def due_after_step(self, number: int) -> int:
        """Return how many of that number of looks are due when the coming step ends, as far as can be told before it.

        How long a step takes is known only roughly, and the last one shall not be missed: it counts one and a half.
        """
        length = 1.5 * self.seconds / max(self.step, 1)
        return replace(self, step=self.step + 1, seconds=self.seconds + length).due(number)

    @property
    def expected_steps(self) -> float:
        """Return how many steps the whole run will have, as far as can be told."""
        return self.steps or self.step / max(self.progress, 1e-3)

    @property
    def seconds_left(self) -> float:
        """Return the training time still to come."""
        return self.seconds / self.progress - self.seconds if self.progress else 0.0


def check_length(config: TrainConfig) -> None:
    """Refuse a config that does not say how long and where to."""
    lengths = {"epochs": config.epochs, "steps": config.steps, "minutes": config.minutes}
    given = {name: value for name, value in lengths.items() if value}
    if len(given) != 1 or not 0 < next(iter(given.values())) < math.inf:
        said = ", ".join(f"--{name} {value:g}" for name, value in given.items()) or "none"
        raise InputError(f"how long to train? Give one of --epochs, --steps, --minutes above 0 (given: {said})")
    if not config.out:
        raise InputError("where to? Give the run's folder by --out runs/NAME")


def count_steps(config: TrainConfig, images: int) -> int:
    """Return the steps of a run given by steps or epochs, 0 for one given by minutes."""
    return config.steps or math.ceil(config.epochs * images / config.batch)
