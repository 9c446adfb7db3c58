"""How far labels agree with each other, where two pictures show one place and both were labelled.

Such pairs tell how well any detector can do by these labels.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lucidetr.boxes import iou
from lucidetr.data.places import Pair, View, correlation, seen_by_both
from lucidetr.data.raw import Box

IOUS = tuple(step / 100 for step in range(50, 100, 5))  # COCO's
MARGIN = 0.01  # of the longer side: objects nearer to an edge of what both see may be cut
PATCH = 8  # pixels of a small copy, at least, in which an object must look the same,
SAME = 0.85  # that is have this correlation


@dataclass(frozen=True)
class Twice:
    """Hold how two labellings of the same objects agree."""

    labels: int  # of both labellings, where both could see the object whole
    paired: float  # share of them with a partner of their category in the other, at an IoU of at least 0.5
    iou: float | None  # mean over the partners, None where there are none
    within: float | None  # mean over COCO's ten IoUs of the share of partners that agree so well
    ideal: float | None  # and of the share of labels that boxes without any error would meet so well


@dataclass(frozen=True)
class Agreement:
    """Hold how far labels agree in pairs of pictures that show one place."""

    pairs: int
    together: Twice
    categories: dict[str, Twice]


def agreement(pairs: Sequence[Pair]) -> Agreement | None:
    """Return how far labels agree where a place was labelled twice; None where none was.

    An object counts if both pictures show the whole of it and it looks the same in both. Pictures that have not moved
    are left out: the labels of a copy, or of the next frame before a camera that stands, are often copies too.
    """
    moved = [pair for pair in pairs if max(map(abs, pair.shift_xy)) >= 1]
    labels: dict[str, int] = defaultdict(int)
    ious: dict[str, list[tuple[float, float]]] = defaultdict(list)
    boxes = _boxes_of(moved)
    for pair in moved:
        first, second, counts = boxes[_key(pair.first)], boxes[_key(pair.second)], _judge(pair)
        for name in {box.name for box in (*first, *second)}:
            mine = _corners([box for box in first if box.name == name], (0.0, 0.0))
            other = _corners([box for box in second if box.name == name], pair.shift_xy)
            number, found = _compare(mine, other, counts)
            labels[name] += number
            ious[name] += found
    if not any(labels.values()):
        return None
    categories = {name: _twice(labels[name], ious[name]) for name in sorted(labels) if labels[name]}
    together = _twice(sum(labels.values()), [each for own in ious.values() for each in own])
    return Agreement(len(moved), together, categories)


def _compare(mine: Tensor, other: Tensor, counts: Callable[[Tensor], bool]) -> tuple[int, list[tuple[float, float]]]:
    """Return how many labels of one category two pictures have, and for each two partners two IoUs.

    The first is theirs, the second that of one of them with the likely truth. A label whose partner does not count,
    because it reaches a little further out, does not count either.
    """
    overlaps = iou(mine[:, None], other[None])
    seen, seen_there = (torch.tensor([counts(box) for box in boxes], dtype=torch.bool) for boxes in (mine, other))
    near = overlaps >= IOUS[0]
    kept = seen & ~(near & ~seen_there[None]).any(1)
    kept_there = seen_there & ~(near & ~seen[:, None]).any(0)
    mine, other, overlaps = mine[kept], other[kept_there], overlaps[kept][:, kept_there]
    i, j = map(torch.from_numpy, linear_sum_assignment(overlaps.numpy(), maximize=True))
    # two labels with independent errors are √2 times as far apart as one of them from the truth
    true = mine[i] + (other[j] - mine[i]) / math.sqrt(2)
    both = zip(overlaps[i, j].tolist(), iou(mine[i], true).tolist(), strict=True)
    return len(mine) + len(other), [each for each in both if each[0] >= IOUS[0]]


def _twice(labels: int, ious: Sequence[tuple[float, float]]) -> Twice:
    """Return the numbers of one category, from the IoU of each two partners and that of one with the likely truth.

    >>> _twice(5, [(0.5, 0.6), (0.75, 0.8)])
    Twice(labels=5, paired=0.8, iou=0.625, within=0.35, ideal=0.5)
    """
    if not ious:
        return Twice(labels, 0.0, None, None, None)
    within, ideal = np.mean([[np.greater_equal(each, least) for least in IOUS] for each in ious], axis=(0, 1)).tolist()
    return Twice(labels, 2 * len(ious) / labels, float(np.mean(ious, axis=0)[0]), within, ideal)


def _boxes_of(pairs: Sequence[Pair]) -> dict[tuple[int, int], list[Box]]:
    """Return the objects of every picture that is in a pair; neither regions to be ignored nor what is no box."""
    boxes: dict[tuple[int, int], list[Box]] = {_key(view): [] for pair in pairs for view in pair[:2]}
    for raw in {id(view.raw): view.raw for pair in pairs for view in pair[:2]}.values():
        for box in raw.boxes:
            sound = all(map(math.isfinite, box.box_xywh)) and min(box.box_xywh[2:]) > 0
            if (id(raw), box.picture) in boxes and sound and not box.crowd:
                boxes[id(raw), box.picture].append(box)
    return boxes


def _key(view: View) -> tuple[int, int]:
    return id(view.raw), view.number


def _corners(boxes: Sequence[Box], shift_xy: tuple[float, float]) -> Tensor:
    """Return the corners of boxes after a shift: [box, 4]."""
    boxes_xywh = torch.tensor([box.box_xywh for box in boxes], dtype=torch.float64).reshape(-1, 4)
    corner = boxes_xywh[:, :2] + torch.tensor(shift_xy, dtype=torch.float64)
    return torch.cat([corner, corner + boxes_xywh[:, 2:]], dim=1)


def _judge(pair: Pair) -> Callable[[Tensor], bool]:
    """Return what says of a box, in the first picture's pixels, whether both show the whole of it, and the same."""
    size, shape = np.array(pair.first.size), np.array(pair.first.small.shape[::-1])
    shift, margin, scale = np.array(pair.shift_xy), MARGIN * size.max(), shape.max() / size.max()
    steps = (shift * scale).round().astype(int)
    mine, other = (torch.tensor(view.small).float() for view in (pair.first, pair.second))
    both = seen_by_both(mine, other, (int(steps[0]), int(steps[1])))

    def counts(box_xyxy: Tensor) -> bool:
        corners = box_xyxy.numpy().reshape(2, 2)
        inside = (corners[0] >= np.maximum(0, shift) + margin) & (corners[1] <= size + np.minimum(0, shift) - margin)
        if not inside.all():
            return False
        wide = max(PATCH, (corners[1] - corners[0]).max() * scale) / 2
        middle = corners.mean(0) * scale - np.maximum(0, steps)
        (left, top), (right, bottom) = np.maximum(0, middle - wide).astype(int), np.ceil(middle + wide).astype(int)
        return correlation(*(part[top:bottom, left:right] for part in both)) >= SAME

    return counts
