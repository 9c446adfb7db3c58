"""What a detector gets wrong, and what each kind of error costs (TIDE, Bolya et al. 2020, section 2).

Crowd boxes are ignored as COCO does: a detection that is matched to no object and lies in a crowd of its own category
counts neither for nor against. As in COCO, only the 100 best detections of a category in a picture count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from lucidetr.boxes import area, intersection_and_union, iou
from lucidetr.data.annotations import Annotations
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import Metrics, evaluate
from lucidetr.structures import Detections

KINDS = {
    "class": "right place, wrong category",
    "place": "right category, box too far off",
    "both": "near an object of another category, but not near enough",
    "duplicate": "right, but the object was found already",
    "background": "nothing is there",
    "missed": "an object that nothing of the above was about",
}
RIGHT, ASIDE = "right", "aside"  # what else a detection can be; aside counts neither for nor against
MOST = 100
IOU_75 = 5  # where IoU 0.75 stands among COCO's ten thresholds 0.50, 0.55, …


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Hold precision at COCO's 101 recalls for each category; not a number where it has no objects."""

    names: tuple[str, ...]
    recalls: Float[np.ndarray, " recall"]
    at_50: Float[np.ndarray, "category recall"]
    at_75: Float[np.ndarray, "category recall"]


@dataclass(frozen=True, eq=False)
class Compared:
    """Hold what was found in one picture, best first, beside its objects; labels are those of the annotations."""

    boxes_xyxy: Float[np.ndarray, "detection 4"]
    scores: Float[np.ndarray, " detection"]
    labels: Int[np.ndarray, " detection"]
    rows: Int[np.ndarray, " object"]  # of the annotations
    objects_xyxy: Float[np.ndarray, "object 4"]
    objects_labels: Int[np.ndarray, " object"]
    overlaps: Float[np.ndarray, "detection object"]  # IoU
    in_crowd: Float[np.ndarray, " detection"]  # largest share of the box in a crowd of its category

    def own(self) -> Float[np.ndarray, "detection object"]:
        """Return the overlaps with objects of the detection's own category, −1 elsewhere."""
        return np.where(self.labels[:, None] == self.objects_labels[None], self.overlaps, -1.0)

    def right(self, least: float) -> tuple[Bool[np.ndarray, " detection"], Bool[np.ndarray, " detection"]]:
        """Return which detections are right at an IoU of `least`, and which count at all."""
        right = match(self.own(), least) >= 0
        return right, right | (self.in_crowd < least)


@dataclass(frozen=True, eq=False)
class Judged:
    """Say of each detection of one picture what it is, which object it is about, and which objects were missed."""

    kinds: np.ndarray  # str [detection], one of KINDS, RIGHT or ASIDE
    objects: Int[np.ndarray, " detection"]  # −1: none
    missed: Bool[np.ndarray, " object"]


@dataclass(frozen=True, eq=False)
class ErrorKinds:
    """Count errors by kind, and say what AP50 would gain if those of one kind were mended and no others."""

    counts: dict[str, int]
    gains: dict[str, float]
    ap50: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Hold for each range of scores the mean score, the share of right detections and how many there are.

    `error` is the mean distance between score and share (expected calibration error), `lean` the same with its sign:
    above 0 the detector is surer than it should be. Means of empty ranges are not a number.
    """

    edges: Float[np.ndarray, " edge"]
    scores: Float[np.ndarray, " bin"]
    right: Float[np.ndarray, " bin"]
    counts: Int[np.ndarray, " bin"]
    error: float
    lean: float


@dataclass(frozen=True)
class Hard:
    """Count what is wrong in one picture, by its index in the split."""

    index: int
    missed: int
    false: int


@dataclass(frozen=True)
class Threshold:
    """Hold a score from which on detections are best kept, and how good those kept are."""

    score: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Hold the best threshold of all categories together and of each; None where nothing is ever right."""

    overall: Threshold | None
    per_class: dict[str, Threshold | None]


