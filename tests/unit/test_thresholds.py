"""Thresholds by hand: the best F1 with ties, crowds and nothing found, kept, read and asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.errors import InputError
from lucidetr.evaluation.errors import best_threshold
from lucidetr.evaluation.thresholds import (
    BEST,
    FILE,
    least_scores,
    read_thresholds,
    say,
    split_names,
    thresholds_file,
    to_json,
)
from lucidetr.structures import Detections
from lucidetr.training.checkpoint import MODEL_FILES

CATEGORIES = Categories(ids=(3, 7), names=("a", "b"))
A, B = 0, 1


def truth(*things) -> Annotations:
    """Return the annotations of one picture: (label, left, crowd) of 20 × 20 boxes."""
    number = len(things)
    boxes_xywh = np.array([[left, 0, 20, 20] for _, left, _ in things], dtype=np.float64).reshape(-1, 4)
    objects = Objects.numbered(np.zeros(number, dtype=np.int64), boxes_xywh, [label for label, _, _ in things])
    objects = objects._replace(crowd=np.array([crowd for _, _, crowd in things], dtype=bool))
    images = Pictures(np.array([1]), np.array(["1.png"]), np.array([[400, 400]]))
    return gather(CATEGORIES, Path("."), images, objects, np.ones(number, dtype=bool))


def found(*things) -> list[Detections]:
    """Return detections of one picture: (label, left, score) of 20 × 20 boxes."""
    boxes = torch.tensor([[left, 0, left + 20, 20] for _, left, _ in things], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([score for _, _, score in things], dtype=torch.float32)
    labels = torch.tensor([label for label, _, _ in things], dtype=torch.long)
    return [Detections(boxes, scores, labels, CATEGORIES)]


def test_the_best_f1_by_hand():
    annotations = truth((A, 0, False), (A, 50, False), (B, 100, False))
    # kept from the top: right 1/1 of 3, right 2/2, wrong 2/3, right 3/4: F1 = 2/4, 4/5, 4/6, 6/7
    said = found((A, 0, 0.9), (A, 50, 0.7), (A, 200, 0.5), (B, 100, 0.25), (B, 300, 0.05))
    best = best_threshold(annotations, said)
    assert best.overall.score == pytest.approx((0.25 + 0.05) / 2)
    assert (best.overall.f1, best.overall.precision, best.overall.recall) == pytest.approx((6 / 7, 3 / 4, 1.0))
    assert best.per_class["a"].score == pytest.approx(0.6)
    assert best.per_class["a"].f1 == best.per_class["b"].f1 == 1.0
    assert say(best) == "best threshold: 0.150, F1 0.857 (precision 0.750, recall 1.000) at an IoU of 0.5"


def test_of_equal_f1_the_higher_threshold_and_equal_scores_together():
    # 1 right of 2 objects: F1 2/3; three wrong ones of one score and a right one: 4/6
    annotations = truth((A, 0, False), (A, 50, False))
    said = found((A, 0, 0.9), (A, 200, 0.5), (A, 250, 0.5), (A, 50, 0.5))
    assert best_threshold(annotations, said).overall.score == pytest.approx(0.7)
    said = found((A, 0, 0.75), (A, 200, 0.75))
    best = best_threshold(annotations, said).overall
    assert (best.score, best.f1) == (0.75, 0.5)
    assert len(said[0].above(torch.tensor([best.score] * 2, dtype=torch.float64))) == 2


def test_detections_in_a_crowd_count_neither_for_nor_against():
    objects = [(A, 0, False)]
    said = found((A, 0, 0.5), (A, 50, 0.9))
    assert best_threshold(truth(*objects), said).overall.precision == 0.5
    best = best_threshold(truth(*objects, (A, 50, True)), said).overall
    assert (best.f1, best.score) == (1.0, 0.5)


def test_nothing_found_or_nothing_there_has_no_best_threshold():
    for annotations, said in ((truth((A, 0, False)), found()), (truth(), found((A, 0, 0.9)))):
        best = best_threshold(annotations, said)
        assert best.overall is None
        assert to_json(best, "set val") is None
        assert say(best) == "best threshold: none, nothing is right at an IoU of 0.5"


def test_kept_and_read_again(tmp_path):
    best = best_threshold(truth((A, 0, False), (A, 50, False)), found((A, 0, 0.9), (A, 50, 0.3), (B, 200, 0.8)))
    (tmp_path / FILE).write_text(to_json(best, "set val"))
    kept = read_thresholds(tmp_path)
    assert (kept.data, kept.iou, kept.overall) == ("set val", 0.5, best.overall)
    assert kept.per_class == {"a": best.per_class["a"]}
    # b is never right: it has the threshold of all
    assert least_scores("best", CATEGORIES, tmp_path).tolist() == [best.per_class["a"].score, best.overall.score]


def test_each_model_has_its_own(tmp_path):
    assert MODEL_FILES[0] == BEST
    for name, score in ((BEST, 0.9), ("last.safetensors", 0.7), ("last.onnx", 0.5)):
        best = best_threshold(truth((A, 0, False)), found((A, 0, score)))
        thresholds_file(tmp_path / name).write_text(to_json(best, "set val"))
    scores = [least_scores("best", CATEGORIES, tmp_path / name)[A].item() for name in ("", *MODEL_FILES, "last.onnx")]
    assert scores == pytest.approx([0.9, 0.9, 0.7, 0.5])
    with pytest.raises(
        InputError, match=r"a\.safetensors\.thresholds\.json: no such file; `lucidetr eval .*/a\.safetens"
    ):
        least_scores("best", CATEGORIES, tmp_path / "a.safetensors")


def test_a_missing_or_damaged_file_says_how_it_is_made(tmp_path):
    with pytest.raises(InputError, match=r"thresholds\.json: no such file; `lucidetr eval .*` writes it"):
        least_scores("best", CATEGORIES, tmp_path)
    for content in ("{", "[]", "\xff", json.dumps({"iou": 0.5, "data": "x", "overall": None, "per_class": {}})):
        (tmp_path / FILE).write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError, match="write it anew"):
            least_scores("best", CATEGORIES, tmp_path)


@pytest.mark.parametrize(
    ("text", "least"),
    [("0.25", [0.25, 0.25]), ("0", [0, 0]), ("a=0.4", [0.4, 0.5]), ("a=0.4, b=0.75", [0.4, 0.75])],
)
def test_numbers_for_all_or_for_each(text, least):
    assert least_scores(text, CATEGORIES, Path()).tolist() == least


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2", "--threshold 2: choose at least 0 and at most 1"),
        ("nan", "--threshold nan: choose at least 0"),
        ("a=-1", "--threshold a=-1: choose at least 0"),
        ("bset", "--threshold bset: give a number from 0 to 1, best, or NAME=NUMBER"),
        ("a=x", "--threshold a=x: give a number"),
        ("a=0.5,0.3", "'0.3' is not NAME=NUMBER"),
        ("aa=0.5", "unknown category 'aa': did you mean a? Known: a, b"),
        ("", "--threshold : give a number"),
    ],
)
def test_mistakes_are_refused_with_what_is_legal(text, said):
    with pytest.raises(InputError) as error:
        least_scores(text, CATEGORIES, Path())
    assert said in str(error.value)


def test_a_name_that_holds_a_comma_stands_in_quotes():
    categories = Categories(ids=(1, 2), names=("car, red", "bus"))
    assert least_scores('"car, red=0.4",bus=0.3', categories, Path()).tolist() == [0.4, 0.3]
    with pytest.raises(InputError, match="'car' is not NAME=NUMBER"):
        least_scores("car, red=0.4", categories, Path())


@pytest.mark.parametrize("text", ["a=0.4\nb=0.5", "a" * 200_000, "a\rb=0.5"])
def test_what_is_no_line_of_names_is_refused(text):
    with pytest.raises(InputError, match="cannot be split at its commas"):
        split_names(text)


def test_other_categories_never_count():
    assert least_scores("0.25", CATEGORIES, Path(), only=["b"]).tolist() == [float("inf"), 0.25]
    with pytest.raises(InputError, match="unknown category 'c': "):
        least_scores("0.25", CATEGORIES, Path(), only=["c"])
