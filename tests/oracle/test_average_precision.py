"""Average precision from its definition against pycocotools and faster-coco-eval."""

import random

import pytest
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import given
from hypothesis import strategies as st

from coco_tools import by_pycocotools, twelve
from lucidetr.reference.average_precision import FoundObject, TrueObject, coco_numbers

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


def witness(
    library: str, found: list[FoundObject], things: list[TrueObject], images: int, categories: int
) -> dict[str, float | None]:
    """Return the twelve numbers as an independent package counts them."""
    content, rows = coco_file(things, images, categories), results(found)
    if library == "pycocotools":
        return twelve(by_pycocotools(content, rows))
    silent = {"print_function": lambda *_: None}
    truth = COCO(content, **silent)
    run = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox", **silent)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return twelve(run)


def check(library: str, found: list[FoundObject], things: list[TrueObject], images: int, categories: int = 1) -> None:
    """Compare our twelve numbers with a package's."""
    expected = witness(library, found, things, images, categories)
    assert coco_numbers(found, things) == pytest.approx(expected, abs=1e-10)


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
        check(library, found, things, images, categories)


@pytest.mark.parametrize("library", ["pycocotools", "faster-coco-eval"])
def test_more_answers_than_count(library):
    found, things = scene(3, images=2, categories=1, most=60, repeats=6)
    per_image = [sum(answer.image == image for answer in found) for image in (1, 2)]
    assert max(per_image) > 100
    check(library, found, things, images=2)


@pytest.mark.parametrize("objects", [20, 25, 100])
def test_recall_falls_on_the_points_themselves(objects):
    """Found 35 of 100: is precision at recall 0.35 counted? The package steps in floating point, and so do we."""
    things = [TrueObject(i, 0, (0, 0, 40, 40), area=1600) for i in range(1, objects + 1)]
    for hits in range(1, objects, max(1, objects // 10)):
        found = [FoundObject(i, 0, (0, 0, 40, 40), score=0.9) for i in range(1, hits + 1)]
        check("pycocotools", found, things, objects)


@pytest.mark.parametrize("covered", range(20, 41))
def test_overlap_falls_on_the_threshold_itself(covered):
    """24 of 40 columns found are an IoU of exactly 0.6."""
    things = [TrueObject(1, 0, (0, 0, 40, 40), area=1600)]
    found = [FoundObject(1, 0, (0, 0, covered, 40), score=0.9)]
    check("pycocotools", found, things, images=1)