def precision_recall(metrics: Metrics) -> PrecisionRecall:
    """Return the precision of each category over recall, at an IoU of 0.5 and of 0.75."""
    curves = metrics.precision[:, :, :, 0, 2]
    curves = np.where(curves > -1, curves, np.nan).transpose(0, 2, 1)
    recalls = np.linspace(0, 1, curves.shape[2])
    return PrecisionRecall(tuple(metrics.per_class), recalls, at_50=curves[0], at_75=curves[IOU_75])


def match(overlaps: Float[np.ndarray, "detection object"], least: float) -> Int[np.ndarray, " detection"]:
    """Return each detection's object, −1 for none: in order, each takes the object left that it overlaps most.

    >>> match(np.array([[0.6, 0.7], [0.5, 0.9], [0.8, 0.1]]), 0.5).tolist()
    [1, 0, -1]
    """
    taken = np.full(len(overlaps), -1)
    free = np.ones(overlaps.shape[1], dtype=bool)
    for detection in np.flatnonzero(overlaps.max(1, initial=-1) >= least):
        left = np.where(free, overlaps[detection], -1.0)
        best = left.argmax()
        if left[best] >= least:
            taken[detection], free[best] = best, False
    return taken


def compare(annotations: Annotations, detections: Sequence[Detections]) -> list[Compared]:
    """Return what was found in each picture beside its objects, with all overlaps.

    `detections` are one for each image, in order, in categories that the annotations know by id.
    """
    if len(detections) != len(annotations):
        raise InputError(f"{len(detections)} images were predicted, {len(annotations)} are to be evaluated")
    return [_compare(annotations, index, found) for index, found in enumerate(detections)]


def judge(compared: Compared, threshold: float = 0.5, background: float = 0.1) -> Judged:
    """Return the kind of every detection of one picture, by TIDE's rules in TIDE's order.

    A box with an IoU of at least `threshold` is in the right place, one below `background` is near nothing. Objects
    that a detection of kind class or place is about are not missed.
    """
    own = compared.own()
    other = np.where(own < 0, compared.overlaps, -1.0)
    best_own, best_other = own.max(1, initial=-1), other.max(1, initial=-1)
    taken = match(own, threshold)
    rules = {
        RIGHT: taken >= 0,
        ASIDE: compared.in_crowd >= threshold,
        "place": (best_own >= background) & (best_own < threshold),
        "class": best_other >= threshold,
        "duplicate": best_own >= threshold,
        "background": np.maximum(best_own, best_other) < background,
    }
    kinds = np.select(list(rules.values()), list(rules), "both")
    objects = taken.copy()
    for kind, overlaps in (("place", own), ("class", other)):
        about = kinds == kind
        objects[about] = overlaps[about].argmax(1) if about.any() else -1
    missed = np.ones(len(compared.rows), dtype=bool)
    missed[objects[objects >= 0]] = False
    return Judged(kinds, objects, missed)


def error_kinds(
    annotations: Annotations, detections: Sequence[Detections], threshold: float = 0.5, background: float = 0.1
) -> ErrorKinds:
    """Count errors by TIDE's six kinds and return what AP50 would gain by mending each.

    Mending gives the right label (class) or box (place), where of several detections about one object only the best
    stays; takes the detection away (both, duplicate, background); or takes the object away (missed). The gains do
    not add up to 1 − AP50: mending one kind changes what the others cost.
    """
    compared = compare(annotations, detections)
    judged = [judge(each, threshold, background) for each in compared]
    counts = {kind: sum(int((each.kinds == kind).sum()) for each in judged) for kind in KINDS}
    counts["missed"] = sum(int(each.missed.sum()) for each in judged)
    ap50 = evaluate(annotations, detections).numbers["AP50"] or 0.0
    gains = {}
    for kind, count in counts.items():
        truth, found = annotations, detections
        if kind == "missed":
            truth = _without(annotations, compared, judged)
        else:
            found = [_mended(kind, *both, annotations) for both in zip(compared, judged, strict=True)]
        mended = evaluate(truth, found).numbers["AP50"] if count else ap50
        gains[kind] = (ap50 if mended is None else mended) - ap50
    return ErrorKinds(counts, gains, ap50)


