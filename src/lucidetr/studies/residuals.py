"""Residual paths: what becomes of gradients and of learning where they are cut, or the norms stand elsewhere?

Six blocks on two bases. detr-xs, the paper's design, shows gradients and loss; its AP is 0 after minutes whatever the
block, so AP is read off lucid-xs. A block without residual paths is post-norm without the sum, so it is compared with
post-norm. The end-norm block norms an encoder layer once at its end, and shares one norm between a decoder layer's two
attentions.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lucidetr.fields import with_fields
from lucidetr.recipes import DETR_XS, LUCID_XS
from lucidetr.studies.experiment import (
    FEW_DATA,
    Contender,
    Extra,
    Plan,
    Result,
    aps,
    gains,
    in_words,
    numbers,
    run_grid,
    run_one,
    spread,
)
from lucidetr.studies.outset import is_matrix, of_each_look
from lucidetr.studies.page import Page, draw_bars, markdown_table, save, write_page
from lucidetr.training.statistics import read_statistics

USUAL = Plan(minutes=2.0, seeds=3, looks=24)
QUICK = Plan(minutes=0.05, seeds=1, looks=6, data=FEW_DATA, quick=True)
# where no path leads around a branch, one that starts at zero would pass nothing on
BASES = (DETR_XS, with_fields(LUCID_XS, {"model.residual_start": "xavier"}))
BLOCKS = {  # encoder's, decoder's
    "post-norm": ("post_norm", "post_norm"),
    "pre-norm": ("pre_norm", "pre_norm"),
    "end-norm": ("end_norm", "shared_norm"),
    "encoder cut": ("no_residual", "post_norm"),
    "decoder cut": ("post_norm", "no_residual"),
    "both cut": ("no_residual", "no_residual"),
}
PLACES = {"backbone": "the backbone's last kernels", "queries": "the queries' first matrix"}


def study(folder: Path, plan: Plan) -> Path:
    """Train, draw and write the page."""
    file = folder / "residuals.jsonl"
    trained = run_grid(file, contenders(), plan, lambda kind, name, config: run_one(kind, name, config, read_gradients))
    gradients = save(folder / "residuals-gradients.png", (11, 7), lambda f: draw_gradients(f, trained))
    outcome = save(folder / "residuals-outcome.png", (9, 3), lambda f: draw_outcome(f, trained))
    page = Page(
        title="Residual paths and norms",
        question=__doc__ or "",
        figures=(
            (gradients, "Deviation of the gradient before the clip; the first look is before the first step. Seed 0."),
            (outcome, "After the same training; dots are seeds."),
        ),
        tables=(table(trained),),
        answer=tuple(sentences(trained)),
    )
    return write_page(folder, "residuals", page, plan, [r for runs in trained.values() for r in runs])


def contenders() -> Iterator[Contender]:
    """Yield every block on every base."""
    for base in BASES:
        for name, (encoder, decoder) in BLOCKS.items():
            changes = {"model.encoder_block": encoder, "model.decoder_block": decoder}
            yield base.recipe, name, with_fields(base, changes)


def read_gradients(run: Path) -> Extra:
    """Return the deviation of the gradient at the backbone's end and at the queries, at every look."""
    lines = read_statistics(run)
    if not lines:
        return {}, {}
    names = list(lines[0]["tensors"])
    backbone = [n for n in names if n.startswith("backbone.") and is_matrix(n)][-1]
    queries = next(n for n in names if n.startswith("queries.") and (is_matrix(n) or n.endswith("position")))
    series = {
        "step": tuple(float(line["step"]) for line in lines),
        "backbone": of_each_look(run, backbone, "gradient", 1),
        "queries": of_each_look(run, queries, "gradient", 1),
    }
    return {f"{place} at first": series[place][0] for place in PLACES}, series


Trained = dict[tuple[str, str], list[Result]]


def table(trained: Trained) -> str:
    """Return every block with its gradients at first and over the run, its loss and its AP."""
    head = ["base", "block"]
    head += [f"gradient at {where}, {when}" for where in PLACES.values() for when in ("at first", "median")]
    rows = []
    for (base, name), runs in trained.items():
        row = [base, name]
        for place in PLACES:
            row.append(small(numbers(runs, f"{place} at first")))
            row.append(small([statistics.median(r.series[place]) for r in runs if r.series.get(place)]))
        rows.append([*row, spread(numbers(runs, "loss"), 2), spread(aps(runs))])
    return markdown_table([*head, "loss at the end", "AP"], rows)


def small(values: Sequence[float]) -> str:
    """Return the mean of small numbers.

    >>> small([0.0012, 0.0014]), small([])
    ('1.3e-03', '–')
    """
    return f"{statistics.fmean(values):.1e}" if values else "–"


def sentences(trained: Trained) -> Iterator[str]:
    """Yield what the numbers say, against post-norm."""
    for base in (base.recipe for base in BASES):
        post = trained[base, "post-norm"]
        for name in list(BLOCKS)[1:]:
            runs = trained[base, name]
            if not (runs and post):
                continue
            said = [
                f"the first gradient at {where} is {ratio:.2g} times as strong"
                for place, where in PLACES.items()
                if (ratio := times(runs, post, f"{place} at first")) is not None
            ]
            if (loss := times(runs, post, "loss")) is not None:
                said.append(f"the loss at the end {loss:.2f} times as high")
            if base == LUCID_XS.recipe:
                said.append(in_words(gains(runs, post)))
            yield f"{base}, {name} against post-norm: {', '.join(said)}."


def times(runs: list[Result], base: list[Result], name: str) -> float | None:
    """Return how many times the base's mean a number's mean is, None where that cannot be said."""
    ours, theirs = numbers(runs, name), numbers(base, name)
    if not (ours and theirs) or statistics.fmean(theirs) == 0:
        return None
    return statistics.fmean(ours) / statistics.fmean(theirs)


def draw_gradients(figure: Any, trained: Trained) -> None:
    """Draw the gradient at both places over the run, a row for each base, a line for each block."""
    rows = figure.subplots(len(BASES), len(PLACES), squeeze=False)
    for row, base in zip(rows, BASES, strict=True):
        for axes, (place, where) in zip(row, PLACES.items(), strict=True):
            for name in BLOCKS:
                for run in trained[base.recipe, name][:1]:
                    values = [value if value > 0 else math.nan for value in run.series.get(place, ())]
                    axes.plot(run.series.get("step", ()), values, marker=".", markersize=3, label=name)
            axes.set(title=f"{base.recipe}, {where}", xlabel="optimiser step", yscale="log")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(BLOCKS))


def draw_outcome(figure: Any, trained: Trained) -> None:
    """Draw the loss on detr-xs and the AP on lucid-xs for each block."""
    left, right = figure.subplots(1, 2, sharey=True)
    losses = {name: numbers(trained[DETR_XS.recipe, name], "loss") for name in BLOCKS}
    draw_bars(left, losses, f"{DETR_XS.recipe}: training loss at the end")
    draw_bars(right, {name: aps(trained[LUCID_XS.recipe, name]) for name in BLOCKS}, f"{LUCID_XS.recipe}: AP")
