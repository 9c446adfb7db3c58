"""What is wrong: planted errors of every kind are counted as that kind and cost what arithmetic says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lucid_tools import TINY
from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard, TrainConfig
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.data.dataset import Dataset, open_dataset
from lucidetr.errors import InputError
from lucidetr.evaluation import errors
from lucidetr.evaluation.coco import evaluate
from lucidetr.evaluation.crowds import by_crowd
from lucidetr.inspection import errors as report
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import as_svg
from lucidetr.models.detr import DETR
from lucidetr.structures import Detections

CATEGORIES = Categories(ids=(3, 7), names=("a", "b"))
SIDE = 400


def truth(*pictures, categories=CATEGORIES) -> Annotations:
    """Return annotations; a picture is a list of (label, left, top) or (label, left, top, crowd) of 20 × 20 boxes."""
    flat = [(index, *thing) for index, picture in enumerate(pictures) for thing in picture]
    number = len(pictures)
    image = np.array([thing[0] for thing in flat], dtype=np.int64)
    boxes_xywh = np.array([[thing[2], thing[3], 20, 20] for thing in flat], dtype=np.float64).reshape(-1, 4)
    objects = Objects.numbered(image, boxes_xywh, [thing[1] for thing in flat])
    objects = objects._replace(crowd=np.array([len(thing) > 4 for thing in flat], dtype=bool))
    names = np.array([f"{i}.png" for i in range(number)])
    images = Pictures(np.arange(number) + 10, names, np.full((number, 2), SIDE))
    return gather(categories, Path("."), images, objects, np.ones(len(flat), dtype=bool))


def found(*things, categories=CATEGORIES) -> Detections:
    """Return detections of one picture: (label, left, top, score) of 20 × 20 boxes."""
    boxes = torch.tensor([[x, y, x + 20, y + 20] for _, x, y, _ in things], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([thing[0] for thing in things], dtype=torch.long)
    return Detections(boxes, torch.tensor([thing[3] for thing in things], dtype=torch.float32), labels, categories)


A, B = 0, 1
PLANTED = truth([(A, 0, 0), (A, 50, 0), (A, 100, 0), (A, 150, 0), (A, 200, 0), (A, 250, 0), (B, 0, 100)])
SAID = found(
    (A, 0, 0, 0.95),  # right
    (A, 0, 0, 0.9),  # duplicate
    (B, 50, 0, 0.85),  # class
    (A, 110, 0, 0.8),  # place: IoU 1/3
    (B, 210, 0, 0.75),  # both: IoU 1/3 with an a
    (A, 300, 300, 0.7),  # background
    (A, 250, 0, 0.6),  # right
    (B, 0, 100, 0.5),  # right
)  # missed: the a at 150 and the a at 200


def test_every_planted_error_is_counted_as_its_kind():
    kinds = errors.error_kinds(PLANTED, [SAID])
    assert kinds.counts == {"class": 1, "place": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 2}
    judged = errors.judge(errors.compare(PLANTED, [SAID])[0])
    order = ["right", "duplicate", "class", "place", "both", "background", "right", "right"]
    assert judged.kinds.tolist() == order
    assert judged.objects.tolist() == [0, -1, 1, 2, -1, -1, 5, 6]
    assert judged.missed.nonzero()[0].tolist() == [3, 4]


def test_mending_one_kind_gains_what_arithmetic_says():
    """COCO's 101 recalls: 17 of them up to 1/6, 17 more up to 2/6 and again up to 3/6; 26 up to 1/4, 25 more to 2/4."""
    a, b = (17 + 17 * 2 / 5) / 101, 1 / 3
    mended = {
        "class": ((17 + 17 * 2 / 3 + 17 * 3 / 6) / 101, 1 / 2),
        "place": ((17 + 17 * 2 / 3 + 17 * 3 / 5) / 101, b),
        "both": (a, 1 / 2),
        "duplicate": ((17 + 17 * 2 / 4) / 101, b),
        "background": ((17 + 17 * 2 / 4) / 101, b),
        "missed": ((26 + 25 * 2 / 5) / 101, b),
    }
    kinds = errors.error_kinds(PLANTED, [SAID])
    assert kinds.ap50 == pytest.approx((a + b) / 2)
    assert kinds.gains == pytest.approx({kind: (x + y) / 2 - (a + b) / 2 for kind, (x, y) in mended.items()})


def test_of_two_mended_for_one_object_only_the_better_stays():
    annotations = truth([(A, 0, 0)])
    twice = found((A, 10, 0, 0.9), (A, 0, 0, 0.8), (A, 0, 11, 0.7))  # place, right, place
    kinds = errors.error_kinds(annotations, [twice])
    assert kinds.counts["place"] == 2
    assert kinds.ap50 == pytest.approx(1 / 2)
    assert kinds.gains["place"] == pytest.approx(1 / 2)


