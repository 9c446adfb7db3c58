"""The matching over a run: does an object keep its query, is every query used, is an object said twice?

(Li et al. 2022, DN-DETR, figure 2, for the first.) Read off what training wrote into statistics.jsonl.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lucidetr.config import ModelConfig
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, chart
from lucidetr.training.run_log import row_names

CHURNING = 0.5  # share of objects that change their query, at the end of a run
TITLES = {
    "churn": "objects whose query has changed",
    "used": "queries that ever had an object",
    "duplicates": "further queries on one object",
}


@dataclass(frozen=True, eq=False)
class Matching:
    """Hold what was written of the matching at every look, for every row of the predictions; nan: nothing known."""

    steps: Int[np.ndarray, " look"]
    rows: tuple[str, ...]
    last: int  # the row of the last layer, of the group of queries that is used after training
    churn: Float[np.ndarray, "look layer"]
    used: Float[np.ndarray, "look layer"]
    duplicates: Float[np.ndarray, "look layer"]


def course_of_matching(statistics: Sequence[dict[str, Any]], config: ModelConfig) -> Matching | None:
    """Return the course of the matching, None where nothing was written of it."""
    lines = [line for line in statistics if line["queries"].get("used")]
    if not lines:
        return None
    values = {
        name: np.array([[np.nan if v is None else v for v in line["queries"][name]] for line in lines], dtype=float)
        for name in TITLES
    }
    rows = tuple(row_names(config))
    return Matching(np.array([line["step"] for line in lines]), rows, len(rows) - config.query_groups, **values)


def draw_matching(figure: Any, matching: Matching) -> None:
    """Draw churn, use and duplicates over the steps, a line for each row of predictions, the one that counts bold."""
    for axes, (name, title) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
        values = getattr(matching, name)
        for layer, row in enumerate(matching.rows):
            last = layer == matching.last
            axes.plot(matching.steps, values[:, layer], lw=2 if last else 0.9, alpha=1 if last else 0.6, label=row)
        axes.set(title=title, xlabel="optimiser step", ylim=(0, None))
    axes.legend(fontsize=7)


def warn_of_churn(matching: Matching, ranked: bool) -> tuple[str, ...]:
    """Return a sentence where at the end objects of the last layer still change their query more often than not.

    Queries that are ranks of tokens change with every other object's score, so theirs tell nothing.
    """
    churn = matching.churn[:, matching.last]
    known = churn[np.isfinite(churn)]
    if ranked or not len(known) or known[-1] <= CHURNING:
        return ()
    return (
        f"At the end {known[-1]:.0%} of the objects still had another query than at their last sight: the matching has "
        "not settled; a longer run, or queries that start from a box (the lucid recipes), would help.",
    )


def figure(material: Material) -> Figure | None:
    """Return the figure of a run, None where training wrote nothing down."""
    config = material.config.model
    matching = course_of_matching(material.statistics, config)
    if matching is None:
        return None
    ranked = config.selects
    first = (
        "These queries are ranks of tokens, and ranks change with every score, so the first chart says little here"
        if ranked
        else "Objects keep their queries more and more, and more so where pictures are no longer changed at random"
    )
    return Figure(
        "queries-matching",
        "The matching over the run",
        chart(10, 3.2, lambda drawn: draw_matching(drawn, matching)),
        f"{first}. Soon every query that is needed has had an object, and no object is said by a second query.",
        warn_of_churn(matching, ranked),
    )
