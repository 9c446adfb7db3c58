"""Average precision from its definition, as COCO counts it (Lin et al. 2014; Everingham et al. 2010, section 4.2).

Plain Python numbers: boxes are (left, top, width, height) in pixels, as in COCO files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Number = int | float
BoxXywh = tuple[Number, Number, Number, Number]

# Steps of 0.05 and 0.01 in floating point, as the official tool takes them: an overlap of exactly 0.6, or a recall
# of exactly 0.35, then falls on the same side of its limit here and there.
THRESHOLDS = [0.5 + k * ((0.95 - 0.5) / 9) for k in range(10)]
RECALLS = [k * 0.01 for k in range(101)]
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
MOST = 100  # answers that count, per image and category


@dataclass(frozen=True)
class TrueObject:
    """Hold one object that is there. A crowd is a region of many objects that were not drawn one by one."""

    image: int
    label: int
    box_xywh: BoxXywh
    area: Number
    crowd: bool = False


@dataclass(frozen=True)
class FoundObject:
    """Hold one answer of a detector."""

    image: int
    label: int
    box_xywh: BoxXywh
    score: Number

    @property
    def area(self) -> Number:
        """Return width × height."""
        return self.box_xywh[2] * self.box_xywh[3]


@dataclass(frozen=True)
class Verdict:
    """Say of one answer whether it is right; an answer that is set aside counts neither for nor against."""

    score: Number
    right: bool
    aside: bool


def overlap(found: FoundObject, thing: TrueObject) -> Number:
    """Return intersection over union; for a crowd, the share of the found box that lies in it.

    >>> answer = FoundObject(image=1, label=0, box_xywh=(0, 0, 2, 2), score=0.9)
    >>> overlap(answer, TrueObject(1, 0, (1, 0, 3, 2), area=6))  # 2 / (4 + 6 − 2)
    0.25
    >>> overlap(answer, TrueObject(1, 0, (1, 0, 3, 2), area=6, crowd=True))  # 2 / 4
    0.5
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = found.box_xywh, thing.box_xywh
    width = min(ax + aw, bx + bw) - max(ax, bx)
    height = min(ay + ah, by + bh) - max(ay, by)
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (aw * ah if thing.crowd else aw * ah + bw * bh - shared)


def outside(area: Number, limits: tuple[float, float]) -> bool:
    """Return whether an area lies outside the limits; the limits themselves lie inside both neighbours."""
    return area < limits[0] or area > limits[1]


def judge(
    found: list[FoundObject], things: list[TrueObject], threshold: float, limits: tuple[float, float]
) -> list[Verdict]:
    """Return a verdict on every answer in one image and category, best score first.

    Each answer in turn takes the free object that it overlaps most, if by `threshold` or more. Objects that do
    not count (crowds, sizes out of limits) are taken only when no other is left, and then the answer is set
    aside; a crowd can be taken again and again. So is an answer that is wrong but out of limits itself.

    >>> things = [TrueObject(1, 0, (0, 0, 10, 10), area=100)]
    >>> twice = [FoundObject(1, 0, (0, 0, 10, 9), score) for score in (0.9, 0.8)]
    >>> [verdict.right for verdict in judge(twice, things, 0.5, AREAS["all"])]  # the second is a duplicate
    [True, False]
    """
    counted = [thing for thing in things if not thing.crowd and not outside(thing.area, limits)]
    uncounted = [thing for thing in things if thing.crowd or outside(thing.area, limits)]
    free_counted, free_uncounted = list(counted), list(uncounted)
    verdicts = []
    for answer in found:
        if (thing := best_overlap(answer, free_counted, threshold)) is not None:
            free_counted = [other for other in free_counted if other is not thing]
            verdicts.append(Verdict(answer.score, right=True, aside=False))
        elif (thing := best_overlap(answer, free_uncounted, threshold)) is not None:
            free_uncounted = [other for other in free_uncounted if other is not thing or thing.crowd]
            verdicts.append(Verdict(answer.score, right=False, aside=True))
        else:
            verdicts.append(Verdict(answer.score, right=False, aside=outside(answer.area, limits)))
    return verdicts


def best_overlap(answer: FoundObject, things: list[TrueObject], threshold: float) -> TrueObject | None:
    """Return the object that the answer overlaps most, by `threshold` or more; of equals the last, None if none."""
    best, most = None, threshold
    for thing in things:
        if (shared := overlap(answer, thing)) >= most:
            best, most = thing, shared
    return best


