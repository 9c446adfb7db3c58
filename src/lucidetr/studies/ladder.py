"""The ladder: what is each change from the paper's DETR to the lucid family worth, in a fixed time on two cores?

Every rung is trained, and the finished model without each change, for the same minutes, on the same scenes, with
several seeds. One line for each run goes into a file as soon as it is done, so a study can be stopped and gone on
with, and two processes can share it.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lucidetr.config import TrainConfig
from lucidetr.errors import InputError
from lucidetr.models.size import measure
from lucidetr.recipes import LADDER, LUCID_XS, Rung, climb, without
from lucidetr.studies.experiment import DATA, FEW_DATA, Plan, Result, aps, read_results, run_grid, run_one, spread

MEASURED = Path(__file__).with_name("ladder.jsonl")  # what the project's own table shows
USUAL = Plan(minutes=2.0, seeds=3)
QUICK = Plan(minutes=0.02, seeds=1, data=FEW_DATA, quick=True)


def study(folder: Path, plan: Plan) -> Path:
    """Run the study and write its table; return the page."""
    file = folder / "ladder.jsonl"
    run_study(file, plan.minutes, plan.seeds, plan.part, plan.data, plan.clock, plan.steps)
    page = file.with_suffix(".md")
    page.write_text(ladder_page(file) + "\n", encoding="utf-8")
    return page


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
    steps: int = 0,
) -> None:
    """Train what is not yet in the file, seed by seed; of several processes each takes its part."""
    plan = Plan(minutes=minutes, seeds=seeds, part=part, data=data, clock=clock, steps=steps)
    run_grid(file, contenders(), plan, run_one)


def ladder_page(file: Path = MEASURED) -> str:
    """Return the ladder as a Markdown table: each rung's change, size, speed and AP, and the AP without it."""
    results = read_results(file)
    rows = [
        "| rung | change | parameters | GFLOPs | images/s | AP of the rung | AP of lucid-xs without it |",
        "|---|---|---|---|---|---|---|",
    ]
    for rung, config in climb():
        size, here = measure(config), of_rung(results, "rung", rung)
        speed = f"{statistics.mean(r.images_per_second for r in here):.0f}" if here else "–"
        rows.append(
            f"| {rung.name} | {rung.says} | {size.parameters / 1e6:.2f} M | {size.gflops:.2f} | {speed} "
            f"| {spread(aps(here))} | {spread(aps(of_rung(results, 'without', rung)))} |"
        )
    return "\n".join([*rows, "", *footnotes(results)])


def of_rung(results: list[Result], kind: str, rung: Rung) -> list[Result]:
    """Return the runs of one rung."""
    return [r for r in results if (r.kind, r.name) == (kind, rung.name)]


def footnotes(results: list[Result]) -> list[str]:
    """Return under which conditions the table was measured; runs of several minutes or data sets are an InputError."""
    if not results:
        return ["Nothing measured yet: lucidetr study ladder --out DIR"]
    conditions = {(r.minutes, r.data) for r in results}
    if len(conditions) > 1:
        raise InputError(f"runs of different minutes or data cannot share a table: {sorted(conditions)}")
    some = results[0]
    seeds, threads = len({r.seed for r in results}), sorted({r.threads for r in results})
    length = f"{some.minutes:g} minutes" if some.minutes else f"{some.steps} steps"
    return [
        f"{length} of training each on {'/'.join(map(str, threads))} thread(s), {some.data}, "
        f"{seeds} seed(s), {some.precision}; {LUCID_XS.recipe} itself is the last rung."
    ]
