"""How boxes are moved from layer to layer, what the next layer sees of them, and who learns from which box."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lucid_tools import TINY
from lucidetr.models.detr import DETR
from lucidetr.models.heads import HeadsOfLayers, move

LAYERS = TINY.decoder_layers
KINDS = ["relative", "refined", "refined_twice"]


def test_a_box_moves_in_units_of_its_own_size():
    box = torch.tensor([0.5, 0.4, 0.2, 0.1], dtype=torch.float64)
    delta = torch.tensor([0.5, -1.0, math.log(2), -math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(move(box, delta), torch.tensor([0.6, 0.3, 0.4, 0.025], dtype=torch.float64))
    assert torch.equal(move(box, torch.zeros(4, dtype=torch.float64)), box)


def test_no_guess_changes_a_side_by_more_than_e_cubed_but_a_centre_goes_anywhere():
    moved = move(torch.tensor([0.5, 0.5, 0.1, 0.1]), torch.tensor([40.0, -40.0, 1000.0, -1000.0]))
    torch.testing.assert_close(moved, torch.tensor([4.5, -3.5, 0.1 * math.e**3, 0.1 * math.e**-3]))


def build(boxes, **changes):
    """Return a model of that kind of boxes with equal weights for every kind, and a batch."""
    torch.manual_seed(0)
    model = DETR(replace(TINY, boxes=boxes, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    return model, images, torch.zeros(1, 64, 64, dtype=torch.bool)


def watch(boxes):
    """Return predicted boxes, each layer's delta and the boxes that each layer saw."""
    model, images, padding = build(boxes)
    deltas, seen = [], []
    for heads in model.heads:
        heads.register_forward_hook(lambda module, inputs, output: deltas.append(output[1]))
    model.decoder.position.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    predicted = model(images, padding).boxes_cxcywh
    return predicted, deltas, seen, model.queries.box.sigmoid()[None]


def test_relative_layers_all_see_and_move_the_first_box():
    predicted, deltas, seen, start = watch("relative")
    for layer in range(LAYERS):
        torch.testing.assert_close(seen[layer], start)
        torch.testing.assert_close(predicted[layer], move(start, deltas[layer]))


@pytest.mark.parametrize("boxes", ["refined", "refined_twice"])
def test_refining_layers_see_and_move_the_box_before_them(boxes):
    predicted, deltas, seen, start = watch(boxes)
    before = start
    for layer in range(LAYERS):
        torch.testing.assert_close(seen[layer], before)
        before = move(before, deltas[layer])
        torch.testing.assert_close(predicted[layer], before)
        assert seen[layer].requires_grad == (layer == 0)  # a layer's place is given, only anchors learn from it


def test_looking_forward_twice_changes_no_value():
    kinds = {boxes: build(boxes) for boxes in KINDS}
    once, images, padding = kinds["refined"]
    for model, _, _ in kinds.values():
        model.load_state_dict(once.state_dict())
    said = {boxes: model(images, padding) for boxes, (model, _, _) in kinds.items()}
    assert torch.equal(said["refined"].boxes_cxcywh, said["refined_twice"].boxes_cxcywh)
    assert torch.equal(said["refined"].logits, said["refined_twice"].logits)
    assert torch.equal(said["relative"].boxes_cxcywh[0], said["refined"].boxes_cxcywh[0])
    assert not torch.allclose(said["relative"].boxes_cxcywh[1], said["refined"].boxes_cxcywh[1])


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("boxes", KINDS)
def test_which_heads_learn_from_the_box_of_a_layer(boxes, layer):
    model, images, padding = build(boxes)
    model(images, padding).boxes_cxcywh[layer].sum().backward()
    learning = {
        index
        for index in range(LAYERS)
        if any(p.grad is not None and p.grad.any() for p in model.heads[index].box.parameters())
    }
    assert learning == ({max(layer - 1, 0), layer} if boxes == "refined_twice" else {layer})
    assert not any(p.grad is not None and p.grad.any() for h in model.heads for p in h.category.parameters())


def test_the_layer_before_learns_its_share_of_the_move():
    """A centre is the sum of all moves in units of the sizes moved: the layer before gets the next one's gradient."""
    model, images, padding = build("refined_twice")
    with torch.no_grad():
        for heads in model.heads:  # every layer says the same, whatever it sees: half a side right, half as wide
            heads.box.output.weight.zero_()
            heads.box.output.bias.copy_(torch.tensor([0.5, 0.0, math.log(0.5), 0.0]))
    start = model.queries.box.sigmoid()
    predicted = model(images, padding).boxes_cxcywh
    x, width = start[:, 0], start[:, 2]
    torch.testing.assert_close(predicted[2, 0, :, 0], x + (0.5 + 0.25 + 0.125) * width)
    torch.testing.assert_close(predicted[2, 0, :, 2], width / 8)
    predicted[2, 0, :, 0].sum().backward()
    own, before = model.heads[2].box.output.bias.grad, model.heads[1].box.output.bias.grad
    assert own[0].item() == pytest.approx((width / 4).sum().item())
    assert before[0].item() == pytest.approx((width / 2).sum().item())
    assert before[2].item() == pytest.approx((0.5 * width / 4).sum().item())  # through the size that layer 2 moves in


@pytest.mark.parametrize("boxes", KINDS)
def test_a_fresh_model_says_the_boxes_that_its_queries_start_from(boxes):
    torch.manual_seed(0)
    model = DETR(replace(TINY, boxes=boxes))
    predicted = model(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)).boxes_cxcywh
    for layer in range(LAYERS):
        torch.testing.assert_close(predicted[layer, 0], model.queries.box.sigmoid())


def test_heads_are_one_for_each_layer_or_one_for_all():
    own, shared = build("refined")[0], build("refined", shared_heads=True)[0]
    assert isinstance(own.heads, HeadsOfLayers)
    assert len({id(own.heads.of(layer).category.weight) for layer in range(LAYERS)}) == LAYERS
    assert {id(shared.heads.of(layer)) for layer in range(LAYERS)} == {id(shared.heads)}
    assert "heads.2.box.layers.1.weight" in own.state_dict()
    assert "heads.box.layers.1.weight" in shared.state_dict()


def test_a_sigmoid_has_no_slot_for_no_object_and_starts_at_a_hundredth():
    softmax = replace(TINY, classification="softmax")
    assert DETR(softmax).heads[0].category.out_features == TINY.num_classes + 1
    category = DETR(TINY).heads[0].category
    assert category.out_features == TINY.num_classes
    assert category.bias.sigmoid().tolist() == pytest.approx([0.01] * TINY.num_classes)


def test_the_bias_of_cross_attention_follows_the_box():
    """With bells, moving an anchor changes what its query finds; nothing else of the layer knows the box."""
    model, images, padding = build("relative")
    nn.init.zeros_(model.decoder.position.output.weight)
    before = model(images, padding).logits
    with torch.no_grad():
        model.queries.box[0, 0] += 1.0
    after = model(images, padding).logits
    assert torch.equal(before[0, 0, 1:], after[0, 0, 1:])
    assert not torch.allclose(before[0, 0, 0], after[0, 0, 0])
