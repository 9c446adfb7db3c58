"""Which prediction answers for which object: the cheapest one-to-one matching (DETR, section 3.1, equation 1)."""

import itertools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lucidetr.config import LossConfig
from lucidetr.reference.boxes import corners, generalised_iou
from lucidetr.reference.classification import focal_negative, focal_positive
from lucidetr.reference.elementary import softmax
from lucidetr.structures import Assignment, Batch, Predictions

Pair = tuple[int, int]


def pair_costs(
    logits: Float[Tensor, "query category"],
    boxes_cxcywh: Float[Tensor, "query 4"],
    labels: Int[Tensor, " object"],
    objects_cxcywh: Float[Tensor, "object 4"],
    config: LossConfig,
) -> Float[Tensor, "query object"]:
    """Return what it would cost to let a query answer for an object, for every pair of one image.

    The class's cost + 5 · L1 distance − 2 · GIoU, with the paper's weights.
    """
    query, thing = boxes_cxcywh[:, None], objects_cxcywh[None, :]
    distance = (query - thing).abs().sum(dim=-1)
    overlap = generalised_iou(corners(query), corners(thing))
    of_class = config.cost_class * class_costs(logits, config)[:, labels]
    return of_class + config.cost_l1 * distance - config.cost_giou * overlap


def class_costs(logits: Float[Tensor, "query category"], config: LossConfig) -> Float[Tensor, "query category"]:
    """Return what it costs a query to say each class.

    −p with softmax (the paper). With a yes or no for each class, what focal loss would take for the yes, less what
    it would take for the no (Deformable DETR, Zhu et al. 2021), whichever way they are trained.

    >>> class_costs(torch.zeros(1, 2), LossConfig()).tolist()
    [[-0.5, -0.5]]
    >>> yes_or_no = LossConfig(classification="mal")
    >>> round(class_costs(torch.zeros(1, 1), yes_or_no).item(), 4)  # (¼ − ¾) · ¼ · log 2
    -0.0866
    """
    if config.classification == "cross_entropy":
        return -softmax(logits)
    return focal_positive(logits) - focal_negative(logits)


def exhaustive_matching(cost: list[list[float]]) -> list[Pair]:
    """Return the cheapest pairs (row, column) by trying every way to give each row its own column.

    With 100 columns and 7 rows there are 8 · 10¹³ ways: this is for tiny cases and for checking the other.

    >>> exhaustive_matching([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]])  # 1 + 2 beats 0 + 3 and 0 + 4
    [(0, 1), (1, 0)]
    """
    if not cost or not cost[0]:
        return []
    if len(cost) > len(cost[0]):
        return turned(exhaustive_matching(transposed(cost)))
    ways = itertools.permutations(range(len(cost[0])), len(cost))
    best = min(ways, key=lambda way: sum(cost[row][column] for row, column in enumerate(way)))
    return list(enumerate(best))


def hungarian_matching(cost: list[list[float]]) -> list[Pair]:
    """Return the cheapest pairs (row, column) in about rows² · columns steps (Kuhn 1955; Jonker & Volgenant 1987).

    Every row and column gets a price, such that no pair costs less than its two prices together and every
    matched pair costs exactly that. Then no other matching can be cheaper. Rows enter one by one: each looks for
    the cheapest way to a free column, along which the rows already seated move over.

    >>> hungarian_matching([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]])
    [(0, 1), (1, 0)]
    """
    if not cost or not cost[0]:
        return []
    if len(cost) > len(cost[0]):
        return turned(hungarian_matching(transposed(cost)))
    row_price, column_price = [0.0] * len(cost), [0.0] * len(cost[0])
    seated: dict[int, int] = {}  # column → the row that has it
    for row in range(len(cost)):
        seat(row, cost, row_price, column_price, seated)
    return sorted((row, column) for column, row in seated.items())


