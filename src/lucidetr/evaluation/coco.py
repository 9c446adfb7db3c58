"""COCO's twelve numbers and the same by category (Lin et al. 2014), computed by faster-coco-eval."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lucidetr.boxes import xyxy_to_xywh
from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations
from lucidetr.errors import InputError
from lucidetr.structures import Detections

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MEANING = {
    "AP": "average precision, mean over IoU 0.50 … 0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "APs": "AP of small objects (area below 32² pixels)",
    "APm": "AP of medium objects",
    "APl": "AP of large objects (area above 96² pixels)",
    "AR1": "recall with 1 detection an image, mean over IoU",
    "AR10": "recall with 10 detections an image",
    "AR100": "recall with 100 detections an image",
    "ARs": "AR100 of small objects",
    "ARm": "AR100 of medium objects",
    "ARl": "AR100 of large objects",
}


@dataclass(frozen=True, eq=False)
class Metrics:
    """Hold the numbers as fractions (None: the set has no such objects) and what they rest on."""

    numbers: dict[str, float | None]
    per_class: dict[str, dict[str, float | int | None]]
    images: int
    objects: int
    detections: int
    precision: np.ndarray = field(repr=False)  # [IoU threshold, recall point, category, area range, max detections]
    recall: np.ndarray = field(repr=False)  # [IoU threshold, category, area range, max detections]
    scores: np.ndarray = field(repr=False)  # as precision

    @property
    def average_precision(self) -> float:
        """Return AP, 0 where the set has no objects at all."""
        return self.numbers["AP"] or 0.0

    def to_dict(self, precision: str) -> dict:
        """Return what is written to a metrics file; `precision` is that of the model's arithmetic, such as bf16."""
        counts = {"images": self.images, "objects": self.objects, "detections": self.detections}
        return self.numbers | counts | {"per_class": self.per_class, "dtype": precision}


def evaluate(annotations: Annotations, detections: Sequence[Detections]) -> Metrics:
    """Compare detections with the truth, one `Detections` for each image in order.

    Crowd boxes are ignored as COCO does. Detections must speak of the data set's own categories. Nothing detected
    at all is AP 0, not an error.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    silent = {"print_function": lambda *_: None}
    if len(detections) != len(annotations):
        raise InputError(f"{len(detections)} images were predicted, {len(annotations)} are to be evaluated")
    numbered = _numbered(annotations)
    truth = COCO(numbered.to_coco(), **silent)
    found = truth.loadRes(_results(annotations, numbered, detections))
    run = COCOeval_faster(truth, found, iouType="bbox", **silent)
    run.params.maxDets = [1, 10, 100]
    run.evaluate()
    run.accumulate()
    precision, recall = (np.asarray(run.eval[key]) for key in ("precision", "recall"))
    objects = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories))
    per_class = {
        name: {
            "AP": _mean(precision[:, :, k, 0, 2]),
            "AP50": _mean(precision[0, :, k, 0, 2]),
            "AR100": _mean(recall[:, k, 0, 2]),
            "objects": int(objects[k]),
        }
        for k, name in enumerate(annotations.categories.names)
    }
    return Metrics(
        numbers=_twelve(precision, recall),
        per_class=per_class,
        images=len(annotations),
        objects=int(objects.sum()),
        detections=sum(len(d) for d in detections),
        precision=precision,
        recall=recall,
        scores=np.asarray(run.eval["scores"]),
    )


def _numbered(annotations: Annotations) -> Annotations:
    """Return the same with ids that count from 1, those of images in the order of the user's, of categories by label.

    The library keeps ids as doubles, where those above 2⁵³ are no longer told apart, and takes an annotation's id of
    0 for "not matched". The order of images decides between equal scores.
    """
    names = annotations.categories.names
    return replace(
        annotations,
        image_ids=annotations.image_ids.argsort().argsort() + 1,
        annotation_ids=np.arange(1, len(annotations.annotation_ids) + 1),
        categories=Categories(ids=tuple(range(1, len(names) + 1)), names=names),
    )


def _results(annotations: Annotations, numbered: Annotations, detections: Sequence[Detections]) -> list[dict]:
    """Return the detections as rows of a COCO results file, with the numbered annotations' ids."""
    known = dict(zip(annotations.categories.ids, numbered.categories.ids, strict=True))
    rows = []
    ids = zip(annotations.image_ids.tolist(), numbered.image_ids.tolist(), detections, strict=True)
    for image_id, number, found in ids:
        if not (found.boxes_xyxy.isfinite().all() and found.scores.isfinite().all()):
            raise InputError(f"image {image_id}: a detection's box or score is nan or infinite; the model is broken")
        boxes = xyxy_to_xywh(found.boxes_xyxy.double()).tolist()
        for box, score, category_id in zip(boxes, found.scores.tolist(), found.category_ids, strict=True):
            if category_id not in known:
                raise InputError(f"a detection has category id {category_id}; the data set knows {sorted(known)}")
            rows.append({"image_id": number, "category_id": known[category_id], "bbox": box, "score": score})
    return rows


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of the entries that exist; COCO marks the others by −1."""
    there = values[values > -1]
    return float(there.mean()) if there.size else None


def _twelve(precision: np.ndarray, recall: np.ndarray) -> dict[str, float | None]:
    """Return COCO's summary. Area ranges: all, small, medium, large; detections: 1, 10, 100."""
    values = [
        precision[:, :, :, 0, 2],
        precision[0, :, :, 0, 2],
        precision[5, :, :, 0, 2],
        *(precision[:, :, :, area, 2] for area in (1, 2, 3)),
        *(recall[:, :, 0, most] for most in (0, 1, 2)),
        *(recall[:, :, area, 2] for area in (1, 2, 3)),
    ]
    return {name: _mean(each) for name, each in zip(NUMBERS, values, strict=True)}
