"""COCO's numbers: equal to pycocotools on random sets, right where it is wrong or crashes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coco_tools import by_pycocotools, twelve
from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import NUMBERS, Metrics, evaluate
from lucidetr.evaluation.crowds import Group
from lucidetr.evaluation.detect import speak, strangers
from lucidetr.evaluation.table import print_crowds, print_metrics
from lucidetr.structures import Detections


def make_set(seed, images=6):
    """Return random annotations with crowds, empty images, gaps in the ids and boxes of every size, and detections
    near them, with ties in score and more than 100 in one image."""
    random = np.random.default_rng(seed)
    categories = Categories(ids=(2, 5, 9), names=("a", "b", "c"))
    counts = random.integers(0, 7, images)
    total = int(counts.sum())
    sides = random.choice([8.0, 31.9, 32.0, 60.0, 96.0, 130.0], (total, 2))
    boxes = np.concatenate([random.integers(0, 300, (total, 2)).astype(float), sides], 1)
    annotations = Annotations(
        categories=categories,
        folder=Path("."),
        image_ids=np.sort(random.choice(1000, images, replace=False)),
        file_names=np.array([f"{i}.jpg" for i in range(images)]),
        sizes=np.full((images, 2), 512),
        starts=np.concatenate([[0], np.cumsum(counts)]),
        annotation_ids=np.arange(total) + 1,
        boxes_xywh=boxes,
        labels=random.integers(0, 3, total),
        areas=boxes[:, 2] * boxes[:, 3] * random.choice([1.0, 0.7], total),
        crowd=random.random(total) < 0.15,
    )
    found = []
    for index in range(images):
        number = 120 if index == 0 else int(random.integers(0, 12))
        rows = annotations.rows(index)
        near = boxes[rows][random.integers(0, max(counts[index], 1), number)] if counts[index] else np.ones((number, 4))
        near = near + random.normal(0, 6, (number, 4)) * (random.random((number, 1)) < 0.8)
        near[:, 2:] = near[:, 2:].clip(2)
        corners = np.concatenate([near[:, :2], near[:, :2] + near[:, 2:]], 1)
        found.append(
            Detections(
                boxes_xyxy=torch.from_numpy(corners),
                scores=torch.from_numpy(random.integers(1, 20, number) / 20),
                labels=torch.from_numpy(random.integers(0, 3, number)),
                categories=categories,
            )
        )
    return annotations, found


@pytest.mark.parametrize("seed", range(25))
def test_equal_to_pycocotools_on_random_sets(seed):
    annotations, found = make_set(seed)
    rows = [row for i, each in zip(annotations.image_ids.tolist(), found, strict=True) for row in each.to_coco(i)]
    mine, theirs = evaluate(annotations, found), by_pycocotools(annotations.to_coco(), rows)
    assert mine.numbers == pytest.approx(twelve(theirs), abs=1e-12)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_allclose(getattr(mine, name), theirs.eval[name], rtol=0, atol=1e-12)
    for k, name in enumerate(annotations.categories.names):
        there = theirs.eval["precision"][:, :, k, 0, 2]
        assert mine.per_class[name]["AP"] == pytest.approx(there[there > -1].mean() if (there > -1).any() else None)


def test_ids_that_no_double_tells_apart_are_told_apart():
    """Timestamps and hashes, above 2⁵³, as they are common as ids."""
    annotations, found = make_set(3)
    high = 2**61
    others = replace(
        annotations,
        image_ids=high + np.arange(len(annotations)),
        categories=Categories(ids=(high, high + 1, high + 2), names=("a", "b", "c")),
    )
    theirs = [replace(each, categories=others.categories) for each in found]
    assert evaluate(others, theirs).numbers == evaluate(annotations, found).numbers


def test_categories_keep_their_own_numbers_whatever_the_order_of_their_ids():
    annotations, found = make_set(3)
    turned = Categories(ids=(9, 5, 2), names=("a", "b", "c"))
    theirs = [replace(each, categories=turned) for each in found]
    assert evaluate(replace(annotations, categories=turned), theirs).per_class == evaluate(annotations, found).per_class


def nothing(annotations):
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), annotations.categories)
    return [empty] * len(annotations)


def test_nothing_detected_is_zero_and_no_crash():
    annotations, _ = make_set(1)
    metrics = evaluate(annotations, nothing(annotations))
    assert {metrics.numbers[n] for n in NUMBERS} <= {0.0, None}
    assert metrics.average_precision == 0
    assert metrics.detections == 0


def test_no_objects_at_all_is_said_and_no_number_is_made_up():
    annotations, found = make_set(1)
    empty = annotations.subset(np.flatnonzero(np.diff(annotations.starts) == 0))
    if not len(empty):
        pytest.fail("the random set has no empty image; take another seed")
    metrics = evaluate(empty, found[: len(empty)])
    assert set(metrics.numbers.values()) == {None}
    assert metrics.average_precision == 0


def test_the_truth_itself_has_an_average_precision_of_one():
    annotations, _ = make_set(2)
    perfect = []
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        boxes = torch.from_numpy(annotations.boxes_xywh[rows])[~annotations.crowd[rows]]
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        labels = torch.from_numpy(annotations.labels[rows][~annotations.crowd[rows]])
        perfect.append(Detections(corners, torch.ones(len(labels)), labels, annotations.categories))
    metrics = evaluate(annotations, perfect)
    assert metrics.numbers["AP"] == pytest.approx(1)
    assert metrics.objects == int((~annotations.crowd).sum())


def test_predictions_for_other_images_are_refused():
    annotations, found = make_set(1)
    with pytest.raises(InputError, match="5 images were predicted, 6 are to be evaluated"):
        evaluate(annotations, found[:5])
    strange = Categories(ids=(77,), names=("z",))
    odd = [Detections(torch.ones(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.long), strange)] * 6
    with pytest.raises(InputError, match=r"category id 77; the data set knows \[2, 5, 9\]"):
        evaluate(annotations, odd)


def test_a_model_with_more_classes_speaks_the_data_sets_names():
    mine = Categories(ids=(1, 2, 3), names=("dog", "cat", "cow"))
    theirs = Categories(ids=(10, 20), names=("cow", "dog"))
    found = [Detections(torch.rand(3, 4), torch.rand(3), torch.tensor([0, 1, 2]), mine)]
    spoken = speak(found, mine, theirs)[0]
    assert spoken.names == ["dog", "cow"]
    assert spoken.category_ids == [20, 10]
    with pytest.raises(InputError, match="no category has the same name"):
        speak(found, mine, Categories(ids=(1,), names=("horse",)))


def test_categories_that_only_one_side_knows_are_said():
    """Of the data set's only what occurs in it: cow does not."""
    mine, theirs = Categories((1, 2), ("cat", "Dog")), Categories((1, 2, 3), ("cat", "dog", "cow"))
    pictures = Pictures(np.array([1]), np.array(["a.png"]), np.array([[30, 40]]))
    objects = Objects.numbered(np.zeros(2, dtype=int), np.array([[1.0, 2.0, 3.0, 4.0]] * 2), [0, 1])
    truth = gather(theirs, Path("."), pictures, objects, np.ones(2, dtype=bool))
    assert strangers(mine, truth) == [
        "warning: the model does not know dog, which is in the data: its AP will be 0",
        "warning: the data do not know Dog, which the model finds: that is left out",
    ]
    assert strangers(theirs, truth) == []
    with pytest.raises(InputError, match="no category has the same name"):
        strangers(Categories((1,), ("horse",)), truth)


def test_names_are_printed_as_they_are(capsys):
    names = ["a[/b]", "cell [old]", "[red]x[/red]", ":smile:"]
    row = {"AP": 0.5, "AP50": 0.5, "AR100": 0.5, "objects": 1}
    nothing = np.zeros(0)
    print_metrics(Metrics({}, dict.fromkeys(names, row), 1, 4, 4, nothing, nothing, nothing), "[set] :cat: val")
    said = capsys.readouterr().out
    assert [name for name in [*names, "[set] :cat: val: 1 images"] if name not in said] == []


def test_where_nothing_was_said_there_is_no_precision(capsys):
    print_crowds([Group(fewest=1, most=3, images=2, objects=4, found=0, false=0)], 0.25)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "to", "3", "2", "4", "0.000", "–"]
