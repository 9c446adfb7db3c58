"""The frame of every study: contenders, the runs they are given, one line of JSON for each, and how to compare them.

A study can be stopped and gone on with, and several processes can share it: what is in the file is not done again.
"""

import hashlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lucidetr.config import TrainConfig
from lucidetr.fields import difference, from_dict
from lucidetr.studies.engines import choose_engine
from lucidetr.training.engine import Engine
from lucidetr.training.lock import lock
from lucidetr.training.loop import train
from lucidetr.training.precision import choose_device, choose_precision
from lucidetr.training.run_log import last_start, read_lines, read_metrics

DATA = "generated:digits"
FEW_DATA = "generated:digits?train=1000&val=100"  # for a quick look

Contender = tuple[str, str, TrainConfig]  # kind, name, config; both names together are unique in a study
Extra = tuple[dict[str, float], dict[str, tuple[float, ...]]]  # numbers and series that a study reads off a run


@dataclass(frozen=True)
class Plan:
    """Say how long, how often and on what a study trains."""

    minutes: float
    """Of training for each run."""
    seeds: int
    steps: int = 0
    """Instead of minutes, for every run."""
    images: int = 0
    """three-ways: images that each run with a budget of images sees."""
    looks: int = 0
    """How often weights and gradients are written down."""
    data: str = DATA
    side: int = 0
    """Of the pictures that the models see, instead of the recipes' own."""
    clock: Literal["wall", "processor"] = "wall"
    part: tuple[int, int] = (1, 1)
    """Which share of the runs, of how many, is this process's."""
    quick: bool = False
    """Leave out what takes long."""
    weights: str = ""
    """three-ways: a detector to fine-tune."""

    def given(self, config: TrainConfig, seed: int) -> TrainConfig:
        """Return the config with this plan's length; one that counts steps itself keeps them."""
        steps = self.steps or config.steps
        minutes = 0.0 if steps else self.minutes
        length = {"steps": steps, "minutes": minutes, "epochs": 0.0}
        config = at_side(config, self.side)
        config = replace(config, evaluations=1, statistics=self.looks, preflight="off")
        return replace(config, seed=seed, data=self.data, clock=self.clock, **length)


def at_side(config: TrainConfig, side: int) -> TrainConfig:
    """Return the config for pictures of that side, 0 for its own; its largest side rises where it would cap that."""
    if not side:
        return config
    return replace(config, images=replace(config.images, size=side, max_size=max(config.images.max_size, side)))


@dataclass(frozen=True)
class Result:
    """Hold one run: which model, how it was trained, what it reached."""

    kind: str
    name: str
    seed: int
    minutes: float  # 0: its length was given in steps
    threads: int
    data: str
    ap: float
    ap50: float
    steps: int
    images_per_second: float
    precision: str
    commit: str
    machine: str
    side: int = 0  # of the pictures that the model saw
    clock: str = ""  # what the minutes counted
    config: str = ""  # fingerprint of what was asked for
    numbers: dict[str, float] = field(default_factory=dict)  # loss, seconds, and what the study reads besides
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)


def run_grid(
    file: Path, contenders: Iterable[Contender], plan: Plan, run: Callable[[str, str, TrainConfig], Result]
) -> dict[tuple[str, str], list[Result]]:
    """Train what is not yet in the file, seed by seed, and return the runs of each (kind, name).

    Of several processes each takes its part; those of the others that are done are returned as well.
    """
    number, parts = plan.part
    grid = list(contenders)
    wanted = [(seed, contender) for seed in range(plan.seeds) for contender in grid]
    for seed, (kind, name, config) in wanted[number - 1 :: parts]:
        config = plan.given(config, seed)
        if any(is_of(result, kind, name, config) for result in read_results(file)):
            continue
        result = run(kind, name, config)
        append(file, result)
        print(f"{kind} {name}, seed {seed}: AP {result.ap:.3f} at {result.images_per_second:.0f} images/s")
    results = read_results(file)
    return {(kind, name): chosen(results, (kind, name, config), plan) for kind, name, config in grid}


def fingerprint(config: TrainConfig) -> str:
    """Return what stands for a config's model, loss, augmentation, optimiser and batch.

    A recipe may change and keep its name; its earlier runs are then those of another model. Only what differs from the
    defaults counts, so that a field that is new and off changes nothing. Seed, data, side and length are compared by
    themselves, and engine and weights are in a contender's name.
    """
    decide = {"model", "loss", "images", "augmentation", "optimiser", "batch"}
    every = difference(config, TrainConfig()).items()
    changes = {name: now for name, (now, _) in every if name.split(".")[0] in decide and name != "images.size"}
    return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]


def is_of(result: Result, kind: str, name: str, config: TrainConfig) -> bool:
    """Say whether a result is that of this contender, at that length, as this process would compute it.

    Threads decide how far minutes lead, and nothing where steps are counted.
    """
    if (result.kind, result.name, result.seed, result.data) != (kind, name, config.seed, config.data):
        return False
    if (result.config, result.side) != (fingerprint(config), config.images.size):
        return False
    if not config.steps and (result.clock, result.threads) != (config.clock, torch.get_num_threads()):
        return False
    if result.precision != choose_precision(choose_engine(config)[0].precision, choose_device(config.device)):
        return False
    whole = not config.steps or result.steps == config.steps or "diverged" in result.numbers
    return result.minutes == config.minutes and whole


