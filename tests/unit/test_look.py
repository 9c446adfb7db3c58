"""What the page is told of a model's inside is what the microscope sees, in the picture's own pixels."""

import base64
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lucid_tools import PAPER, TINY, off_start
from lucidetr.boxes import iou
from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, LossConfig, ModelCard
from lucidetr.data.preprocessing import prepare
from lucidetr.deployment.detector import Detector
from lucidetr.deployment.page.look import look_json, point_json
from lucidetr.deployment.page.usual import usual_json
from lucidetr.errors import InputError
from lucidetr.inspection.microscope import look_at

CATEGORIES = Categories(ids=(3, 7, 11), names=("cat", "dog", "<b>owl</b>"))
MODELS = {
    "paper": PAPER,
    "no encoder": replace(PAPER, encoder_layers=0),
    "anchors": TINY,
    "selected": replace(TINY, queries="selected", boxes="refined_twice"),
    "scored": replace(TINY, queries="scored", box_bias="rpb"),
}
ROWS = ["layer 1", "layer 2", "layer 3"]
FIRST = {"anchors": ["start"], "selected": ["proposals"], "scored": ["proposals"]}


def build(name):
    """Return a detector whose parameters are all off their start."""
    model = off_start(MODELS[name])
    card = ModelCard(model=MODELS[name], images=ImageConfig(size=64, max_size=96), categories=CATEGORIES, recipe=name)
    return Detector(model, card, "cpu", "fp32")


def picture(height=100, width=150, seed=0):
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def decoded(heat, grid):
    """Return a map as it was before it became bytes; they are right to half a step of 255."""
    cells = np.frombuffer(base64.b64decode(heat["cells"], validate=True), np.uint8)
    return cells.reshape(grid["height"], grid["width"]) * (heat["largest"] / 255)


@pytest.fixture(scope="module", params=MODELS)
def looked(request):
    detector = build(request.param)
    view = look_at(detector.model, detector.card, prepare(picture(), detector.card.images), LossConfig())
    return request.param, detector, view, look_json(detector, picture())


def test_the_rows_are_what_the_queries_start_from_and_the_layers(looked):
    name, _, view, said = looked
    assert said["rows"] == FIRST.get(name, []) + ROWS
    assert said["ranked"] == MODELS[name].selects
    assert said["image"] == {"width": 150, "height": 100}
    assert said["num_queries"] == view.logits.shape[1]
    for each in said["queries"]:
        assert len(each["scores"]) == len(each["boxes_xyxy"]) == len(said["rows"])
        assert (each["scores"][0] is None) == (name == "anchors")


def test_the_last_box_and_score_are_those_that_predict_says(looked):
    _, detector, _, said = looked
    found = detector.predict(picture())
    assert said["queries"]
    scores = [each["score"] for each in said["queries"]]
    assert scores == sorted(scores, reverse=True)
    for each in said["queries"]:
        assert each["score"] == each["scores"][-1]
        same = (found.scores - each["score"]).abs() + (1 - iou(found.boxes_xyxy, torch.tensor(each["boxes_xyxy"][-1:])))
        best = int(same.argmin())
        assert same[best] < 1e-3
        assert (found.names[best], found.category_ids[best]) == (each["name"], each["category_id"])


def test_boxes_and_scores_of_every_layer_are_the_microscope_s_in_pixels(looked):
    _, _, view, said = looked
    extra = len(said["rows"]) - len(view.logits)
    for each in said["queries"]:
        for row, (box, score) in enumerate(zip(each["boxes_xyxy"], each["scores"], strict=True)):
            whole = view.reference_cxcywh[0] if row < extra else view.boxes_cxcywh[row - extra]
            cx, cy, w, h = whole[each["query"]]
            expected = [(cx - w / 2) * 150, (cy - h / 2) * 100, (cx + w / 2) * 150, (cy + h / 2) * 100]
            np.testing.assert_allclose(box, expected, rtol=1e-5, atol=1e-3)
            if score is not None:
                logits = torch.from_numpy(view.logits[row - extra, each["query"]])
                classes = logits.softmax(-1) if len(logits) > 3 else logits.sigmoid()
                assert score == pytest.approx(classes[CATEGORIES.names.index(each["name"])].item(), abs=1e-5)


