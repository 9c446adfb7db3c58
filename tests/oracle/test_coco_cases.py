"""COCO's numbers on sets so small that a person can work them out, and on thousands of random ones.

Precision is read at the 101 recalls 0, 0.01, … 1: one object of two, found without an error, is 51/101; one of three
34/101; one of four 26/101. A mean over the ten thresholds 0.50, 0.55, … 0.95 is a sum of tenths.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from coco_tools import by_pycocotools, twelve
from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations
from lucidetr.data.coco import read_coco
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import NUMBERS, evaluate
from lucidetr.reference.average_precision import FoundObject, TrueObject, coco_numbers
from lucidetr.structures import Detections

from .test_average_precision import SIDE, results, scene, witness

A, B, C, FAR = (0, 0, 40, 40), (60, 0, 40, 40), (120, 0, 40, 40), (0, 150, 40, 40)  # medium: 1,600 pixels
HALF, THREE_QUARTERS = (0, 0, 40, 20), (0, 0, 40, 30)  # of A
SMALL, LARGE = (100, 100, 20, 20), (100, 100, 100, 100)


def thing(box, label=0, image=1, area=None, crowd=False) -> TrueObject:
    return TrueObject(image, label, box, box[2] * box[3] if area is None else area, crowd)


def found(box, score, label=0, image=1) -> FoundObject:
    return FoundObject(image, label, box, score)


def row(squares: int) -> list[tuple[int, int, int, int]]:
    """Return so many boxes of 10 × 10 pixels that do not touch."""
    return [(20 * (i % 11), 20 * (i // 11), 10, 10) for i in range(squares)]


def numbers(
    ap, ap50=None, ap75=None, ar1=None, ar10=None, *, small=(None, None), medium=None, large=(None, None)
) -> dict[str, Fraction | None]:
    """Return the twelve numbers. Where not said: AP50 and AP75 as AP, AR10 as AR1, AR100 as AR10, medium as all."""
    ap50, ap75 = (ap if value is None else value for value in (ap50, ap75))
    ar1 = ap if ar1 is None else ar1
    ar100 = ar10 = ar1 if ar10 is None else ar10
    medium = (ap, ar100) if medium is None else medium
    sizes = [each for pair in zip(small, medium, large, strict=True) for each in pair]
    values = [ap, ap50, ap75, *sizes[:3], ar1, ar10, ar100, *sizes[3:]]
    return dict(zip(NUMBERS, (None if value is None else Fraction(value) for value in values), strict=True))


NOTHING: dict[str, Fraction | None] = dict.fromkeys(NUMBERS)
NONE = (None, None)


class Case(NamedTuple):
    """Hold a set, its twelve numbers, and how one comes by them."""

    things: list[TrueObject]
    found: list[FoundObject]
    expected: dict[str, Fraction | None]
    why: str


F = Fraction
CASES = {
    "perfect": Case([thing(A)], [found(A, 0.9)], numbers(1), "precision 1 at every recall"),
    "nothing found": Case([thing(A)], [], numbers(0), "no recall is reached"),
    "score zero": Case([thing(A)], [found(A, 0.0)], numbers(1), "only the order of scores counts"),
    "wrong one above": Case(
        [thing(A)], [found(FAR, 0.9), found(A, 0.8)], numbers(F(1, 2), ar1=0, ar10=1), "1 right of 2 read at recall 1"
    ),
    "wrong one below": Case([thing(A)], [found(A, 0.9), found(FAR, 0.8)], numbers(1), "recall 1 is reached before it"),
    "wrong one in a picture without objects": Case(
        [thing(A)],
        [found(A, 0.9, image=2), found(A, 0.8)],
        numbers(F(1, 2), ar1=1),
        "precision is read over all pictures; each picture keeps its own best answer",
    ),
    "one of two": Case([thing(A), thing(B)], [found(A, 0.9)], numbers(F(51, 101), ar1=F(1, 2)), "recalls 0 … 0.50"),
    "one of three": Case(
        [thing(A), thing(B), thing(C)], [found(A, 0.9)], numbers(F(34, 101), ar1=F(1, 3)), "recalls 0 … 0.33"
    ),
    "two of three around an error": Case(
        [thing(A), thing(B), thing(C)],
        [found(A, 0.9), found(FAR, 0.8), found(B, 0.7)],
        numbers(F(34 * 3 + 33 * 2, 303), ar1=F(1, 3), ar10=F(2, 3)),
        "34 recalls at precision 1, the 33 to 0.66 at 2/3",
    ),
    "a dent is filled": Case(
        [thing(A), thing(B)],
        [found(FAR, 0.9), found(A, 0.8), found(B, 0.7)],
        numbers(F(2, 3), ar1=0, ar10=1),
        "precision 1/2 at recall 0.5, but 2/3 beyond: the best beyond counts",
    ),
    "found twice": Case(
        [thing(A), thing(B)],
        [found(A, 0.9), found(A, 0.8), found(B, 0.7)],
        numbers(F(51 * 3 + 50 * 2, 303), ar1=F(1, 2), ar10=1),
        "the second of A is an error: 51 recalls at 1, 50 at 2/3",
    ),
    "the surer one takes the object": Case(
        [thing(A)],
        [found(HALF, 0.9), found(A, 0.8)],
        numbers(F(11, 20), ap50=1, ap75=F(1, 2), ar1=F(1, 10), ar10=1, medium=(1, 1)),
        "at 0.50 the half box is right, at the 9 others an error above the right one: (1 + 9/2)/10; "
        "being small itself, it is no error among the medium",
    ),
    "two objects in one place": Case(
        [thing(A), thing(A)], [found(A, 0.9), found(A, 0.8)], numbers(1, ar1=F(1, 2), ar10=1), "each takes one"
    ),
    "the best overlap is taken": Case(
        [thing(A), thing((0, 0, 40, 50))],
        [found((0, 0, 40, 50), 0.9), found(A, 0.8)],
        numbers(1, ar1=F(1, 2), ar10=1),
        "were the first object taken (IoU 0.8), the second answer would find only the other, by 0.8",
    ),
    "scores tie, error listed first": Case(
        [thing(A)], [found(FAR, 0.5), found(A, 0.5)], numbers(F(1, 2), ar1=0, ar10=1), "equals stay as they were listed"
    ),
    "scores tie, error listed last": Case([thing(A)], [found(A, 0.5), found(FAR, 0.5)], numbers(1), "the same"),
    "scores tie over pictures, error first": Case(
        [thing(A, image=2)],
        [found(A, 0.5, image=1), found(A, 0.5, image=2)],
        numbers(F(1, 2), ar1=1),
        "equals are read picture by picture",
    ),
    "scores tie over pictures, error last": Case(
        [thing(A, image=1)], [found(A, 0.5, image=1), found(A, 0.5, image=2)], numbers(1), "the same"
    ),
    "IoU of 1/2": Case([thing(A)], [found(HALF, 0.9)], numbers(F(1, 10), ap50=1, ap75=0), "a threshold is reached"),
    "IoU of 3/4": Case([thing(A)], [found(THREE_QUARTERS, 0.9)], numbers(F(6, 10), ap50=1, ap75=1), "0.50 … 0.75"),
    "IoU of 19/20": Case([thing(A)], [found((0, 0, 40, 38), 0.9)], numbers(1), "the highest threshold is reached"),
    "IoU of 1999/4000": Case([thing(A)], [found((0, 0, 40, 19.99), 0.9)], numbers(0), "no threshold is reached"),
    "touching is not overlapping": Case([thing(A)], [found((40, 0, 40, 40), 0.9)], numbers(0), "IoU 0"),
    "a box without area": Case(
        [thing(A)],
        [found((10, 10, 0, 0), 0.9), found(A, 0.8)],
        numbers(F(1, 2), ar1=0, ar10=1, medium=(1, 1)),
        "an error like others; but its size is not medium",
    ),
    "a crowd absorbs": Case(
        [thing(A), thing(LARGE, crowd=True)],
        [found((110, 110, 40, 40), 0.9), found((110, 110, 40, 40), 0.85), found(A, 0.8)],
        numbers(1, ar1=0, ar10=1),
        "what lies in the region is neither right nor wrong, again and again, but is the one answer of AR1",
    ),
    "a crowd absorbs half a box": Case(
        [thing(A), thing(LARGE, crowd=True)],
        [found((80, 100, 40, 40), 0.9), found(A, 0.8)],
        numbers(F(11, 20), ap50=1, ap75=F(1, 2), ar1=0, ar10=1),
        "half of it lies in the region: set aside at 0.50, an error above the right one at the 9 others",
    ),
    "an object comes before its crowd": Case(
        [thing((110, 110, 40, 40)), thing(B), thing(LARGE, crowd=True)],
        [found((110, 110, 40, 40), 0.9), found((110, 110, 40, 40), 0.8), found(B, 0.7)],
        numbers(1, ar1=F(1, 2), ar10=1),
        "the first is right, the second would be an error without the region",
    ),
    "nothing but a crowd": Case([thing(LARGE, crowd=True)], [found(A, 0.9)], NOTHING, "no object is to be found"),
    "32 × 32 pixels": Case(
        [thing((0, 0, 32, 32))], [found((0, 0, 32, 32), 0.9)], numbers(1, small=(1, 1)), "small and medium both"
    ),
    "96 × 96 pixels": Case(
        [thing((0, 0, 96, 96))], [found((0, 0, 96, 96), 0.9)], numbers(1, large=(1, 1)), "medium and large both"
    ),
    "one pixel more than 32 × 32": Case(
        [thing((0, 0, 32, 32), area=1025)], [found((0, 0, 32, 32), 0.9)], numbers(1), "medium alone"
    ),
    "one pixel more than 96 × 96": Case(
        [thing((0, 0, 96, 96), area=9217)],
        [found((0, 0, 96, 96), 0.9)],
        numbers(1, medium=NONE, large=(1, 1)),
        "large alone",
    ),
    "the stated area decides": Case(
        [thing(A, area=900)], [found(A, 0.9)], numbers(1, small=(1, 1), medium=NONE), "900 pixels of a shape are small"
    ),
    "an error of another size": Case(
        [thing(SMALL)],
        [found((0, 0, 100, 100), 0.9), found(SMALL, 0.8)],
        numbers(F(1, 2), ar1=0, ar10=1, small=(1, 1), medium=NONE),
        "among the small, a large error is set aside",
    ),
    "objects of two sizes": Case(
        [thing(A), thing(SMALL)],
        [found(FAR, 0.95), found(A, 0.9), found(SMALL, 0.8)],
        numbers(F(2, 3), ar1=0, ar10=1, small=(1, 1), medium=(F(1, 2), 1)),
        "all: 2 of 3 read; medium: the error and A; small: neither",
    ),
    "11 objects": Case(
        [thing(box, area=1600) for box in row(11)],
        [found(box, 0.9) for box in row(11)],
        numbers(1, ar1=F(1, 11), ar10=F(10, 11)) | {"AR100": F(1), "ARm": F(1)},
        "1, 10 and 11 of them",
    ),
    "101 objects": Case(
        [thing(box, area=1600) for box in row(101)],
        [found(box, 0.9) for box in row(101)],
        numbers(F(100, 101), ar1=F(1, 101), ar10=F(10, 101)) | {"AR100": F(100, 101), "ARm": F(100, 101)},
        "100 answers count: recall 0.9901, the 100 recalls to 0.99",
    ),
    "right after 99 errors": Case(
        [thing(A)],
        [found(FAR, 0.9)] * 99 + [found(A, 0.1)],
        numbers(F(1, 100), ar1=0, ar10=0) | {"AR100": F(1), "ARm": F(1)},
        "the hundredth answer still counts",
    ),
    "right after 100 errors": Case(
        [thing(A)], [found(FAR, 0.9)] * 100 + [found(A, 0.1)], numbers(0), "the hundred and first does not"
    ),
    "two classes": Case(
        [thing(A), thing(B, label=1)], [found(A, 0.9), found(B, 0.8, label=1)], numbers(1), "AR1: one answer of each"
    ),
    "a class that is not there": Case(
        [thing(A)], [found(A, 0.8), found(A, 0.9, label=1)], numbers(1), "answers of a class without objects are unread"
    ),
    "a class that is not found": Case(
        [thing(A), thing(B, label=1)], [found(A, 0.9)], numbers(F(1, 2)), "the mean of 1 and 0"
    ),
    "the wrong class": Case(
        [thing(A), thing(B, label=1)],
        [found(B, 0.9), found(A, 0.8), found(B, 0.7, label=1)],
        numbers(F(3, 4), ar1=F(1, 2), ar10=1),
        "first class: an error above, 1/2; second class: 1",
    ),
    "classes of unequal numbers": Case(
        [thing(A), thing(B), thing(C), thing(FAR, label=1)],
        [found(A, 0.9), found(FAR, 0.9, label=1)],
        numbers(F(34 + 101, 202), ar1=F(2, 3)),
        "classes weigh alike: 34/101 and 1; recall 1/3 and 1",
    ),
    "answers and no objects": Case([], [found(A, 0.9)], NOTHING, "there is nothing to be right about"),
    "nothing at all": Case([], [], NOTHING, "the same"),
}


def as_annotations(things: list[TrueObject], images: int, categories: int, first_id: int = 1) -> Annotations:
    """Return the objects as a data set has them, numbered from `first_id`."""
    things = sorted(things, key=lambda each: each.image)
    return Annotations(
        categories=Categories(tuple(range(1, categories + 1)), tuple(f"class {k}" for k in range(categories))),
        folder=Path(),
        image_ids=np.arange(1, images + 1),
        file_names=np.array([f"{i}.png" for i in range(1, images + 1)]),
        sizes=np.full((images, 2), SIDE),
        starts=np.searchsorted([each.image for each in things], np.arange(1, images + 2)),
        annotation_ids=np.arange(first_id, first_id + len(things)),
        boxes_xywh=np.array([each.box_xywh for each in things], dtype=np.float64).reshape(-1, 4),
        labels=np.array([each.label for each in things], dtype=np.int64),
        areas=np.array([each.area for each in things], dtype=np.float64),
        crowd=np.array([each.crowd for each in things], dtype=bool),
    )


def as_detections(answers: list[FoundObject], images: int, categories: Categories) -> list[Detections]:
    """Return the answers as a detector gives them."""
    detections = []
    for image in range(1, images + 1):
        here = [answer for answer in answers if answer.image == image]
        boxes = torch.tensor([answer.box_xywh for answer in here], dtype=torch.float64).reshape(-1, 4)
        detections.append(
            Detections(
                boxes_xyxy=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
                scores=torch.tensor([answer.score for answer in here], dtype=torch.float64),
                labels=torch.tensor([answer.label for answer in here], dtype=torch.long),
                categories=categories,
            )
        )
    return detections


def measured(things, answers, images=2, categories=2, first_id=1) -> dict[str, float | None]:
    annotations = as_annotations(things, images, categories, first_id)
    return evaluate(annotations, as_detections(answers, images, annotations.categories)).numbers


def agree(numbers, expected, tolerance=1e-12) -> None:
    wrong = {
        name: (value, expected[name])
        for name, value in numbers.items()
        if (value is None) != (expected[name] is None)
        or (value is not None and not abs(value - float(expected[name])) <= tolerance)
    }
    assert not wrong


@pytest.mark.parametrize("name", CASES)
def test_worked_out_by_hand(name):
    case = CASES[name]
    agree(coco_numbers(case.found, case.things), case.expected)
    agree(measured(case.things, case.found), case.expected)


def test_an_annotation_id_of_0_is_an_id():
    """Pycocotools notes a match by the object's id, and takes 0 for none: a perfect answer is an error there."""
    agree(measured([thing(A)], [found(A, 0.9)], first_id=0), CASES["perfect"].expected)
    content = as_annotations([thing(A)], images=1, categories=1, first_id=0).to_coco()
    agree(twelve(by_pycocotools(content, results([found(A, 0.9)]))), CASES["nothing found"].expected)