def confusion(
    annotations: Annotations, detections: Sequence[Detections], score: float = 0.5, iou: float = 0.5
) -> Int[np.ndarray, "category category"]:
    """Return how often each true category was said to be each; the last row and column are the background.

    Detections of at least `score`, best first, are matched one to one by IoU whatever their category. The last row
    counts false alarms, the last column objects that were not found.
    """
    classes = len(annotations.categories)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for each in compare(annotations, [found.above(score) for found in detections]):
        taken = match(each.overlaps, iou)
        found = taken >= 0
        np.add.at(matrix, (each.objects_labels[taken[found]], each.labels[found]), 1)
        np.add.at(matrix[classes], each.labels[~found & (each.in_crowd < iou)], 1)
        np.add.at(matrix[:, classes], np.delete(each.objects_labels, taken[found]), 1)
    return matrix


def calibration(
    annotations: Annotations,
    detections: Sequence[Detections],
    bins: int = 10,
    iou: float = 0.5,
    least: float = 0.05,
) -> Calibration:
    """Return how well scores say how often detections are right (Guo et al. 2017, equation 3).

    A detection is right when it is matched to an object of its category. Scores below `least` are left out: a DETR
    has as many detections as queries, and those that say nothing would outweigh all others.
    """
    compared = compare(annotations, detections)
    scores, right, _ = _pooled(compared, iou)
    scores, right = scores[scores >= least], right[scores >= least]
    which = (scores * bins).astype(np.int64).clip(0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    divisor = np.where(counts, counts, np.nan)
    mean, share = (np.bincount(which, weights=values, minlength=bins) / divisor for values in (scores, right))
    weights = counts / max(counts.sum(), 1)
    gap = np.nan_to_num(mean - share) * weights
    return Calibration(np.linspace(0, 1, bins + 1), mean, share, counts, float(np.abs(gap).sum()), float(gap.sum()))


def hardest(
    annotations: Annotations, detections: Sequence[Detections], score: float = 0.5, iou: float = 0.5
) -> list[Hard]:
    """Return every picture's missed objects and false detections of at least `score`, the worst picture first."""
    pictures = []
    for index, each in enumerate(compare(annotations, [found.above(score) for found in detections])):
        right, counts = each.right(iou)
        pictures.append(Hard(index, len(each.rows) - int(right.sum()), int((counts & ~right).sum())))
    return sorted(pictures, key=lambda picture: -(picture.missed + picture.false))


def best_threshold(annotations: Annotations, detections: Sequence[Detections], iou: float = 0.5) -> Thresholds:
    """Return the score threshold with the best F1 for each category, and for all together.

    It lies in the middle between the weakest detection kept and the next weaker one. Of thresholds that are equally
    good the highest is taken.
    """
    compared = compare(annotations, detections)
    scores, right, labels = _pooled(compared, iou)
    objects = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories))
    per_class = {
        name: _best_cut(scores[labels == label], right[labels == label], int(objects[label]))
        for label, name in enumerate(annotations.categories.names)
    }
    return Thresholds(_best_cut(scores, right, int(objects.sum())), per_class)


