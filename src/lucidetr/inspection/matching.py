"""Whom training would match to each object, and how close the next best came (DETR, section 3.1, equation 1)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lucidetr.inspection.microscope import NOBODY, PARTS, View
from lucidetr.inspection.page import Figure, chart, written

TOLERATED = 0.1  # of a picture's objects may be undecided
CLOSE = 0.01  # of the range of an object's costs: a rival this near can take the object at the next step
COLOURS = ("tab:blue", "tab:orange", "tab:green")  # of the parts, as the terms of the loss


@dataclass(frozen=True, eq=False)
class Rivals:
    """Hold the query that has an object, first, and the cheapest others, cheapest first."""

    object: int
    queries: Int[np.ndarray, " query"]
    parts: Float[np.ndarray, "query part"]  # of the cost: PARTS
    taken: Bool[np.ndarray, " query"]  # has an object, this one or another
    margin: float  # of the cheapest free rival, as a share of the range of the object's costs; infinite without one

    @property
    def close(self) -> bool:
        """Say whether a free query would take the object almost as cheaply."""
        return self.margin < CLOSE


def rivals(view: View, layer: int = -1, number: int = 3) -> list[Rivals]:
    """Return for each object that has a query, at one row of the predictions, who else came near.

    A rival that another object took is no sign of an undecided matching, for it is not to be had; only free ones
    count for the margin.
    """
    cost, assignment = view.cost[layer], view.assignment[layer]
    busy = np.isin(np.arange(len(cost)), assignment)
    found = []
    for thing, winner in enumerate(assignment.tolist()):
        if winner == NOBODY:
            continue
        order = [query for query in np.argsort(cost[:, thing], kind="stable").tolist() if query != winner]
        free = [query for query in order if not busy[query]]
        scale = max(float(np.ptp(cost[:, thing])), 1e-12)
        margin = float(cost[free[0], thing] - cost[winner, thing]) / scale if free else np.inf
        queries = np.array([winner, *order[:number]])
        found.append(Rivals(thing, queries, view.cost_parts[layer][queries, thing], busy[queries], margin))
    return found


def draw_rivals(axes: Any, view: View, found: list[Rivals]) -> None:
    """Draw each object's queries as bars, the one that has it first, in the parts of their cost.

    Each part is drawn from the least of those drawn: what all queries have in common decides nothing.
    """
    floor = np.min([each.parts.min(0) for each in found], axis=0)
    places, captions, at = [], [], 0
    for each in found:
        name = written(view.categories.names[view.object_labels[each.object]])
        axes.text(at - 0.4, 1.02, name, transform=axes.get_xaxis_transform())
        for rank, (query, parts) in enumerate(zip(each.queries.tolist(), each.parts - floor, strict=True)):
            for part, colour in enumerate(COLOURS):
                alpha = 1.0 if rank == 0 else 0.5
                axes.bar(at, parts[part], bottom=parts[:part].sum(), color=colour, alpha=alpha)
            places.append(at)
            captions.append(f"{query}{'*' if rank and each.taken[rank] else ''}")
            at += 1
        at += 1
    axes.set(xticks=places, ylabel="cost above the least", xlabel="query (* has another object)")
    axes.set_xticklabels(captions, fontsize=7)
    axes.grid(visible=False, axis="x")
    axes.legend(
        [axes.bar(0, 0, color=colour) for colour in COLOURS], PARTS, loc="upper left", bbox_to_anchor=(1, 1), fontsize=7
    )


def draw_assignment(axes: Any, view: View, objects: list[int]) -> None:
    """Write down which query has each object after each layer; blue where it is the one that has it at the end."""
    for row, thing in enumerate(objects):
        for layer, query in enumerate(view.assignment[:, thing].tolist()):
            same = query == view.assignment[-1, thing]
            text = "–" if query == NOBODY else str(query)
            axes.text(layer, row, text, color="tab:blue" if same else "tab:red", ha="center", va="center")
    names = [f"{written(view.categories.names[view.object_labels[thing]])} ({thing})" for thing in objects]
    axes.set(xlim=(-0.5, len(view.assignment) - 0.5), ylim=(len(objects) - 0.5, -0.5))
    axes.set_xticks(range(len(view.assignment)), view.row_names, rotation=30, ha="right", fontsize=7)
    axes.set_yticks(range(len(objects)), names)
    axes.grid(visible=False)
    axes.set_title("query that has the object", fontsize=9)


def figure(view: View, most: int = 6) -> Figure | None:
    """Return the figure of a picture's matching; None where nothing is to be matched.

    Drawn are the undecided objects first, then the largest.
    """
    found = rivals(view)
    if not found:
        return None
    area = view.objects_cxcywh[:, 2] * view.objects_cxcywh[:, 3]
    shown = sorted(found, key=lambda each: (not each.close, -area[each.object]))[:most]
    some = "" if len(shown) == len(found) else f", {len(shown)} of {len(found)} objects"

    def draw(drawn: Any) -> None:
        bars, table = drawn.subplots(1, 2, width_ratios=(3, 1 + 0.15 * len(view.assignment)))
        draw_rivals(bars, view, shown)
        draw_assignment(table, view, [each.object for each in shown])

    return Figure(
        name=f"picture-{view.image_id}-matching",
        title=f"Image {view.image_id}: who has which object{some}",
        chart=chart(10, 3.2, draw),
        healthy="The query that has an object is far cheaper than the free ones beside it, and from some layer on the "
        "same query has it.",
        warnings=tuple(undecided(view, found)),
    )


def undecided(view: View, found: list[Rivals]) -> list[str]:
    """Return a sentence for each object that a free query would have almost as cheaply, if they are many of all."""
    if sum(each.close for each in found) <= TOLERATED * len(found):
        return []
    sentences = []
    for each in found:
        if each.close:
            name, winner = view.categories.names[view.object_labels[each.object]], each.queries[0]
            sentences.append(
                f"Image {view.image_id}: a free query would have {name} (object {each.object}) for nearly the cost of "
                f"query {winner}, {each.margin:.1%} of the range of costs apart: the matching may change at every step."
            )
    return sentences