def test_a_perfect_detector_has_no_errors():
    annotations = truth([(A, 0, 0), (B, 50, 50)], [])
    kinds = errors.error_kinds(annotations, [found((A, 0, 0, 0.9), (B, 50, 50, 0.8)), found()])
    assert kinds.ap50 == pytest.approx(1)
    assert set(kinds.counts.values()) == {0}
    assert set(kinds.gains.values()) == {0.0}


def test_crowds_are_ignored_as_coco_does():
    annotations = truth([(A, 0, 0), (A, 100, 100, "crowd")])
    said = [found((A, 0, 0, 0.6), (A, 102, 100, 0.9), (B, 100, 100, 0.8))]  # the b lies in a crowd of others
    kinds = errors.error_kinds(annotations, said)
    assert kinds.counts == {"class": 0, "place": 0, "both": 0, "duplicate": 0, "background": 1, "missed": 0}
    assert kinds.ap50 == pytest.approx(1)
    assert errors.confusion(annotations, said).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert errors.hardest(annotations, said) == [errors.Hard(0, missed=0, false=1)]
    assert errors.calibration(annotations, said).counts.sum() == 2


def random_set(seed, images=8):
    random = np.random.default_rng(seed)
    pictures, said = [], []
    for _ in range(images):
        things = [(int(random.integers(2)), *random.integers(0, 60, 2).tolist()) for _ in range(random.integers(6))]
        pictures.append([(*thing, "crowd") if random.random() < 0.2 else thing for thing in things])
        near = [things[random.integers(len(things))] if things else (A, 9, 9) for _ in range(random.integers(130))]
        scores = np.sort(random.random(len(near)))
        said.append(
            found(
                *(
                    (label, x + random.normal(0, 3), y + random.normal(0, 3), score)
                    for (label, x, y), score in zip(near, scores, strict=True)
                )
            )
        )
    return truth(*pictures), said


@pytest.mark.parametrize("seed", range(8))
def test_what_is_judged_right_makes_the_same_ap50_as_coco(seed):
    """With crowds, crowded pictures, more than 100 detections of a category, and the weakest first."""
    annotations, said = random_set(seed)
    compared = errors.compare(annotations, said)
    judged = [errors.judge(each) for each in compared]
    precisions = []
    for label in (A, B):
        objects = int(((annotations.labels == label) & ~annotations.crowd).sum())
        mine = [
            (score, kind == errors.RIGHT)
            for each, verdict in zip(compared, judged, strict=True)
            for score, kind, said_label in zip(each.scores, verdict.kinds, each.labels, strict=True)
            if said_label == label and kind != errors.ASIDE
        ]
        right = np.array([hit for _, hit in sorted(mine, key=lambda one: -one[0])])
        hits = right.cumsum()
        recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
        at = [precision[recall >= point].max(initial=0) for point in np.linspace(0, 1, 101)]
        precisions.append(np.mean(at))
    assert errors.error_kinds(annotations, said).ap50 == pytest.approx(np.mean(precisions), abs=1e-9)
    assert evaluate(annotations, said).numbers["AP50"] == pytest.approx(np.mean(precisions), abs=1e-9)


def test_the_confusion_matrix_matches_best_first_whatever_the_category():
    matrix = errors.confusion(PLANTED, [SAID])
    assert matrix.tolist() == [[2, 1, 3], [0, 1, 0], [3, 1, 0]]  # true a, true b, background
    assert errors.confusion(PLANTED, [SAID], score=0.88).tolist() == [[1, 0, 5], [0, 0, 1], [1, 0, 0]]


def many(right, wrong, score):
    """Return a set of that many right and wrong detections, one in each picture, all of one score."""
    annotations = truth(*([(A, 0, 0)] for _ in range(right + wrong)))
    return annotations, [found((A, 0 if i < right else 200, 0, score)) for i in range(right + wrong)]


@pytest.mark.parametrize(
    ("right", "wrong", "score", "lean", "says"),
    [
        (5, 5, 0.92, 0.42, "over-confident: scores are 0.42 above"),
        (10, 0, 0.31, -0.69, "under-confident: scores are 0.69 below"),
        (9, 1, 0.95, 0.05, None),
    ],
)
def test_planted_confidence_has_the_error_of_arithmetic(right, wrong, score, lean, says):
    measured = errors.calibration(*many(right, wrong, score))
    assert measured.lean == pytest.approx(lean)
    assert measured.error == pytest.approx(abs(lean))
    used = int(score * 10)
    assert measured.counts.tolist() == [10 if place == used else 0 for place in range(10)]
    assert measured.right[used] == pytest.approx(right / 10)
    assert np.isnan(measured.scores[(used + 1) % 10])
    warnings = report.calibration_warnings(measured)
    assert (len(warnings), says or "") == (1, says) if says else warnings == ()
    if says:
        assert says in warnings[0]