def _best_cut(
    scores: Float[np.ndarray, " detection"], right: Bool[np.ndarray, " detection"], objects: int
) -> Threshold | None:
    """Return the cut with the best F1. Matching is by score, so a cut changes no match above it."""
    if not right.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(right[order])
    kept = np.arange(1, len(scores) + 1)
    f1 = 2 * hits / (kept + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # equal scores cannot be told apart
    best = int(f1.argmax())
    weaker = scores[best + 1] if best + 1 < len(scores) else scores[best]
    middle, precision, recall = (scores[best] + weaker) / 2, hits[best] / kept[best], hits[best] / objects
    return Threshold(float(middle), float(f1[best]), float(precision), float(recall))


def _pooled(
    compared: list[Compared], least: float
) -> tuple[Float[np.ndarray, " detection"], Bool[np.ndarray, " detection"], Int[np.ndarray, " detection"]]:
    """Return score, rightness and label of every detection of the split that counts."""
    scores, right, labels = [np.zeros(0)], [np.zeros(0, dtype=bool)], [np.zeros(0, dtype=np.int64)]
    for each in compared:
        hits, counts = each.right(least)
        scores.append(each.scores[counts])
        right.append(hits[counts])
        labels.append(each.labels[counts])
    return np.concatenate(scores), np.concatenate(right), np.concatenate(labels)


def _compare(annotations: Annotations, index: int, found: Detections) -> Compared:
    ids = annotations.categories.ids
    if unknown := set(found.category_ids) - set(ids):
        raise InputError(f"a detection has category id {min(unknown)}; the data set knows {sorted(ids)}")
    labels = np.array([ids.index(category_id) for category_id in found.category_ids], dtype=np.int64)
    order = np.argsort(-found.scores.double().numpy(), kind="stable")
    rank = np.zeros(len(order), dtype=np.int64)  # within its category
    for label in np.unique(labels):
        rank[labels[order] == label] = np.arange((labels == label).sum())
    order = order[rank < MOST]
    rows = np.arange(annotations.starts[index], annotations.starts[index + 1])
    low = annotations.boxes_xywh[rows, :2]
    corners = np.concatenate([low, low + annotations.boxes_xywh[rows, 2:]], axis=1)
    crowd = annotations.crowd[rows]
    boxes = found.boxes_xyxy.double()[torch.from_numpy(order)]
    shared, _ = intersection_and_union(boxes[:, None], torch.from_numpy(corners[crowd])[None])
    inside = (shared / area(boxes).clamp(min=1e-12)[:, None]).numpy()
    inside = np.where(labels[order][:, None] == annotations.labels[rows][crowd], inside, 0.0)
    return Compared(
        boxes_xyxy=boxes.numpy(),
        scores=found.scores.double().numpy()[order],
        labels=labels[order],
        rows=rows[~crowd],
        objects_xyxy=corners[~crowd],
        objects_labels=annotations.labels[rows][~crowd],
        overlaps=iou(boxes[:, None], torch.from_numpy(corners[~crowd])[None]).numpy(),
        in_crowd=inside.max(1, initial=0),
    )


def _without(annotations: Annotations, compared: list[Compared], judged: list[Judged]) -> Annotations:
    """Return the annotations without the objects that were missed."""
    keep = np.ones(len(annotations.labels), dtype=bool)
    for each, said in zip(compared, judged, strict=True):
        keep[each.rows[said.missed]] = False
    per_object = ("annotation_ids", "boxes_xywh", "labels", "areas", "crowd")
    left = {name: getattr(annotations, name)[keep] for name in per_object}
    return replace(annotations, **left, starts=np.concatenate([[0], np.cumsum(keep)])[annotations.starts])


def _mended(kind: str, compared: Compared, judged: Judged, annotations: Annotations) -> Detections:
    """Return one picture's detections with the errors of one kind mended."""
    about = judged.kinds == kind
    boxes, labels, keep = compared.boxes_xyxy.copy(), compared.labels.copy(), ~about
    if kind in ("class", "place"):
        if kind == "class":
            labels[about] = compared.objects_labels[judged.objects[about]]
        else:
            boxes[about] = compared.objects_xyxy[judged.objects[about]]
        claims = np.flatnonzero(about | (judged.kinds == RIGHT))
        _, best = np.unique(judged.objects[claims], return_index=True)  # the first is the best
        keep[claims] = False
        keep[claims[best]] = True
    return Detections(
        boxes_xyxy=torch.from_numpy(boxes[keep]),
        scores=torch.from_numpy(compared.scores[keep]),
        labels=torch.from_numpy(labels[keep]),
        categories=annotations.categories,
    )
