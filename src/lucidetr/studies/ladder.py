"""The ladder: what is each change from the paper's DETR to the lucid family worth, in a fixed time on two cores?

Every rung is trained, and the finished model without each change, for the same minutes, on the same scenes, with
several seeds. One line for each run goes into a file as soon as it is done, so a study can be stopped and gone on
with, and two processes can share it.
"""

import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from lucidetr.config import TrainConfig
from lucidetr.errors import InputError
from lucidetr.fields import from_dict
from lucidetr.models.size import measure
from lucidetr.recipes import LADDER, LUCID_XS, Rung, climb, without
from lucidetr.training.loop import train
from lucidetr.training.run_log import read_json, read_metrics

DATA = "generated:digits"
MEASURED = Path(__file__).with_name("ladder.jsonl")  # what the project's own table shows


@dataclass(frozen=True)
class Result:
    """Hold one run: which model, how it was trained, what it reached."""

    kind: str  # rung, or without
    name: str
    seed: int
    minutes: float
    threads: int
    data: str
    ap: float
    ap50: float
    steps: int
    images_per_second: float
    precision: str
    commit: str
    machine: str


def contenders() -> Iterator[tuple[str, str, TrainConfig]]:
    """Yield kind, name and config of every model of the study."""
    for rung, config in climb():
        yield "rung", rung.name, config
    for rung in LADDER[1:]:
        yield "without", rung.name, without(rung)


def run_study(
    file: Path,
    minutes: float,
    seeds: int,
    part: tuple[int, int] = (1, 1),
    data: str = DATA,
    clock: Literal["wall", "processor"] = "wall",
) -> None:
    """Train what is not yet in the file, seed by seed; of several processes each takes its part."""
    number, parts = part
    wanted = [(seed, *each) for seed in range(seeds) for each in contenders()]
    for seed, kind, name, config in wanted[number - 1 :: parts]:
        done = {(r.kind, r.name, r.seed) for r in read_results(file) if (r.minutes, r.data) == (minutes, data)}
        if (kind, name, seed) in done:
            continue
        result = run_one(kind, name, replace(config, seed=seed, minutes=minutes, data=data, evaluations=1, clock=clock))
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")
        print(f"{kind} {name}, seed {seed}: AP {result.ap:.3f} at {result.images_per_second:.0f} images/s")


def run_one(kind: str, name: str, config: TrainConfig) -> Result:
    """Train once in a folder that is thrown away, and return what was measured."""
    folder = Path(tempfile.mkdtemp(prefix="ladder-"))
    try:
        run = train(replace(config, out=str(folder / "run")))
        last, begun = read_metrics(run)[-1], read_json(run / "run.json")[-1]
    finally:
        shutil.rmtree(folder)
    return Result(
        kind=kind,
        name=name,
        seed=config.seed,
        minutes=config.minutes,
        threads=begun["threads"],
        data=config.data,
        ap=last.get("val/AP", 0.0),
        ap50=last.get("val/AP50", 0.0),
        steps=last["step"],
        images_per_second=last["step"] * config.batch / last["seconds"],
        precision=begun["precision"],
        commit=begun["commit"] or "",
        machine=begun["machine"],
    )


def read_results(file: Path) -> list[Result]:
    """Return the runs in a file, none where there is no file."""
    if not file.is_file():
        return []
    return [from_dict(Result, json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines() if line]


def ladder_page(file: Path = MEASURED) -> str:
    """Return the ladder as a Markdown table: each rung's change, size, speed and AP, and the AP without it."""
    results = read_results(file)
    rows = [
        "| rung | change | parameters | GFLOPs | images/s | AP of the rung | AP of lucid-xs without it |",
        "|---|---|---|---|---|---|---|",
    ]
    for rung, config in climb():
        size, here = measure(config), chosen(results, "rung", rung)
        speed = f"{statistics.mean(r.images_per_second for r in here):.0f}" if here else "–"
        rows.append(
            f"| {rung.name} | {rung.says} | {size.parameters / 1e6:.2f} M | {size.gflops:.2f} | {speed} "
            f"| {spread(aps(here))} | {spread(aps(chosen(results, 'without', rung)))} |"
        )
    return "\n".join([*rows, "", *footnotes(results)])


def chosen(results: list[Result], kind: str, rung: Rung) -> list[Result]:
    """Return the runs of one rung."""
    return [r for r in results if (r.kind, r.name) == (kind, rung.name)]


def aps(results: list[Result]) -> list[float]:
    """Return the AP of each run."""
    return [r.ap for r in results]


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the deviation where there are several values.

    >>> spread([0.1, 0.2, 0.3]), spread([0.5]), spread([])
    ('0.200 ± 0.100', '0.500', '–')
    """
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def footnotes(results: list[Result]) -> list[str]:
    """Return under which conditions the table was measured; runs of several minutes or data sets are an InputError."""
    if not results:
        return ["Nothing measured yet: lucidetr study ladder --out DIR"]
    conditions = {(r.minutes, r.data) for r in results}
    if len(conditions) > 1:
        raise InputError(f"runs of different minutes or data cannot share a table: {sorted(conditions)}")
    some = results[0]
    seeds, threads = len({r.seed for r in results}), sorted({r.threads for r in results})
    return [
        f"{some.minutes:g} minutes of training each on {'/'.join(map(str, threads))} thread(s), {some.data}, "
        f"{seeds} seed(s), {some.precision}; {LUCID_XS.recipe} itself is the last rung."
    ]