def test_errors_that_cancel_out_are_errors_all_the_same():
    high, low = many(0, 4, 0.9)[1], many(4, 0, 0.1)[1]
    annotations = truth(*([(A, 0, 0)] for _ in range(8)))
    measured = errors.calibration(annotations, high + low)
    assert (measured.error, measured.lean) == pytest.approx((0.9, 0.0), abs=1e-6)
    assert "too high in some ranges and too low in others" in report.calibration_warnings(measured)[0]


def test_weak_scores_do_not_outweigh_the_others():
    annotations, said = many(1, 0, 0.9)
    more = [found((A, 0, 0, 0.9), *((A, 200, 200, 0.01) for _ in range(50)))]
    assert errors.calibration(annotations, more).error == pytest.approx(errors.calibration(annotations, said).error)


def test_the_hardest_pictures_come_first():
    annotations = truth([(A, 0, 0)], [(A, 0, 0), (A, 50, 0)], [])
    said = [found((A, 0, 0, 0.9)), found((B, 0, 0, 0.9)), found((A, 0, 0, 0.9), (A, 99, 0, 0.2))]
    assert errors.hardest(annotations, said) == [
        errors.Hard(1, missed=2, false=1),
        errors.Hard(2, missed=0, false=1),
        errors.Hard(0, missed=0, false=0),
    ]


def test_curves_are_not_a_number_where_a_category_has_no_objects():
    annotations = truth([(A, 0, 0), (A, 50, 0)])
    curves = errors.precision_recall(evaluate(annotations, [found((A, 3, 0, 0.9), (A, 200, 0, 0.8))]))
    assert curves.names == ("a", "b")
    assert curves.recalls[[0, 50, 100]].tolist() == [0, 0.5, 1]
    assert curves.at_50[0, [0, 50, 51]].tolist() == [1, 1, 0]
    assert curves.at_75[0].max() == 0  # an IoU of 17/23
    assert np.isnan(curves.at_50[1]).all()


def test_detections_of_other_images_or_categories_are_refused():
    with pytest.raises(InputError, match="2 images were predicted, 1 are to be evaluated"):
        errors.compare(PLANTED, [SAID, SAID])
    strange = Categories(ids=(3, 8), names=("a", "c"))
    with pytest.raises(InputError, match=r"category id 8; the data set knows \[3, 7\]"):
        errors.compare(PLANTED, [found((B, 0, 0, 0.5), categories=strange)])


def test_a_model_whose_labels_stand_in_another_order_is_judged_by_ids():
    turned = Categories(ids=(7, 3), names=("b", "a"))
    said = found(*((1 - label, x, y, 0.9) for label, x, y in [(A, 0, 0), (B, 0, 100)]), categories=turned)
    assert errors.confusion(PLANTED, [said]).diagonal().tolist() == [1, 1, 0]


def material(annotations, detections) -> Material:
    """Return material for the section, with what was found given."""
    pixels = torch.arange(3 * SIDE * SIDE, dtype=torch.int64).reshape(3, SIDE, SIDE).remainder(251).to(torch.uint8)
    dataset = Dataset("planted", annotations, lambda index: pixels)
    model = replace(TINY, num_classes=len(annotations.categories))
    card = ModelCard(model, ImageConfig(resize="square", size=64), annotations.categories, "lucid-xs")
    made = Material(Path("."), TrainConfig(), DETR(model).eval(), card, dataset.annotations, dataset, (0,), [], [])
    if detections is not None:
        made.__dict__["detections"] = detections
    return made


def by_name(section):
    return {figure.name: figure for figure in section.figures}


def drawn(figure):
    return as_svg(figure.chart, figure.name, figure.title)


def test_the_section_warns_of_planted_faults():
    annotations, said = many(3, 3, 0.9)
    figures = by_name(report.section(material(annotations, said)))
    assert "over-confident" in figures["calibration"].warnings[0]
    annotations = truth([(A, 0, 0), (A, 50, 0), (B, 0, 100)])
    said = [found((A, 0, 0, 0.9), (A, 0, 0, 0.8), (A, 50, 0, 0.7))]
    section = report.section(material(annotations, said))
    figures = by_name(section)
    assert "Duplicates cost 0.083 AP50" in figures["error-kinds"].warnings[0]  # a third of half the recalls, of a
    assert figures["precision-recall"].warnings == ("Never found at an IoU of 0.5: b.",)
    caption, rows = section.tables[1]
    assert "best F1" in caption
    assert rows[2:] == [["a", "0.70", "0.80", "0.67", "1.00"], ["b", "nothing is right", "", "", ""]]


