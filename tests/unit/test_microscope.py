"""What the microscope shows is what the fast model does, on pictures of any backbone, and its numbers add up."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lucid_tools import PAPER, TINY, off_start
from lucidetr.boxes import cxcywh_to_xyxy, giou
from lucidetr.config import BackboneConfig, ImageConfig, LossConfig, ModelCard
from lucidetr.data.dataset import open_dataset
from lucidetr.data.preprocessing import make_batch, prepare
from lucidetr.inspection.microscope import NOBODY, kept, look, look_at, pairing, worth_keeping
from lucidetr.reference.network import forward
from lucidetr.structures import Batch, Predictions

IMAGES = ImageConfig(size=64, max_size=96)
DATA = open_dataset("generated:digits?size=64&digit=14-24&objects=2-3&train=2&val=3", "val")
CATEGORIES = DATA.annotations.categories
LOSS, FOCAL = LossConfig(), LossConfig(classification="focal", cost_class=2.0)

DIGITS_PAPER = replace(PAPER, num_classes=len(CATEGORIES))
LUCID = replace(TINY, num_classes=len(CATEGORIES), queries="selected", boxes="refined_twice")
LITE = replace(LUCID, backbone=BackboneConfig(name="efficientnet_lite0", norm="batch"), fused=(16, 8))
MODELS = {
    "paper": (DIGITS_PAPER, LOSS),
    "no encoder": (replace(DIGITS_PAPER, encoder_layers=0), LOSS),
    "lucid": (LUCID, FOCAL),
    "anchors": (replace(LUCID, queries="anchors", query_groups=2), FOCAL),
    "lite": (LITE, FOCAL),
}


def build(name):
    """Return a model whose parameters are all off their start, its card and its loss."""
    config, loss = MODELS[name]
    model = off_start(config)
    card = ModelCard(model=config, images=IMAGES, categories=CATEGORIES, recipe=name)
    return model, card, loss


@pytest.fixture(scope="module", params=MODELS)
def seen(request):
    """Return a model, its card, and its view of one picture of three objects or fewer."""
    model, card, loss = build(request.param)
    return model, card, look(model, card, DATA, 1, loss)


@torch.no_grad()
def test_the_view_says_what_the_fast_model_says(seen):
    model, card, view = seen
    batch = make_batch([prepare(DATA.image(1), card.images)], card.images)
    said = model(batch.images, batch.padding)
    assert view.logits.shape == said.logits[:, 0].shape
    np.testing.assert_allclose(view.logits, said.logits[:, 0].numpy(), atol=1e-4)
    np.testing.assert_allclose(view.boxes_cxcywh, said.boxes_cxcywh[:, 0].numpy(), atol=1e-4)
    assert view.has_proposals == model.config.selects
    assert len(view.row_names) == len(said.logits)
    assert view.row_names[-1] == "layer 3"


def test_attention_adds_up_to_one_and_has_the_shape_of_its_grid(seen):
    model, _, view = seen
    config = model.config
    tokens, cells = np.prod(view.encoder_grid), np.prod(view.memory_grid)
    queries = view.logits.shape[1]
    assert view.encoder_attention.shape == (config.encoder_layers, 2, tokens, tokens)
    assert view.cross_attention.shape == (3, 2, queries, cells)
    assert view.self_attention.shape == (3, 2, queries, queries)
    assert cells == {"paper": 16, "no encoder": 16}.get(seen[1].recipe, 64)  # of a square of 64 pixels
    for attention in (view.encoder_attention, view.cross_attention, view.self_attention):
        np.testing.assert_allclose(attention.sum(-1), np.ones(attention.shape[:-1]), atol=1e-5)


def test_a_layer_s_reference_box_is_what_the_layer_before_said(seen):
    model, _, view = seen
    if model.config.queries == "learned":
        assert view.reference_cxcywh is None
    elif model.config.boxes.startswith("refined"):
        said = view.boxes_cxcywh[int(view.has_proposals) : -1]
        np.testing.assert_allclose(view.reference_cxcywh[1:], said, atol=1e-6)


def test_the_truth_is_that_of_the_data_and_the_picture_is_not_touched(seen):
    _, card, view = seen
    target = DATA.annotations.target(1)
    height, width = view.size
    found = view.objects_cxcywh * np.array([width, height, width, height])
    np.testing.assert_allclose(cxcywh_to_xyxy(torch.tensor(found)).numpy(), target.boxes_xyxy.numpy(), atol=1e-3)
    assert view.object_labels.tolist() == target.labels.tolist()
    assert np.array_equal(view.image, prepare(DATA.image(1), card.images).image.permute(1, 2, 0).numpy())
    for layer in range(len(view.logits)):
        having = view.assignment[layer]
        assert len(set(having.tolist())) == len(having)
        cheapest = view.cost[layer].min(0).sum()
        assert view.cost[layer][having, range(len(having))].sum() >= cheapest - 1e-5


@pytest.mark.parametrize("name", ["paper", "lucid"])
@torch.no_grad()
def test_the_fast_backbone_s_maps_give_what_the_whole_reference_gives(name):
    model, card, loss = build(name)
    view = look(model, card, DATA, 0, loss)
    batch = make_batch([prepare(DATA.image(0), card.images)], card.images)
    said, trace = forward(model.state_dict(), model.config, batch.images, batch.padding, keep=worth_keeping)
    np.testing.assert_allclose(view.logits, said.logits[:, 0].numpy(), atol=1e-4)
    np.testing.assert_allclose(view.boxes_cxcywh, said.boxes_cxcywh[:, 0].numpy(), atol=1e-4)
    for layer in range(3):
        there = trace[f"decoder.layers.{layer}.cross_attention.weights"][0].numpy()
        np.testing.assert_allclose(view.cross_attention[layer], there, atol=1e-4)
    assert list(view.silent) == [
        *(f"encoder layer {i + 1}" for i in range(model.config.encoder_layers)),
        *(f"decoder layer {i + 1}" for i in range(3)),
    ]


def test_a_hidden_unit_that_cannot_wake_is_silent():
    model, card, loss = build("lucid")
    with torch.no_grad():
        model.decoder.layers[1].feed_forward.expand.bias[:4] = -1000
        model.decoder.layers[1].feed_forward.expand.bias[4:] = 1000
    silent = look(model, card, DATA, 0, loss).silent["decoder layer 2"]
    assert silent.tolist() == [True] * 4 + [False] * 28


def test_a_picture_without_objects():
    model, card, loss = build("lucid")
    view = look_at(model, card, prepare(DATA.image(0), card.images), loss)
    assert view.cost.shape == (4, 5, 0)
    assert view.assignment.shape == (4, 0)


def test_the_parts_of_the_cost_are_those_of_arithmetic_and_too_many_objects_have_nobody():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    things = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2]])
    predictions = Predictions(logits=torch.tensor([[[[0.0, 0.0, 0.0]]]]), boxes_cxcywh=boxes[None, None])
    padding = torch.zeros(1, 8, 8, dtype=torch.bool)
    batch = Batch(
        images=torch.zeros(1, 3, 8, 8),
        padding=padding,
        boxes_cxcywh=things[None],
        labels=torch.tensor([[0, 1]]),
        counts=torch.tensor([2]),
        image_ids=(1,),
        sizes=((8, 8),),
    )
    parts, assignment = pairing(predictions, batch, LOSS)
    corners = cxcywh_to_xyxy(things)
    half = giou(cxcywh_to_xyxy(boxes), corners)[1].item()
    expected = [[-1 / 3, 0.0, -2.0], [-1 / 3, 0.5, -2 * half]]
    np.testing.assert_allclose(parts[0, 0], expected, atol=1e-5)
    assert assignment.tolist() == [[0, NOBODY]]


def test_kept_queries_are_the_best_six_that_found_something_else_the_best_three():
    model, card, loss = build("paper")
    view = look(model, card, DATA, 0, loss)
    scores = np.tile(np.array([0.1, 0.9, 0.2, 0.6, 0.3, 0.0, 0.4]), (3, 1))
    assert kept(replace(view, scores=scores)) == [1, 3]
    assert kept(replace(view, scores=scores / 2)) == [1, 3, 6]
    assert kept(replace(view, scores=0.5 + scores / 2)) == [1, 3, 6, 4, 2, 0]
