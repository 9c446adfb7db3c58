"""Initialisation: does it matter how the first weights are drawn, and can one see it before training?

Every scheme is looked at before the first step: the variance of the stream after each part of the network, the
deviation of each layer's gradient, and how evenly attention is spread. Then lucid-xs is trained with each for the same
time; it starts by the last scheme since this study has shown what that is worth. detr-xs is only looked at: from random
weights its AP is 0 after minutes whatever the scheme, which says nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lucidetr.config import TrainConfig
from lucidetr.fields import with_fields
from lucidetr.recipes import DETR_XS, LUCID_XS
from lucidetr.studies.experiment import (
    FEW_DATA,
    Contender,
    Plan,
    Result,
    aps,
    gains,
    in_words,
    numbers,
    run_grid,
    run_one,
    spread,
    told,
)
from lucidetr.studies.outset import Outset, look
from lucidetr.studies.page import Page, draw_bars, draw_depth, markdown_table, save, write_page

USUAL = Plan(minutes=2.0, seeds=3)
QUICK = Plan(minutes=0.06, seeds=1, data=FEW_DATA, quick=True)
BASE = with_fields(LUCID_XS, {"model.initialisation": "default", "model.residual_start": "xavier"})
SCHEMES: dict[str, dict[str, str]] = {
    "default": {},
    "residual zero": {"model.residual_start": "zero"},
    "uniform": {"model.initialisation": "uniform"},
    "uniform_scaled": {"model.initialisation": "uniform_scaled"},
    "xavier": {"model.initialisation": "xavier"},
    "he_in": {"model.initialisation": "he_in"},
    "he_out": {"model.initialisation": "he_out"},
    "t_fixup": {"model.initialisation": "t_fixup"},
    "xavier zero": {"model.initialisation": "xavier", "model.residual_start": "zero"},
}
LOOK_BATCH = 8  # pictures of the look before training


def study(folder: Path, plan: Plan) -> Path:
    """Look, train, draw and write the page."""
    grid = run_grid(folder / "initialisation.jsonl", contenders(), plan, run_one)
    trained = {name: runs for (_, name), runs in grid.items()}
    bases = [BASE] if plan.quick else [BASE, DETR_XS]
    outsets = {base.recipe: outsets_of(base, plan) for base in bases}
    figures = [
        (
            save(folder / f"initialisation-{base}.png", (11, 8), lambda f, found=found: draw_outsets(f, found)),
            f"{base} before its first step.",
        )
        for base, found in outsets.items()
    ]
    outcome = save(folder / "initialisation-outcome.png", (9, 3.5), lambda f: draw_outcome(f, trained))
    figures.append((outcome, f"{BASE.recipe} after the same training; dots are seeds."))
    page = Page(
        title="How the first weights are drawn",
        question=__doc__ or "",
        figures=tuple(figures),
        tables=tuple(table(base, found, trained if base == BASE.recipe else {}) for base, found in outsets.items()),
        answer=tuple(sentences(outsets, trained)),
    )
    return write_page(folder, "initialisation", page, plan, [r for runs in trained.values() for r in runs])


def contenders() -> Iterator[Contender]:
    """Yield the base with each scheme."""
    for name, changes in SCHEMES.items():
        yield BASE.recipe, name, with_fields(BASE, changes)


def outsets_of(base: TrainConfig, plan: Plan) -> dict[str, Outset]:
    """Return what the network is like at the start with every scheme."""
    few = replace(plan.given(base, seed=0), batch=LOOK_BATCH)
    return {name: look(with_fields(few, changes)) for name, changes in SCHEMES.items()}


def table(base: str, outsets: dict[str, Outset], trained: dict[str, list[Result]]) -> str:
    """Return the schemes of one base with what was seen before training and what came of it."""
    head = [base, "variance after the backbone", "after the encoder", "after the decoder"]
    head += ["gradient at the first kernels", "least even attention", "first loss", "last loss", "AP"]
    rows = []
    for name, outset in outsets.items():
        runs = trained.get(name, [])
        variances = [last_of(outset.variances, part) for part in ("backbone.", "encoder.", "decoder.")]
        row = [name, *(f"{v:.3g}" if v is not None else "–" for v in variances)]
        row += [f"{next(iter(outset.gradients.values())):.1e}", f"{min(outset.entropies.values()):.3f}"]
        rows.append([*row, f"{outset.loss:.1f}", spread(numbers(runs, "loss"), 2), spread(aps(runs))])
    return markdown_table(head, rows)


def last_of(values: dict[str, float], part: str) -> float | None:
    """Return the last value whose name begins with `part`, None where there is none.

    >>> last_of({"a.0": 1.0, "a.1": 2.0, "b.0": 3.0}, "a.")
    2.0
    """
    return next((value for name, value in reversed(values.items()) if name.startswith(part)), None)


def sentences(outsets: dict[str, dict[str, Outset]], trained: dict[str, list[Result]]) -> Iterator[str]:
    """Yield what the numbers say."""
    base = trained["default"]
    for name, runs in trained.items():
        if name != "default":
            yield f"{BASE.recipe}, {name} against default: {in_words(gains(runs, base))}."
    better = [name for name, runs in trained.items() if told(gains(runs, base)) > 0]
    yield f"Told apart from default as better: {', '.join(better) or 'none'}."
    for recipe, found in outsets.items():
        flow = {name: flow_of(outset) for name, outset in found.items()}
        yield (
            f"{recipe}: from the strongest to the weakest layer's gradient there are {flow['default']:.1f} powers of "
            f"ten by default; fewest with {min(flow, key=flow.__getitem__)} ({min(flow.values()):.1f}), most with "
            f"{max(flow, key=flow.__getitem__)} ({max(flow.values()):.1f}). Layers without any gradient do not count."
        )


def flow_of(outset: Outset) -> float:
    """Return over how many powers of ten the layers' gradients spread."""
    there = [value for value in outset.gradients.values() if value > 0]
    return math.log10(max(there) / min(there)) if there else 0.0


def draw_outsets(figure: Any, outsets: dict[str, Outset]) -> None:
    """Draw variances, gradients and entropies over the depth, a line for each scheme."""
    top, bottom = figure.subfigures(2, 1)
    stream = top.subplots()
    draw_depth(stream, {n: o.variances for n, o in outsets.items()}, "Variance of the stream after each part")
    stream.legend(ncols=4)
    left, right = bottom.subplots(1, 2)
    draw_depth(left, {n: o.gradients for n, o in outsets.items()}, "Deviation of each layer's gradient")
    entropies = {n: o.entropies for n, o in outsets.items()}
    draw_depth(right, entropies, "Entropy of attention, 1: every key gets the same", log=False)


def draw_outcome(figure: Any, trained: dict[str, list[Result]]) -> None:
    """Draw AP and loss of each scheme."""
    left, right = figure.subplots(1, 2, sharey=True)
    draw_bars(left, {name: aps(runs) for name, runs in trained.items()}, "AP")
    draw_bars(right, {name: numbers(runs, "loss") for name, runs in trained.items()}, "training loss at the end")