def run_one(
    kind: str,
    name: str,
    config: TrainConfig,
    read: Callable[[Path], Extra] = lambda run: ({}, {}),
    engine: Engine | None = None,
) -> Result:
    """Train once in a folder that is thrown away, and return what was measured; `read` reads more off the folder.

    A run that was given up, after ten skipped steps in a row or with no other, has AP 0 and the number `diverged`.
    """
    fit, own = choose_engine(config)
    folder = Path(tempfile.mkdtemp(prefix="study-"))
    run, diverged = folder / "run", {}
    try:
        try:
            train(replace(fit, out=str(run)), engine or own)
        except FloatingPointError:
            diverged = {"diverged": 1.0}
        lines, begun = read_metrics(run), last_start(run)
        numbers, series = read(run)
    finally:
        shutil.rmtree(folder)
    last: dict[str, Any] = lines[-1] if lines else {"step": 0, "seconds": 0.0}
    found: dict[str, Any] = next((line for line in reversed(lines) if "val/AP" in line), {})
    return Result(
        kind=kind,
        name=name,
        seed=config.seed,
        minutes=config.minutes,
        threads=begun["threads"],
        data=config.data,
        ap=found.get("val/AP", 0.0),
        ap50=found.get("val/AP50", 0.0),
        steps=last["step"],
        images_per_second=last["step"] * begun["trained_as"]["batch"] / max(last["seconds"], 1e-9),
        precision=begun["precision"],
        commit=begun["commit"] or "",
        machine=begun["machine"],
        side=config.images.size,
        clock=config.clock,
        config=fingerprint(config),
        numbers={"seconds": last["seconds"]} | final_loss(lines) | numbers | diverged,
        series=series,
    )


def final_loss(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the training loss over the last tenth of a run as {"loss": mean}, nothing where none was written.

    >>> final_loss([{"step": 1, "loss": 9.0}, {"step": 10, "loss": 2.0}, {"step": 10, "val/AP": 0.5}])
    {'loss': 2.0}
    """
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if not losses:
        return {}
    return {"loss": statistics.fmean(loss for step, loss in losses if step >= 0.9 * losses[-1][0])}


def read_results(file: Path) -> list[Result]:
    """Return the runs in a file, none where there is no file; half a last line, of a killed process, is none."""
    return [from_dict(Result, line) for line in read_lines(file)]


def append(file: Path, result: Result) -> None:
    """Add a run to a file, behind the last whole line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as lines:
        lock(lines, wait=True)
        lines.seek(0)
        content = lines.read()
        lines.truncate(content.rfind(b"\n") + 1)
        lines.write((json.dumps(asdict(result)) + "\n").encode())


def chosen(results: Iterable[Result], contender: Contender, plan: Plan) -> list[Result]:
    """Return the runs of one contender that belong to this plan, of each seed the last, in the order of the seeds."""
    kind, name, config = contender
    wanted = [plan.given(config, seed) for seed in range(plan.seeds)]
    found = {r.seed: r for r in results if any(is_of(r, kind, name, each) for each in wanted)}
    return [found[seed] for seed in sorted(found)]


def aps(results: Iterable[Result]) -> list[float]:
    """Return the AP of each run."""
    return [r.ap for r in results]


def numbers(results: Iterable[Result], name: str) -> list[float]:
    """Return one of the numbers of each run that has it."""
    return [r.numbers[name] for r in results if name in r.numbers]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean, and the deviation where there are several values.

    >>> spread([0.1, 0.2, 0.3]), spread([0.5]), spread([]), spread([12.0, 14.0], 1)
    ('0.200 ± 0.100', '0.500', '–', '13.0 ± 1.4')
    """
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def gains(results: Iterable[Result], base: Iterable[Result]) -> list[float]:
    """Return how much more AP each run has than the base's of the same seed."""
    known = {r.seed: r.ap for r in base}
    return [r.ap - known[r.seed] for r in results if r.seed in known]


def told(values: Sequence[float]) -> int:
    """Return the sign of the mean where it is larger than the deviation, else 0: not told apart.

    One value has no deviation, and tells nothing.

    >>> told([0.1, 0.2, 0.15]), told([-0.3, -0.1, -0.2]), told([0.1, -0.1, 0.2]), told([0.5])
    (1, -1, 0, 0)
    """
    if len(values) < 2:
        return 0
    mean = statistics.fmean(values)
    return 0 if abs(mean) <= statistics.stdev(values) else (1 if mean > 0 else -1)


def in_words(values: Sequence[float]) -> str:
    """Return a gain in AP as points with what it tells.

    >>> in_words([0.01, 0.02, 0.03])
    '+2.0 ± 1.0 points of AP'
    >>> in_words([0.01, -0.01]), in_words([0.02]), in_words([])
    ('+0.0 ± 1.4 points of AP, not told apart', '+2.0 points of AP (one seed, which tells nothing)', 'not measured')
    """
    if not values:
        return "not measured"
    mean = f"{100 * statistics.fmean(values):+.1f}"
    if len(values) == 1:
        return f"{mean} points of AP (one seed, which tells nothing)"
    apart = "" if told(values) else ", not told apart"
    return f"{mean} ± {100 * statistics.stdev(values):.1f} points of AP{apart}"