def test_attention_is_the_microscope_s_map_for_map(looked):
    _, _, view, said = looked
    assert (said["grid"]["height"], said["grid"]["width"]) == view.memory_grid
    for each in said["queries"]:
        assert len(each["attention"]) == 3
        for layer, heads in enumerate(each["attention"]):
            assert len(heads) == 2
            for head, heat in enumerate(heads):
                exact = view.cross_attention[layer, head, each["query"]].reshape(view.memory_grid)
                assert heat["largest"] == pytest.approx(exact.max())
                np.testing.assert_allclose(decoded(heat, said["grid"]), exact, atol=exact.max() / 509)


def test_only_so_many_queries_are_kept_and_three_where_none_is_sure(monkeypatch):
    detector = build("paper")
    view = look_at(detector.model, detector.card, prepare(picture(), detector.card.images), LossConfig())
    monkeypatch.setattr("lucidetr.deployment.page.look.SCORE", 0.0)
    assert len(look_json(detector, picture())["queries"]) == 7
    monkeypatch.setattr("lucidetr.deployment.page.look.MOST", 4)
    kept = [each["query"] for each in look_json(detector, picture())["queries"]]
    assert kept == np.argsort(-view.scores[-1], kind="stable")[:4].tolist()
    monkeypatch.setattr("lucidetr.deployment.page.look.SCORE", 1.0)
    assert len(look_json(detector, picture())["queries"]) == 3


def test_a_point_s_map_is_the_mean_of_the_heads_of_its_token(looked):
    name, detector, view, _ = looked
    if name == "no encoder":
        with pytest.raises(InputError, match="no encoder layers"):
            point_json(detector, picture(), 0.5, 0.5)
        return
    rows, columns = view.encoder_grid
    for x, y, row, column in [(0.0, 0.0, 0, 0), (1.0, 1.0, rows - 1, columns - 1), (0.6, 0.3, None, None)]:
        said = point_json(detector, picture(), x, y)
        row = int(y * rows) if row is None else row
        column = int(x * columns) if column is None else column
        assert len(said["layers"]) == len(view.encoder_attention)
        for layer, heat in enumerate(said["layers"]):
            exact = view.encoder_attention[layer].mean(0)[row * columns + column].reshape(rows, columns)
            np.testing.assert_allclose(decoded(heat, said["grid"]), exact, atol=exact.max() / 509)


@pytest.mark.parametrize(("x", "y"), [(-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_a_point_outside_of_the_picture_is_refused(x, y):
    with pytest.raises(InputError, match="fractions of the picture"):
        point_json(build("paper"), picture(), x, y)


def test_an_exported_model_has_no_inside():
    detector = build("paper")
    detector.model = nn.Identity()
    for ask in (look_json, lambda *given: point_json(*given, 0.5, 0.5)):
        with pytest.raises(InputError, match="no inside to look into"):
            ask(detector, picture())
    with pytest.raises(InputError, match="no inside to look into"):
        usual_json(detector, [picture()])


@pytest.mark.parametrize("name", ["paper", "selected"])
def test_the_usual_places_are_the_last_boxes_over_the_pictures(name):
    detector = build(name)
    pictures = [picture(seed=seed) for seed in range(3)]
    places = usual_json(detector, iter(pictures), most=2)
    assert list(places) == [str(query) for query in range(MODELS[name].num_queries)]
    for i, each in enumerate(pictures[:2]):
        view = look_at(detector.model, detector.card, prepare(each, detector.card.images), LossConfig())
        said = np.array([boxes[i] for boxes in places.values()])
        np.testing.assert_allclose(said, view.boxes_cxcywh[-1], atol=1e-3)
    assert all(len(boxes) == 2 for boxes in places.values())