def seat(
    new_row: int, cost: list[list[float]], row_price: list[float], column_price: list[float], seated: dict[int, int]
) -> None:
    """Give one more row a column: Dijkstra's shortest path, where a step's length is cost minus both prices.

    Prices and seats so far are changed in place.
    """
    distance = [math.inf] * len(column_price)  # from the new row to each column, as far as known
    previous: dict[int, int | None] = {}  # the column whose row led to this one; None: the new row itself
    waiting = list(range(len(column_price)))  # columns whose distance may still shrink
    reached: list[int] = []  # columns whose distance is final, nearest first
    row, column, length = new_row, None, 0.0
    while True:
        for other in waiting:
            step = length + cost[row][other] - row_price[row] - column_price[other]
            if step < distance[other]:
                distance[other], previous[other] = step, column
        column = min(waiting, key=lambda other: distance[other])
        length = distance[column]
        waiting.remove(column)
        reached.append(column)
        if column not in seated:
            break
        row = seated[column]

    row_price[new_row] += length
    for passed in reached[:-1]:  # prices rise and fall together: matched pairs stay exact, others not undercut
        row_price[seated[passed]] += length - distance[passed]
        column_price[passed] -= length - distance[passed]

    while (before := previous[column]) is not None:  # walk back: each row on the way moves one column further
        seated[column] = seated[before]
        column = before
    seated[column] = new_row


def transposed(cost: list[list[float]]) -> list[list[float]]:
    """Return the same costs with rows as columns."""
    return [list(column) for column in zip(*cost, strict=True)]


def turned(pairs: list[Pair]) -> list[Pair]:
    """Return (row, column) for (column, row), ordered by row."""
    return sorted((row, column) for column, row in pairs)


@torch.no_grad()
def match(predictions: Predictions, batch: Batch, config: LossConfig) -> Assignment:
    """Return the cheapest assignment of every layer and image; a cost that is no number is a FloatingPointError."""
    found: list[tuple[int, int, int, int]] = []
    for layer, image, cost in costs_by_image(predictions, batch, config):
        if not cost.isfinite().all():
            raise FloatingPointError(f"the matching cost of image {batch.image_ids[image]} is not finite")
        found += [(layer, image, query, thing) for query, thing in hungarian_matching(cost.tolist())]
    return assignment_of(found, predictions)


@torch.no_grad()
def choose(predictions: Predictions, batch: Batch, config: LossConfig) -> Assignment:
    """Return for every object the few queries that cost least, in every layer: one to many, for learning alone.

    A query that two objects want goes to the one that it costs less to answer for.
    """
    found: list[tuple[int, int, int, int]] = []
    for layer, image, cost in costs_by_image(predictions, batch, config):
        found += [(layer, image, query, thing) for query, thing in cheapest(cost.tolist(), config.tokens_per_object)]
    return assignment_of(found, predictions)


def costs_by_image(
    predictions: Predictions, batch: Batch, config: LossConfig
) -> Iterator[tuple[int, int, Float[Tensor, "query object"]]]:
    """Yield layer, image, and the cost of every pair of that image's queries and objects."""
    for layer in range(len(predictions.logits)):
        for image, count in enumerate(batch.counts.tolist()):
            cost = pair_costs(
                predictions.logits[layer, image],
                predictions.boxes_cxcywh[layer, image],
                batch.labels[image, :count],
                batch.boxes_cxcywh[image, :count],
                config,
            )
            yield layer, image, cost


def assignment_of(found: list[tuple[int, int, int, int]], predictions: Predictions) -> Assignment:
    """Return (layer, image, query, object) of every pair as columns, where the predictions lie."""
    table = torch.tensor(found, dtype=torch.long, device=predictions.logits.device).reshape(-1, 4)
    return Assignment(layer=table[:, 0], image=table[:, 1], query=table[:, 2], object=table[:, 3])


def cheapest(cost: list[list[float]], most: int) -> list[Pair]:
    """Return the pairs (row, column) of each column's cheapest rows; a row keeps the cheapest column that wants it.

    >>> cheapest([[1.0, 9.0], [2.0, 8.0], [3.0, 0.5]], most=2)  # both want row 1, which is cheaper for 0
    [(0, 0), (1, 0), (2, 1)]
    """
    wanted: dict[int, int] = {}
    for column, costs in enumerate(transposed(cost)):
        for row in sorted(range(len(cost)), key=costs.__getitem__)[:most]:
            if row not in wanted or costs[row] < cost[row][wanted[row]]:
                wanted[row] = column
    return sorted(wanted.items())
