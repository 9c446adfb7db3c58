"""Ablations: do the paper's own tables come out the same way in small?

What DETR's section 4.2 takes away or changes one at a time (Tables 2, 3, 4 and the text), done to lucid-xs: detr-xs
shows AP 0 after minutes, so nothing taken away from it could be seen. lucid-xs is another model, whose queries bring
boxes of their own and so know where cells lie in a second way; a sign that differs from the paper's is a finding, not a
mistake. For each row: the paper's difference in AP on COCO, ours, and whether the signs agree.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lucidetr.fields import with_fields
from lucidetr.recipes import LUCID_XS
from lucidetr.studies.experiment import (
    FEW_DATA,
    Contender,
    Plan,
    Result,
    aps,
    gains,
    run_grid,
    run_one,
    spread,
    told,
)
from lucidetr.studies.page import BARS, Page, draw_bars, markdown_table, save, write_page

USUAL = Plan(minutes=2.0, seeds=3)
QUICK = Plan(minutes=0.05, seeds=1, data=FEW_DATA, quick=True)
BASE = LUCID_XS
NONE = "encoder-0"


@dataclass(frozen=True)
class Row:
    """Hold one change to the base, and the paper's difference in points of AP where it has this row."""

    name: str
    says: str
    changes: dict[str, Any]
    paper: float | None = None
    source: str = "not in the paper"
    against: str = "base"


ROWS = (
    Row("base", f"{BASE.recipe}: one encoder layer, two decoder layers", {}),
    Row(NONE, "no encoder layer", {"model.encoder_layers": 0}, -3.9, "Table 2, 0 for 6"),
    Row("encoder-2", "two encoder layers, for none", {"model.encoder_layers": 2}, None, against=NONE),
    Row("encoder-3", "three, for none", {"model.encoder_layers": 3}, 3.4, "Table 2, 3 for 0", NONE),
    Row("encoder-6", "six, for none", {"model.encoder_layers": 6}, 3.9, "Table 2, 6 for 0", NONE),
    Row("decoder-1", "one decoder layer", {"model.decoder_layers": 1}, -8.2, "Figure 4, layer 1 for 6 of one model"),
    Row("decoder-3", "three decoder layers", {"model.decoder_layers": 3}),
    Row("no-feed-forward", "no feed-forward parts", {"model.feed_forward": 0}, -2.3, "section 4.2"),
    Row("no-position", "no position of cells", {"model.position": "none"}, -7.8, "Table 3, first row"),
    Row("at-input", "their position added once, at the input", {"model.position_at": "input"}, -1.4, "Table 3, second"),
    Row("learned", "their position learned", {"model.position": "learned"}, -1.0, "Table 3, third"),
    Row(
        "class-l1", "no GIoU in loss and cost", {"loss.weight_giou": 0.0, "loss.cost_giou": 0.0}, -4.8, "Table 4, first"
    ),
    Row("class-giou", "no L1 in loss and cost", {"loss.weight_l1": 0.0, "loss.cost_l1": 0.0}, -0.7, "Table 4, second"),
)


def study(folder: Path, plan: Plan) -> Path:
    """Train, draw and write the page."""
    grid = run_grid(folder / "ablations.jsonl", contenders(), plan, run_one)
    trained = {name: runs for (_, name), runs in grid.items()}
    values = {name: aps(runs) for name, runs in trained.items()}
    bars = save(folder / "ablations.png", (8, 5), lambda f: draw_bars(f.subplots(), values, "AP"))
    page = Page(
        title="The paper's ablations in small",
        question=__doc__ or "",
        figures=((bars, f"AP of {BASE.recipe} with each change after the same training. {BARS}"),),
        tables=(table(trained),),
        answer=tuple(sentences(trained)),
    )
    return write_page(folder, "ablations", page, plan, [r for runs in trained.values() for r in runs])


def contenders() -> Iterator[Contender]:
    """Yield the base with each change."""
    for row in ROWS:
        yield BASE.recipe, row.name, with_fields(BASE, row.changes)


def table(trained: dict[str, list[Result]]) -> str:
    """Return each change with the paper's difference, ours, and whether they agree."""
    head = ["name", "change", "steps", "AP", "paper, points", "its place", "ours, points", "same sign"]
    rows = []
    for row in ROWS:
        ours = differences(row, trained)
        paper = "–" if row.paper is None else f"{row.paper:+.1f}"
        rows.append(
            [
                row.name,
                row.says,
                ", ".join(str(run.steps) for run in trained[row.name]) or "–",
                spread(aps(trained[row.name])),
                paper,
                "" if row.name == "base" else row.source,
                "" if row.name == "base" else signed(ours),
                agreement(row.paper, ours),
            ]
        )
    return markdown_table(head, rows)


def differences(row: Row, trained: dict[str, list[Result]]) -> list[float]:
    """Return the change's gain in points of AP for each seed that both sides have."""
    return [100 * gain for gain in gains(trained[row.name], trained[row.against])]


def signed(points: Sequence[float]) -> str:
    """Return mean and deviation of differences, with their sign.

    >>> signed([-5.0, -6.0]), signed([5.0]), signed([])
    ('-5.5 ± 0.7', '+5.0', '–')
    """
    said = spread(points, 1)
    return f"+{said}" if points and statistics.fmean(points) >= 0 else said


def agreement(paper: float | None, ours: Sequence[float]) -> str:
    """Return whether our difference has the sign of the paper's, so far as the seeds can tell.

    >>> agreement(-3.9, [-5.0, -6.0]), agreement(-3.9, [5.0, 6.0]), agreement(-3.9, [-5.0, 4.0])
    ('yes', 'no', 'not told apart')
    >>> agreement(-3.9, [-5.0]), agreement(None, [1.0, 2.0])
    ('one seed tells nothing', '')
    """
    if paper is None or not ours:
        return ""
    if len(ours) == 1:
        return "one seed tells nothing"
    sign = told(ours)
    return "not told apart" if sign == 0 else "yes" if sign * paper > 0 else "no"


def sentences(trained: dict[str, list[Result]]) -> Iterator[str]:
    """Yield how many rows agree, and which do not."""
    compared = [(row, differences(row, trained)) for row in ROWS if row.paper is not None]
    said = {row.name: agreement(row.paper, ours) for row, ours in compared}
    for verdict, words in {
        "yes": "The sign agrees with the paper",
        "no": "The sign is the other",
        "not told apart": "Not told apart from no difference",
        "one seed tells nothing": "One seed, which tells nothing",
        "": "Not measured",
    }.items():
        names = [name for name, each in said.items() if each == verdict]
        if names:
            yield f"{words}: {len(names)} of {len(said)} rows ({', '.join(names)})."
    sizes = [abs(statistics.fmean(ours) / row.paper) for row, ours in compared if row.paper and said[row.name] == "yes"]
    if sizes:
        yield f"Where the signs agree, our difference is {statistics.median(sizes):.1f} times the paper's (median)."
