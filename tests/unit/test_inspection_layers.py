"""Layer by layer: planted duplicates are what NMS removes, and a layer that gets worse is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lucid_tools import TINY
from lucidetr.boxes import xyxy_to_cxcywh
from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard, TrainConfig
from lucidetr.data.annotations import Objects, Pictures, gather
from lucidetr.data.dataset import Dataset, open_dataset
from lucidetr.evaluation.coco import evaluate
from lucidetr.evaluation.detect import detect
from lucidetr.inspection.layers import LayerPrecision, layer_precision, section, warn_of_layers
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import as_svg
from lucidetr.models.detr import DETR
from lucidetr.structures import Predictions

CELLS = Categories(ids=(1,), names=("cell",))
IMAGES = ImageConfig(resize="square", size=64)
FIRST, SECOND, NOTHING = [0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 60.0, 60.0], [0.0, 40.0, 10.0, 60.0]
ONCE = [(FIRST, 0.9), (SECOND, 0.8), (NOTHING, 0.1)]
TWICE = [(FIRST, 0.9), (FIRST, 0.8), (SECOND, 0.7)]
HALF = [(FIRST, 0.9), (NOTHING, 0.8), (NOTHING, 0.7)]


def planted(pictures=3) -> Dataset:
    """Return pictures of 64 × 64 pixels with two cells each."""
    boxes_xywh = np.tile([[0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 20.0, 20.0]], (pictures, 1))
    number = len(boxes_xywh)
    objects = Objects.numbered(np.repeat(np.arange(pictures), 2), boxes_xywh, [0] * number)
    names = np.array([f"{i}.png" for i in range(pictures)])
    images = Pictures(np.arange(pictures), names, np.full((pictures, 2), 64))
    annotations = gather(CELLS, Path("."), images, objects, np.ones(number, dtype=bool))
    return Dataset("planted", annotations, lambda index: torch.zeros(3, 64, 64, dtype=torch.uint8))


class Says(nn.Module):
    """Say the same of every picture: for each layer (box, score) of every query."""

    def __init__(self, *layers):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(1))
        self.boxes = torch.tensor([[box for box, _ in layer] for layer in layers]) / 64
        self.scores = torch.tensor([[score for _, score in layer] for layer in layers])
        self.calls = 0
        self.eval()

    def forward(self, images, padding):
        self.calls += len(images)
        boxes, logits = xyxy_to_cxcywh(self.boxes), self.scores.logit()
        return Predictions(
            logits[:, None, :, None].expand(-1, len(images), -1, 1), boxes[:, None].expand(-1, len(images), -1, -1)
        )


def test_nms_helps_where_duplicates_are_planted_and_nowhere_else():
    """Right, duplicate, right: precision 1 at the 51 recalls up to a half, 2/3 at the 50 above."""
    model = Says(HALF, TWICE, ONCE)
    measured = layer_precision(model, planted(), IMAGES, CELLS, proposals=True, batch=2)
    assert model.calls == 3  # one pass over three pictures
    assert measured.names == ("proposals", "layer 1", "layer 2")
    doubled = (51 + 50 * 2 / 3) / 101
    assert measured.plain[:, 0] == pytest.approx([51 / 101, doubled, 1])
    assert measured.plain[:, 1] == pytest.approx([51 / 101, doubled, 1])
    assert measured.suppressed[:, 0] == pytest.approx([51 / 101, 1, 1])
    assert warn_of_layers(measured) == ()


def test_duplicates_left_at_the_end_are_warned_of():
    measured = layer_precision(Says(HALF, TWICE), planted(), IMAGES, CELLS)
    assert measured.names == ("layer 1", "layer 2")
    (warning,) = warn_of_layers(measured)
    assert warning.startswith("NMS improves the last layer by 0.165 AP")


def test_a_layer_worse_than_an_earlier_one_is_named():
    measured = layer_precision(Says(TWICE, ONCE, HALF), planted(), IMAGES, CELLS)
    (warning,) = warn_of_layers(measured)
    assert warning.startswith("Layer 3 is worse than layer 2 by 0.495 AP")


@pytest.mark.parametrize(("drop", "gain", "number"), [(0.019, 0.009, 0), (0.021, 0.009, 1), (0.019, 0.011, 1)])
def test_small_differences_are_no_warning(drop, gain, number):
    plain = np.array([[0.5, 0.5], [0.5 - drop, 0.5]])
    measured = LayerPrecision(("layer 1", "layer 2"), plain, plain + gain, 0.7)
    assert len(warn_of_layers(measured)) == number


def test_the_overlap_decides_what_is_a_duplicate():
    near = [(FIRST, 0.9), ([4.0, 0.0, 24.0, 20.0], 0.8), (SECOND, 0.7)]  # IoU 16/24
    kept = layer_precision(Says(near), planted(), IMAGES, CELLS)
    dropped = layer_precision(Says(near), planted(), IMAGES, CELLS, overlap=0.6)
    assert kept.suppressed[0, 0] == kept.plain[0, 0] < dropped.suppressed[0, 0]
    assert dropped.suppressed[0, 0] == pytest.approx(1)


@pytest.mark.parametrize("queries", ["anchors", "selected", "scored"])
def test_a_small_model_makes_a_section_whose_last_layer_is_the_answer(queries):
    torch.manual_seed(0)
    dataset = open_dataset("generated:digits?size=64&digit=14-24&objects=1-3&train=1&val=6", "val")
    config = replace(TINY, num_classes=10, queries=queries, query_groups=2)
    card = ModelCard(config, IMAGES, dataset.annotations.categories, "lucid-xs")
    material = Material(Path("."), TrainConfig(), DETR(config).eval(), card, dataset.annotations, dataset, (0,), [], [])
    made = section(material)
    first = ["proposals"] if config.selects else []
    _, rows = made.tables[0]
    assert [row[0] for row in rows] == ["after", *first, "layer 1", "layer 2", "layer 3"]
    assert rows[-1][1] == f"{material.evaluation.average_precision:.3f}"
    measured = layer_precision(material.model, dataset, IMAGES, card.categories, batch=3)
    answer = evaluate(dataset.annotations, detect(material.model, dataset, IMAGES, card.categories))
    assert measured.plain[-1].tolist() == pytest.approx([answer.numbers["AP"], answer.numbers["AP50"]], abs=1e-6)
    svg = as_svg(made.figures[0].chart, "layers", "Layers")
    assert "after NMS at IoU 0.7" in svg
    assert len(svg) < 100_000


def test_a_split_without_objects_says_so():
    dataset = open_dataset("generated:digits?size=64&digit=14-24&objects=0&train=1&val=2", "val")
    config = replace(TINY, num_classes=10)
    card = ModelCard(config, IMAGES, dataset.annotations.categories, "lucid-xs")
    boxes = dataset.annotations
    made = section(Material(Path("."), TrainConfig(), DETR(config).eval(), card, boxes, dataset, (0,), [], []))
    assert made.figures == ()
    assert "no objects" in made.says