def test_the_section_of_a_good_detector_warns_of_nothing():
    annotations = truth(*([(A, 0, 0), (B, 50, 50)] for _ in range(3)))
    section = report.section(material(annotations, [found((A, 0, 0, 0.97), (B, 50, 50, 0.95))] * 3))
    assert [figure.warnings for figure in section.figures] == [()] * 4  # and no worst pictures
    assert section.tables[2][1] == [["true", "said", "times"]]


def test_the_section_draws_many_categories_and_says_what_was_taken_for_what():
    names = tuple(f"kind {i}" for i in range(45))
    categories = Categories(ids=tuple(range(45)), names=names)
    annotations = truth([(k, 8 * k, 0) for k in range(45)], categories=categories)
    said = found(*((max(k, 1), 8 * k, 0, 0.9) for k in range(45)), categories=categories)
    section = report.section(material(annotations, [said]))
    assert section.tables[2][1][1] == ["kind 0", "kind 1", "1"]
    svg = drawn(by_name(section)["precision-recall"])
    assert "mean of 33 others" in svg
    assert "kind 11" in svg
    assert "kind 12<" not in svg


@pytest.mark.parametrize("detections", [None, []])
def test_an_untrained_model_and_one_that_finds_nothing_make_a_section(detections):
    dataset = open_dataset("generated:digits?size=64&digit=14-24&objects=1-3&train=1&val=6", "val")
    planted = material(dataset.annotations, None)
    planted = replace(planted, dataset=dataset)
    if detections is not None:
        planted.__dict__["detections"] = [found(categories=dataset.annotations.categories)] * len(dataset)
    section = report.section(planted)
    assert section.title == "Errors"
    assert len(section.figures) == 5
    size = sum(len(drawn(figure)) for figure in section.figures)
    assert 20_000 < size < 2_500_000


def test_names_that_matplotlib_would_misread_are_drawn_as_they_are():
    names = ("$1$ and $", "_background_")
    annotations = truth([(A, 0, 0), (B, 50, 50)], categories=Categories(ids=(3, 7), names=names))
    section = report.section(material(annotations, [found((A, 0, 0, 0.9), (B, 50, 50, 0.8))]))
    for name in ("precision-recall", "confusion"):
        svg = drawn(by_name(section)[name])
        assert [text in svg for text in names] == [True, True]


@pytest.mark.parametrize("number", [1, 12])
def test_long_names_leave_room_for_the_figures(number):
    names = tuple(f"KIND {i} OF " + "W" * 80 for i in range(number))
    categories = Categories(ids=tuple(range(number)), names=names)
    annotations = truth([(k, 30 * k, 0) for k in range(number)], categories=categories)
    said = found(*((k, 30 * k, 0, 0.9) for k in range(number)), categories=categories)
    figures = by_name(report.section(material(annotations, [said])))
    for name in ("precision-recall", "confusion"):
        svg = drawn(figures[name])  # what does not fit is a warning
        assert f"KIND 0 OF {'W' * 29}…<" in svg
        assert min(min(axes.get_window_extent().size) for axes in figures[name].chart.axes) > 100  # of 100 to the inch


def test_a_split_without_objects_says_so():
    section = report.section(material(truth([], []), [found(), found()]))
    assert section.figures == ()
    assert "no objects" in section.says


def test_what_is_found_by_the_number_of_objects():
    """Pictures with 1, 2 and 3 objects: all found, one of two missed, none of three found and a false alarm."""
    annotations = truth(
        [(0, 10, 10)],
        [(0, 10, 10), (1, 60, 60)],
        [(0, 10, 10), (0, 60, 60), (1, 110, 110)],
    )
    said = [found((0, 10, 10, 0.9)), found((0, 10, 10, 0.8)), found((1, 200, 200, 0.7), (0, 10, 10, 0.1))]
    groups = by_crowd(annotations, said, 0.1, groups=3)
    spans = [(group.fewest, group.most, group.images, group.objects) for group in groups]
    assert spans == [(1, 1, 1, 1), (2, 2, 1, 2), (3, 3, 1, 3)]
    assert groups[0].recall == groups[0].precision == 1
    assert [(group.found, group.false) for group in groups[1:]] == [(1, 0), (1, 1)]
    groups = by_crowd(annotations, said, 0.75, groups=3)
    assert [(group.found, group.false) for group in groups] == [(1, 0), (1, 0), (0, 0)]
    assert by_crowd(annotations, [found(), found(), found()], 0.5)[0].recall == 0
    assert by_crowd(truth([], []), [found(), found()], 0.5)[0].recall is None