def verdicts_of_category(
    found: list[FoundObject],
    things: list[TrueObject],
    threshold: float,
    limits: tuple[float, float],
    most: int = MOST,
) -> list[Verdict]:
    """Return the verdicts of all images on one category, best score first, at most `most` of each image."""
    verdicts = []
    for image in sorted({answer.image for answer in found}):
        answers = sorted((answer for answer in found if answer.image == image), key=lambda a: -a.score)
        here = [thing for thing in things if thing.image == image]
        verdicts += judge(answers[:most], here, threshold, limits)
    return [verdict for verdict in sorted(verdicts, key=lambda v: -v.score) if not verdict.aside]


def precision_and_recall(verdicts: list[Verdict], objects: int) -> list[tuple[float, float]]:
    """Return precision and recall after each answer, as one reads down the list.

    Precision is right / read so far, recall is right / all objects.

    >>> a, b = Verdict(0.9, right=True, aside=False), Verdict(0.8, right=False, aside=False)
    >>> precision_and_recall([a, b, a], objects=4)
    [(1.0, 0.25), (0.5, 0.25), (0.6666666666666666, 0.5)]
    """
    right, points = 0, []
    for read, verdict in enumerate(verdicts, start=1):
        right += verdict.right
        points.append((right / read, right / objects))
    return points


def average_precision(verdicts: list[Verdict], objects: int) -> float:
    """Return the mean, over 101 recalls from 0 to 1, of the best precision at that recall or beyond.

    It is the area under the precision-recall curve with its dents filled; a recall never reached counts 0.

    >>> right = Verdict(0.9, right=True, aside=False)
    >>> round(average_precision([right], objects=2), 4)  # precision 1 for the recalls 0, 0.01, … 0.5
    0.505
    """
    best_from_here, best = [], 0.0
    points = precision_and_recall(verdicts, objects)
    for precision, recall in reversed(points):
        best = max(best, precision)
        best_from_here.append((recall, best))
    best_from_here.reverse()
    total, position = 0.0, 0
    for recall in RECALLS:
        while position < len(best_from_here) and best_from_here[position][0] < recall:
            position += 1
        if position < len(best_from_here):
            total += best_from_here[position][1]
    return total / len(RECALLS)


def average_recall(verdicts: list[Verdict], objects: int) -> float:
    """Return the share of the objects that was found."""
    return sum(verdict.right for verdict in verdicts) / objects


def mean_over_categories(
    found: list[FoundObject],
    things: list[TrueObject],
    thresholds: list[float],
    area: str = "all",
    most: int = MOST,
) -> tuple[float | None, float | None]:
    """Return average precision and recall, the mean over thresholds and the categories that have an object.

    Both are None where no object of that size is there to be found.
    """
    limits = AREAS[area]
    precisions, recalls = [], []
    for label in sorted({thing.label for thing in things}):
        true_here = [thing for thing in things if thing.label == label]
        found_here = [answer for answer in found if answer.label == label]
        objects = sum(not thing.crowd and not outside(thing.area, limits) for thing in true_here)
        if objects == 0:
            continue
        for threshold in thresholds:
            verdicts = verdicts_of_category(found_here, true_here, threshold, limits, most)
            precisions.append(average_precision(verdicts, objects))
            recalls.append(average_recall(verdicts, objects))
    if not precisions:
        return None, None
    return sum(precisions) / len(precisions), sum(recalls) / len(recalls)


def coco_numbers(found: Iterable[FoundObject], things: Iterable[TrueObject]) -> dict[str, float | None]:
    """Return the twelve numbers of the COCO table.

    >>> things = [TrueObject(1, 0, (0, 0, 40, 40), area=1600)]
    >>> numbers = coco_numbers([FoundObject(1, 0, (0, 0, 40, 30), score=0.9)], things)  # IoU is 0.75
    >>> round(numbers["AP"], 3), numbers["AP50"], numbers["APs"]  # right at 0.5, 0.55, … 0.75
    (0.6, 1.0, None)
    """
    found, things = list(found), list(things)
    numbers: dict[str, float | None] = {}
    numbers["AP"], numbers["AR100"] = mean_over_categories(found, things, THRESHOLDS)
    numbers["AP50"], _ = mean_over_categories(found, things, [THRESHOLDS[0]])
    numbers["AP75"], _ = mean_over_categories(found, things, [THRESHOLDS[5]])
    for area in ("small", "medium", "large"):
        numbers[f"AP{area[0]}"], numbers[f"AR{area[0]}"] = mean_over_categories(found, things, THRESHOLDS, area)
    for most in (1, 10):
        _, numbers[f"AR{most}"] = mean_over_categories(found, things, THRESHOLDS, "all", most)
    return numbers
