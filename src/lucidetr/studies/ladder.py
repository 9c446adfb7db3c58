"""The ladder: what is each change from the paper's DETR to the lucid family worth, in a fixed time?

Every rung is trained, the finished model without each change, and with each that is off in it, for the same minutes, on
the same scenes, with several seeds. One line for each run goes into a file as soon as it is done, so a study can be
stopped and gone on with, and two processes can share it.
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lucidetr.config import ImageConfig, TrainConfig
from lucidetr.models.size import measure
from lucidetr.recipes import BESIDES, LADDER, LUCID_XS, Rung, beyond, climb, without
from lucidetr.studies.experiment import (
    FEW_DATA,
    Plan,
    Result,
    aps,
    at_side,
    fingerprint,
    gains,
    read_results,
    run_grid,
    run_one,
    spread,
    told,
)
from lucidetr.studies.page import BARS, Page, draw_bars, save, write_page

MEASURED = Path(__file__).with_name("ladder.jsonl")  # what the project's own table shows
USUAL = Plan(minutes=2.0, seeds=3)
QUICK = Plan(minutes=0.02, seeds=1, data=FEW_DATA, quick=True)
LEARNED = 0.01  # an AP above it is not chance


def study(folder: Path, plan: Plan) -> Path:
    """Run the study, draw and write the page."""
    grid = run_grid(folder / "ladder.jsonl", contenders(), plan, run_one)
    trained = [r for runs in grid.values() for r in runs]
    bars = save(folder / "ladder.png", (12, 5.5), lambda f: draw_ladder(f, trained))
    page = Page(
        title="The ladder",
        question=__doc__ or "",
        figures=(
            (
                bars,
                f"AP of each rung, of {LUCID_XS.recipe} without each change, and with each that is off, if measured. "
                f"{BARS} The line is {LUCID_XS.recipe} itself.",
            ),
        ),
        tables=(ladder_table(trained, bare=not trained),),
        answer=tuple(sentences(trained)),
    )
    return write_page(folder, "ladder", page, plan, trained)


def contenders() -> Iterator[tuple[str, str, TrainConfig]]:
    """Yield kind, name and config of every model of the study."""
    for rung, config in climb():
        yield "rung", rung.name, config
    for rung in LADDER[1:]:
        yield "without", rung.name, without(rung)
    for rung in BESIDES:
        yield "with", rung.name, beyond(rung)


def ladder_page(file: Path = MEASURED) -> str:
    """Return the ladder of a file as Markdown tables; runs of what a rung once was are left out."""
    configs = {(kind, name): config for kind, name, config in contenders()}
    known = [r for r in read_results(file) if (r.kind, r.name) in configs]
    return ladder_table([r for r in known if r.config == fingerprint(at_side(configs[r.kind, r.name], r.side))])


def ladder_table(results: list[Result], bare: bool = True) -> str:
    """Return three Markdown tables: each rung, lucid-xs without each change, and with each that is off.

    Those of which nothing is measured are left out, unless they may be `bare`.
    Each has size, speed and AP of its models, and compares like with like: the runs of one kind of machine and length.
    Operations are those for a square of the side that was trained at, or of the whole ladder where a table has no run.
    """
    kinds = (
        ("rung", "rung", list(climb())),
        ("without", f"{LUCID_XS.recipe} without", [(rung, without(rung)) for rung in LADDER[1:]]),
        ("with", "off in every recipe", [(rung, beyond(rung)) for rung in BESIDES]),
    )
    parts = []
    for kind, title, rows in kinds:
        own = alike(results, kind)
        if not (own or bare):
            continue
        side = next((r.side for r in [*own, *results]), 0)
        lines = [f"| {title} | change | parameters | GFLOPs | images/s | AP |", "|---|---|---|---|---|---|"]
        if kind != "rung":
            seeds = {r.seed for r in own if r.kind == kind}
            base = [r for r in of_rung(own, "rung", LADDER[-1]) if r.seed in seeds or not seeds]
            lines.append(described("–", f"{LUCID_XS.recipe} itself", squares(LUCID_XS, side), base))
        lines += [
            described(rung.name, rung.says, squares(config, side), of_rung(own, kind, rung)) for rung, config in rows
        ]
        parts += ["\n".join(lines), footnote([r for r in own if r.kind == kind])]
    return "\n\n".join(parts)


def alike(results: list[Result], kind: str) -> list[Result]:
    """Return the runs, of every kind, made under the conditions of most runs of this kind; none where it has none."""
    most = Counter(conditions(r) for r in results if r.kind == kind).most_common(1)
    return [r for r in results if most and conditions(r) == most[0][0]]


def conditions(result: Result) -> tuple[str | float, ...]:
    """Return what two runs must share to be compared; threads and clock decide how far minutes lead."""
    pace = (result.threads, result.clock) if result.minutes else ()
    return result.precision, result.minutes, result.data, result.side, *pace


def squares(config: TrainConfig, side: int) -> TrainConfig:
    """Return the config for squares of that side, which generated scenes are; 0: as it is."""
    return replace(config, images=ImageConfig(resize="square", size=side)) if side else config


def described(name: str, says: str, config: TrainConfig, results: list[Result]) -> str:
    """Return a row of what a model is, how large and fast it is, and its AP."""
    size = measure(config)
    speed = f"{statistics.mean(r.images_per_second for r in results):.0f}" if results else "–"
    return f"| {name} | {says} | {size.parameters / 1e6:.2f} M | {size.gflops:.2f} | {speed} | {spread(aps(results))} |"


def of_rung(results: list[Result], kind: str, rung: Rung) -> list[Result]:
    """Return the runs of one rung."""
    return [r for r in results if (r.kind, r.name) == (kind, rung.name)]


def footnote(results: list[Result]) -> str:
    """Return under which conditions a table was measured."""
    if not results:
        return "Nothing measured yet: lucidetr study ladder --out DIR"
    some = results[0]
    seeds = sorted(set(Counter((r.kind, r.name) for r in results).values()))
    threads = sorted({r.threads for r in results})
    length = f"{some.minutes:g} minutes" if some.minutes else f"{some.steps} steps"
    return (
        f"{length} of training each on {'/'.join(map(str, threads))} thread(s), {some.data} "
        f"at {some.side or LUCID_XS.images.size} pixels, {' or '.join(map(str, seeds))} seed(s), {some.precision}."
    )


def sentences(results: list[Result]) -> Iterator[str]:
    """Yield where learning begins on the way up, and what each change takes from lucid-xs or brings to it."""
    climbed = alike(results, "rung")
    base = of_rung(climbed, "rung", LADDER[-1])
    begun = next((r.name for r in LADDER if any(ap > LEARNED for ap in aps(of_rung(climbed, "rung", r)))), "none")
    whole = f"; {LUCID_XS.recipe} has {spread(aps(base))}" if base else ""
    yield f"Going up, the first rung with an AP above {LEARNED} is {begun}{whole}."
    for kind, rungs in (("without", LADDER[1:]), ("with", BESIDES)):
        own = alike(results, kind)
        base = of_rung(own, "rung", LADDER[-1])
        every = {rung.name: gains(of_rung(own, kind, rung), base) for rung in rungs}
        measured = {name: values for name, values in every.items() if values}
        if not measured:
            continue
        order = sorted(measured, key=lambda name: statistics.fmean(measured[name]))
        points = ", ".join(f"{name} {100 * statistics.fmean(measured[name]):+.1f}" for name in order)
        yield f"{LUCID_XS.recipe} {kind} each, in points of AP: {points}."
        apart = ", ".join(name for name in order if told(measured[name])) or "none"
        several = any(len(values) > 1 for values in measured.values())
        yield (
            f"Told apart from {LUCID_XS.recipe}: {apart}."
            if several
            else "One seed, which tells nothing of a few points."
        )


def draw_ladder(figure: Any, results: list[Result]) -> None:
    """Draw the AP of every rung, of lucid-xs without each change, and with each that is off in it, where measured."""
    kinds = (("rung", LADDER, "each rung"), ("without", LADDER[1:], "without"), ("with", BESIDES, "with"))
    drawn = [kind for kind in kinds if any(r.kind == kind[0] for r in results)]
    panels = figure.subplots(1, len(drawn), sharex=True, squeeze=False)[0] if drawn else ()
    for axes, (kind, rungs, title) in zip(panels, drawn, strict=True):
        own = alike(results, kind)
        values = {rung.name: aps(of_rung(own, kind, rung)) for rung in rungs}
        draw_bars(axes, values, "AP")
        axes.set_title(title if kind == "rung" else f"{LUCID_XS.recipe} {title}")
        if base := of_rung(own, "rung", LADDER[-1]):
            axes.axvline(statistics.fmean(aps(base)), color="tab:orange", linewidth=1)