def test_annotation_ids_used_twice_are_refused(tmp_path):
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "1.png")
    content = as_annotations([thing(A), thing(B)], 1, 1).to_coco()
    for entry in content["annotations"]:
        entry["id"] = 7
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="annotation ids used more than once: 7"):
        read_coco(tmp_path / "train.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["score", "box"])
def test_what_is_no_number_is_refused(value, where):
    """pycocotools counts an infinite score, and sorts nan anywhere."""
    broken = found(A, value) if where == "score" else found((value, 0, 40, 40), 0.9)
    with pytest.raises(InputError, match="image 1: a detection's box or score is nan or infinite"):
        measured([thing(A)], [broken, found(A, 0.5)])


def compare_sets(seed: int, number: int) -> None:
    """Compare lucidetr's evaluation and pycocotools on so many random sets; what differs names its own seed."""
    random = np.random.default_rng(seed)
    for i in range(number):
        own, images, categories = (int(random.integers(most)) for most in (2**32, 5, 3))
        images, categories = images + 1, categories + 1
        answers, things = scene(own, images, categories, int(random.integers(9)), int(random.integers(1, 4)))
        if not answers or not things:  # pycocotools cannot read these
            continue
        expected = witness("pycocotools", answers, things, images, categories)
        try:
            agree(measured(things, answers, images, categories), expected)
        except AssertionError as error:
            error.add_note(f"set {i} of seed {seed}: scene({own}, {images}, {categories}, …)")
            raise


SETS = [(0, 100), pytest.param(1, 1000, marks=pytest.mark.slow), pytest.param(2, 20_000, marks=pytest.mark.record)]


@pytest.mark.parametrize(("seed", "number"), SETS, ids=["100", "1000", "20000"])
def test_random_sets_against_pycocotools(seed, number):
    compare_sets(seed, number)
