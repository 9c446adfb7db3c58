"""Average precision from its definition against pycocotools, faster-coco-eval and lucidetr's own evaluation."""

import contextlib
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations
from lucidetr.evaluation.coco import NUMBERS, evaluate
from lucidetr.reference.average_precision import FoundObject, TrueObject, coco_numbers
from lucidetr.structures import Detections

from .drawn import examples

SIDE = 220


def scene(
    seed: int, images: int, categories: int, most: int, repeats: int
) -> tuple[list[FoundObject], list[TrueObject]]:
    """Return random objects of all sizes with crowds, and answers that are near them, doubled, far off or missing.

    Whole pixels and scores of one digit: equal overlaps, overlaps of exactly a threshold, and equal scores.
    """
    draw = random.Random(seed)
    things, found = [], []

    def box() -> tuple[int, int, int, int]:
        largest = draw.choice([12, 60, 200])
        width, height = draw.randint(4, largest), draw.randint(4, largest)
        return draw.randint(0, SIDE - width), draw.randint(0, SIDE - height), width, height

    def near(x, y, w, h):
        shake = [draw.choice([0, 0, 0, 1, -1, 2, 5]) for _ in range(4)]
        return x + shake[0], y + shake[1], max(1, w + shake[2]), max(1, h + shake[3])

    for image in range(1, images + 1):
        for _ in range(draw.randint(0, most)):
            label, drawn = draw.randrange(categories), box()
            area = draw.choice([1.0, 1.0, 0.6]) * drawn[2] * drawn[3]
            things.append(TrueObject(image, label, drawn, area, crowd=draw.random() < 0.15))
            for _ in range(draw.randint(0, repeats)):
                named = label if draw.random() < 0.8 else draw.randrange(categories)
                found.append(FoundObject(image, named, near(*drawn), draw.randint(0, 10) / 10))
        for _ in range(draw.randint(0, repeats)):
            found.append(FoundObject(image, draw.randrange(categories), box(), draw.randint(0, 10) / 10))
    return found, things


def coco_file(things: list[TrueObject], images: int, categories: int) -> dict:
    return {
        "info": {},
        "images": [{"id": i, "width": SIDE, "height": SIDE, "file_name": f"{i}.png"} for i in range(1, images + 1)],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(categories)],
        "annotations": [
            {
                "id": number,
                "image_id": thing.image,
                "category_id": thing.label + 1,
                "bbox": list(thing.box_xywh),
                "area": thing.area,
                "iscrowd": int(thing.crowd),
            }
            for number, thing in enumerate(things, start=1)
        ],
    }


def results(found: list[FoundObject]) -> list[dict]:
    return [
        {"image_id": a.image, "category_id": a.label + 1, "bbox": list(a.box_xywh), "score": a.score} for a in found
    ]


def witness(library: str, found: list[FoundObject], things: list[TrueObject], images: int, categories: int) -> list:
    """Return the twelve numbers as an independent package counts them, None where it says −1."""
    content = coco_file(things, images, categories)
    with contextlib.redirect_stdout(io.StringIO()):
        if library == "pycocotools":
            truth = COCO()
            truth.dataset = content
            truth.createIndex()
            run = COCOeval(truth, truth.loadRes(results(found)), "bbox")
        else:
            silent = {"print_function": lambda *_: None}
            truth = FasterCOCO(content, **silent)
            run = COCOeval_faster(truth, truth.loadRes(results(found)), iouType="bbox", **silent)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if value == -1 else float(value) for value in run.stats[:12]]


def ours(found: list[FoundObject], things: list[TrueObject]) -> list:
    numbers = coco_numbers(found, things)
    assert set(numbers) == set(NUMBERS)
    return [numbers[name] for name in NUMBERS]


def same(one: list, other: list) -> None:
    assert [value is None for value in one] == [value is None for value in other]
    here, there = ([value or 0.0 for value in side] for side in (one, other))
    assert here == pytest.approx(there, abs=1e-10)


@pytest.mark.parametrize("library", ["pycocotools", "faster-coco-eval"])
@examples(25)
@given(
    seed=st.integers(0, 2**32),
    images=st.integers(1, 6),
    categories=st.integers(1, 3),
    most=st.integers(0, 8),
    repeats=st.integers(1, 3),
)
def test_random_scenes(library, seed, images, categories, most, repeats):
    found, things = scene(seed, images, categories, most, repeats)
    if found and things:
        same(ours(found, things), witness(library, found, things, images, categories))


@pytest.mark.parametrize("library", ["pycocotools", "faster-coco-eval"])
def test_more_answers_than_count(library):
    found, things = scene(3, images=2, categories=1, most=60, repeats=6)
    per_image = [sum(answer.image == image for answer in found) for image in (1, 2)]
    assert max(per_image) > 100
    same(ours(found, things), witness(library, found, things, 2, 1))


@pytest.mark.parametrize("objects", [20, 25, 100])
def test_recall_falls_on_the_points_themselves(objects):
    """Found 35 of 100: is precision at recall 0.35 counted? The package steps in floating point, and so do we."""
    things = [TrueObject(i, 0, (0, 0, 40, 40), area=1600) for i in range(1, objects + 1)]
    for hits in range(1, objects, max(1, objects // 10)):
        found = [FoundObject(i, 0, (0, 0, 40, 40), score=0.9) for i in range(1, hits + 1)]
        same(ours(found, things), witness("pycocotools", found, things, objects, 1))


@pytest.mark.parametrize("covered", range(20, 41))
def test_overlap_falls_on_the_threshold_itself(covered):
    """24 of 40 columns found are an IoU of exactly 0.6."""
    things = [TrueObject(1, 0, (0, 0, 40, 40), area=1600)]
    found = [FoundObject(1, 0, (0, 0, covered, 40), score=0.9)]
    same(ours(found, things), witness("pycocotools", found, things, 1, 1))


@examples(10)
@given(seed=st.integers(0, 2**32), nothing=st.booleans())
def test_lucidetrs_own_evaluation(seed, nothing):
    images, categories = 4, 2
    found, things = scene(seed, images, categories, most=6, repeats=0 if nothing else 2)
    found = [] if nothing else found
    things.sort(key=lambda thing: thing.image)
    names = Categories(ids=(1, 2), names=("one", "two"))
    annotations = Annotations(
        categories=names,
        folder=Path(),
        image_ids=np.arange(1, images + 1),
        file_names=np.array([f"{i}.png" for i in range(1, images + 1)]),
        sizes=np.full((images, 2), SIDE),
        starts=np.searchsorted([thing.image for thing in things], np.arange(1, images + 2)),
        annotation_ids=np.arange(len(things)),
        boxes_xywh=np.array([thing.box_xywh for thing in things], dtype=np.float64).reshape(-1, 4),
        labels=np.array([thing.label for thing in things], dtype=np.int64),
        areas=np.array([thing.area for thing in things], dtype=np.float64),
        crowd=np.array([thing.crowd for thing in things], dtype=bool),
    )
    detections = []
    for image in range(1, images + 1):
        here = [answer for answer in found if answer.image == image]
        boxes = torch.tensor([a.box_xywh for a in here], dtype=torch.float64).reshape(-1, 4)
        detections.append(
            Detections(
                boxes_xyxy=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
                scores=torch.tensor([float(a.score) for a in here], dtype=torch.float64),
                labels=torch.tensor([a.label for a in here], dtype=torch.long),
                categories=names,
            )
        )
    measured = evaluate(annotations, detections).numbers
    same(ours(found, things), [measured[name] for name in NUMBERS])
