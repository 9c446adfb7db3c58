"""lucidetr study: experiments that make a table or figure of the pages anew."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lucidetr.errors import InputError


@dataclass(frozen=True)
class Options:
    """Run a study; what is done already is not done again."""

    name: Annotated[
        Literal["start", "initialisation", "residuals", "three-ways", "ablations", "ladder"], tyro.conf.Positional
    ]
    """start: weights, gradients and loss over the first batches, 30 by default.
    initialisation: nine ways to draw the first weights, before training and after.
    residuals: residual paths cut, norms placed elsewhere.
    three-ways: the reference engine, the fast one, and going on from trained weights.
    ablations: what the paper takes away, taken away from lucid-xs.
    ladder: from detr-xs to lucid-xs, one named change at a time; lucid-xs without each, and with what is off in it."""
    out: str
    """Folder of its results."""
    quick: bool = False
    """A look at all of it in about two minutes: runs too short to mean anything."""
    minutes: float | None = None
    """Of training for each run (2 unless quick)."""
    steps: int | None = None
    """Instead of minutes."""
    images: int | None = None
    """three-ways: images that each run with a budget of images sees (3200 unless quick)."""
    seeds: int | None = None
    """Runs of each model (3 unless quick; start has one alone)."""
    threads: int = 0
    """Of the processor; 0: as many as it has."""
    clock: Literal["wall", "processor"] = "wall"
    """What minutes count; processor: one thread's own time, which other jobs cannot take away (--threads 1)."""
    part: str = "1/1"
    """2/3: this process takes the second of three shares of the runs."""
    data: str = ""
    """Instead of the study's own, generated:digits."""
    side: int | None = None
    """Of the pictures that the models see, instead of the recipes' own."""
    weights: str = ""
    """three-ways: a detector to go on from, besides."""


def run(arguments: list[str]) -> None:
    """Run the study and write its page."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr study")
    check(options)

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    study: Any = import_module(f"lucidetr.studies.{options.name.replace('-', '_')}")
    plan = study.QUICK if options.quick else study.USUAL
    if options.minutes and plan.steps:
        raise InputError(f"--minutes {options.minutes:g}: {options.name} counts batches, give --steps instead")
    names = ("minutes", "steps", "images", "seeds", "data", "side", "weights")
    given = {name: value for name in names if (value := getattr(options, name))}
    number, _, parts = options.part.partition("/")
    plan = replace(plan, clock=options.clock, part=(int(number), int(parts)), **given)
    try:
        print(f"table: {study.study(Path(options.out), plan)}")
    except KeyboardInterrupt:
        print("the run that was stopped is not kept; the same command goes on with the runs that are not done")
        raise


def check(options: Options) -> None:
    """Refuse numbers that ask for nothing, and options of another study."""
    number, _, parts = options.part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise InputError(f"--part {options.part}: expected for example 1/2")
    for name in ("minutes", "steps", "images", "seeds", "side"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} {value:g}: choose a number above 0")
    if options.threads < 0:
        raise InputError(f"--threads {options.threads}: choose 0 for as many as there are, or a number above it")
    if options.minutes and options.steps:
        raise InputError(f"--minutes {options.minutes:g} --steps {options.steps}: give one of them")
    for name in ("images", "weights"):
        if getattr(options, name) and options.name != "three-ways":
            raise InputError(f"--{name} belongs to the study three-ways, not to {options.name}")
    if options.images and options.steps:
        raise InputError(f"--images {options.images} --steps {options.steps}: with --steps every run is that long")
