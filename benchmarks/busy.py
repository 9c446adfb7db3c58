"""How much of the time a GPU computes while a recipe trains as users train it: reading, matching and logging included.

    python -m benchmarks busy --recipes lucid-xs,lucid-m --workers 14

A run is timed as it is; then torch's profiler watches some more of its steps, which it slows, and says how long the GPU
was at work in each. The rest of the time it waits: for pictures, for the matching, or for the next thing to do.
"""

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Place, note, read_options, synchronise
from benchmarks.pair import tiny
from lucidetr.config import TrainConfig
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.structures import Batch, Hints, Predictions
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.loop import train
from lucidetr.training.precision import choose_device, choose_precision
from lucidetr.training.replay import Replayed

DATA = "generated:digits?size={side}&digit={small}-{large}&train=512&val=1"


@dataclass(frozen=True)
class Options(Place):
    """Train each recipe for some steps on generated pictures of its own size."""

    recipes: str = "lucid-xs,lucid-s,lucid-m,lucid-l,detr-r50"
    """With another batch than the recipe's behind a colon: lucid-xs:64."""
    precision: str = "auto"
    workers: int = 8
    replay: bool = False
    """By a recording, where a recipe's steps are all alike."""
    warmup: int = 20
    """Steps before the clock runs."""
    steps: int = 40
    """Steps that are timed, and a quarter as many that are watched."""
    quick: bool = False
    """Models of a few thousand parameters on small pictures, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every recipe, print, and append a line for each to results.jsonl."""
    options = read_options(Options, arguments, "busy")
    device = choose_device(options.device)
    if device.type == "cpu" and not options.quick:
        raise InputError("busy asks how much of the time a GPU computes, and there is none here: --device cuda")
    if options.warmup < 0 or options.steps < 4:
        raise InputError(
            f"--warmup {options.warmup} --steps {options.steps}: choose at least 0 and 4, for a quarter is watched"
        )
    for name, config in [(name, setting(name, options)) for name in options.recipes.split(",")]:
        watch = Watch(options, device)
        seconds = watch.run(config)
        measured = {"step": seconds, "images_per_second": config.batch / seconds, "computing": watch.computing}
        share = watch.computing / seconds
        print(
            f"{name}: {measured['images_per_second']:.1f} images/s; the GPU computes {1000 * watch.computing:.1f} of "
            f"the {1000 * seconds:.1f} ms of a step of {config.batch}, and waits {1 - share:.0%} of the time",
            flush=True,
        )
        settings = {"recipe": config.recipe, "side": config.images.size, "batch": config.batch}
        settings |= {"precision": choose_precision(options.precision, device), "workers": options.workers}
        settings["replayed"] = watch.replayed
        note("busy", settings, measured, device)


def setting(name: str, options: Options) -> TrainConfig:
    """Return a recipe's config for a run of the steps that are asked for; its whole batch goes through at once."""
    name, colon, batch = name.partition(":")
    if colon and not (batch.isdecimal() and int(batch)):
        raise InputError(f"--recipes {name}:{batch}: behind the colon stands a batch, a number above 0")
    config = tiny(recipe(name)) if options.quick else recipe(name)
    side = 64 if options.quick else min(config.images.size, 640)
    images = replace(config.images, resize="square", size=side)
    number = int(batch) if batch else config.batch
    return replace(
        config,
        data=DATA.format(side=side, small=side // 8, large=side // 3),
        images=images,
        augmentation=replace(config.augmentation, scales=(), crop=0.0),
        steps=options.warmup + options.steps + options.steps // 4 + 1,
        evaluations=1,
        batch=number,
        micro_batch=number,
        precision=options.precision,
        device=options.device,
        workers=options.workers,
        replay=options.replay,
        preflight="off",
    )


class Watch:
    """Look at a run through its engine, which the loop calls once in every step."""

    def __init__(self, options: Options, device: torch.device):
        self.device, self.first, self.steps = device, options.warmup, options.steps
        self.watched = options.steps // 4
        self.step, self.began, self.seconds, self.computing = 0, 0.0, 0.0, 0.0
        activities = [ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA]
        self.profiler = profile(activities=activities)
        self.replayed = False

    def run(self, config: TrainConfig) -> float:
        """Train, and return the seconds of a step."""
        with tempfile.TemporaryDirectory() as folder:
            train(replace(config, out=folder), Engine(forward=self.forward, loss=FAST.loss))
        return self.seconds / self.steps

    def forward(self, model: DETR, batch: Batch, hints: Hints | None) -> Predictions:
        """Compute as ever; at the first and after the last step of each part, look at the clock or the profiler."""
        if self.step == self.first:
            synchronise(self.device)
            self.began = time.perf_counter()
        if self.step == self.first + self.steps:
            synchronise(self.device)
            self.seconds = time.perf_counter() - self.began
            self.profiler.start()
        if self.step == self.first + self.steps + self.watched:
            synchronise(self.device)
            self.profiler.stop()
            self.computing = covered(self.at_work(self.profiler.events())) / 1e6 / self.watched
        self.step += 1
        self.replayed = isinstance(model, Replayed)
        return FAST.forward(model, batch, hints)

    def at_work(self, events: Iterable[Any]) -> list[tuple[float, float]]:
        """Return when each of the device's kernels began and ended, in microseconds."""
        kind = DeviceType.CPU if self.device.type == "cpu" else DeviceType.CUDA
        ranges = [event.time_range for event in events if event.device_type == kind]
        return [(each.start, each.end) for each in ranges]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of what some intervals cover together, what several cover counted once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total
