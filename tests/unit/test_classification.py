"""The classification losses against plain arithmetic, one element at a time, and what sigmoids change elsewhere."""

import math
from dataclasses import replace

import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.config import LossConfig
from lucidetr.criterion.classification import SIGMOID_LOSSES, classification_loss
from lucidetr.criterion.matcher import class_cost, matching_cost
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.models.postprocess import postprocess
from lucidetr.structures import Batch, Predictions

KINDS = ["focal", "varifocal", "ia_bce", "mal"]


def weight_and_target(kind, p, y, q):
    """Return the weight of an element's cross-entropy and its target: score p, yes or no y, overlap q."""
    if kind == "focal":
        return (0.25 * (1 - p) ** 2 if y else 0.75 * p**2), float(y)
    if kind == "varifocal":
        return (q, q) if y else (0.75 * p**2, 0.0)
    if kind == "ia_bce":
        return (1.0, max(p**0.25 * q**0.75, 0.01)) if y else (p**2, 0.0)
    return (1.0, q**1.5) if y else (p**1.5, 0.0)


def element(kind, logit, y, q):
    """Return the loss of one query's one class."""
    p = 1 / (1 + math.exp(-logit))
    weight, target = weight_and_target(kind, p, y, q)
    return weight * (-target * math.log(p) - (1 - target) * math.log(1 - p))


def test_every_kind_is_tested():
    assert list(SIGMOID_LOSSES) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_loses_the_sum_of_its_classes(kind):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 1, 4, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[[0, -1, 2, 1]], [[-1, -1, 1, 0]]])
    overlap = torch.tensor([[[0.9, 0.7, 0.0, 0.3]], [[0.5, 0.0, 1.0, 0.02]]], dtype=torch.float64)
    found = classification_loss(logits, labels, overlap, LossConfig(classification=kind))
    for layer in range(2):
        for query in range(4):
            label, q = labels[layer, 0, query].item(), overlap[layer, 0, query].item()
            expected = sum(element(kind, logits[layer, 0, query, c].item(), c == label, q) for c in range(3))
            assert found[layer, 0, query].item() == pytest.approx(expected, rel=1e-9), (layer, query)


def slope(kind, logit, y, q):
    """Return the gradient of one element by its logit."""
    x = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    positive, negative = SIGMOID_LOSSES[kind]
    loss = positive(x, torch.tensor(q, dtype=torch.float64)) if y else negative(x)
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient.item()


@pytest.mark.parametrize("y", [True, False])
@pytest.mark.parametrize("logit", [-2.5, -0.3, 0.0, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_which_weights_and_targets_are_held_still(kind, logit, y):
    """With weight and target given, the slope of a cross-entropy is weight · (score − target).

    Focal loss learns through its weight, and so do varifocal and IA-BCE loss where the answer is no; MAL never does.
    """
    through_weight = kind == "focal" or (kind != "mal" and not y)
    q, p = 0.6, 1 / (1 + math.exp(-logit))
    weight, target = weight_and_target(kind, p, y, q)
    held = weight * (p - target)
    whole = (element(kind, logit + 1e-6, y, q) - element(kind, logit - 1e-6, y, q)) / 2e-6
    assert slope(kind, logit, y, q) == pytest.approx(whole if through_weight else held, rel=1e-6, abs=1e-9)
    if kind == "focal" or not y:  # there the two differ, so that either would be seen
        assert abs(whole - held) > 1e-4


@pytest.mark.parametrize("kind", ["varifocal", "mal"])
def test_a_perfect_overlap_asks_for_the_score_1(kind):
    for logit in (-3.0, 0.0, 3.0, 9.0):
        assert slope(kind, logit, True, 1.0) == pytest.approx(-1 / (1 + math.exp(logit)), rel=1e-6)


@pytest.mark.parametrize(("kind", "score"), [("varifocal", 0.4), ("mal", 0.4**1.5), ("ia_bce", 0.4)])
def test_a_poor_overlap_asks_for_a_lower_score(kind, score):
    logit = math.log(score / (1 - score))
    assert slope(kind, logit, True, 0.4) == pytest.approx(0, abs=1e-12)
    assert slope(kind, logit - 0.5, True, 0.4) < 0 < slope(kind, logit + 0.5, True, 0.4)


@pytest.mark.parametrize("kind", KINDS)
def test_far_logits_lose_finite_and_exact_numbers(kind):
    config = LossConfig(classification=kind)
    logits = torch.tensor([[[[90.0], [-90.0]]]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([[[-1, 0]]]), torch.ones(1, 1, 2), config)
    no, yes = loss[0, 0].tolist()  # a false yes and a false no, both as sure as can be
    assert no == pytest.approx(90 * (0.75 if kind in ("focal", "varifocal") else 1))
    target = 0.01 if kind == "ia_bce" else 1  # there the target is √√score, of which nothing is left
    assert yes == pytest.approx(90 * target * (0.25 if kind == "focal" else 1), rel=1e-5)
    loss.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sure_and_right_match_loses_its_small_number_exactly(kind):
    """Among many classes and in float32: a large no must not be subtracted from a sum that holds it."""
    logits = torch.full((1, 1, 1, 91), -6.0)
    logits[..., 7] = 14.0
    config = LossConfig(classification=kind)
    given = torch.tensor([[[7]]]), torch.full((1, 1, 1), 0.999)
    found = classification_loss(logits, *given, config).item()
    expected = classification_loss(logits.double(), given[0], given[1].double(), config).item()
    assert found == pytest.approx(expected, rel=1e-4)


def problem(objects, labels, boxes, logits):
    """Return predictions of one layer for one image, and the image with its objects."""
    batch = Batch(
        images=torch.zeros(1, 3, 8, 8),
        padding=torch.zeros(1, 8, 8, dtype=torch.bool),
        boxes_cxcywh=torch.tensor([objects], dtype=torch.float64),
        labels=torch.tensor([labels]),
        counts=torch.tensor([len(labels)]),
        image_ids=(1,),
        sizes=((8, 8),),
    )
    logits, boxes = (torch.tensor([[values]], dtype=torch.float64) for values in (logits, boxes))
    return Predictions(logits=logits, boxes_cxcywh=boxes), batch


@pytest.mark.parametrize("kind", KINDS)
def test_the_overlap_of_the_set_loss_is_the_plain_one_of_matched_boxes(kind):
    # the first query lies askew of the object, a quarter of each inside the other (overlap a seventh, GIoU below 0),
    # the second one nowhere near
    boxes, logits = [[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.1, 0.1]], [[0.4, -1.0], [0.8, 0.2]]
    predictions, batch = problem([[0.6, 0.7, 0.2, 0.4]], [1], boxes, logits)
    config = LossConfig(classification=kind, weight_class=2.0, weight_l1=0.0, weight_giou=0.0)
    norm = normalisers([1, 3], 2, config)
    losses = set_loss(predictions, batch, norm, config)
    assert losses.assignment.query.tolist() == [0]
    expected = element(kind, 0.4, False, 0.0) + element(kind, -1.0, True, 1 / 7)
    expected += element(kind, 0.8, False, 0.0) + element(kind, 0.2, False, 0.0)
    assert losses.classification[0].item() == pytest.approx(expected / 4, rel=1e-6)  # four objects in the step
    assert losses.total.item() == pytest.approx(2 * expected / 4, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_do_not_learn_from_the_classification(kind):
    predictions, batch = problem([[0.6, 0.5, 0.2, 0.4]], [1], [[0.5, 0.5, 0.2, 0.4]], [[0.4, -1.0]])
    boxes = predictions.boxes_cxcywh.requires_grad_()
    logits = predictions.logits.requires_grad_()
    config = LossConfig(classification=kind)
    losses = set_loss(Predictions(logits, boxes), batch, normalisers([1], 1, config), config)
    losses.classification.sum().backward()
    assert boxes.grad is None or not boxes.grad.any()
    assert logits.grad.all()


@pytest.mark.parametrize("kind", KINDS)
def test_matching_pays_what_a_yes_would_lose_minus_what_a_no_would(kind):
    logits = torch.tensor([[[[-3.0, 0.0, 2.0]]]], dtype=torch.float64)
    expected = []
    for logit in logits.flatten().tolist():
        p = 1 / (1 + math.exp(-logit))
        expected.append(0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p))
    found = class_cost(logits, LossConfig(classification=kind))
    assert found.flatten().tolist() == pytest.approx(expected)
    assert class_cost(torch.tensor([[[[-80.0, 80.0]]]]), LossConfig(classification=kind)).flatten().tolist() == (
        pytest.approx([20, -60])
    )


def test_the_matching_cost_weighs_the_class_and_leaves_the_boxes_as_they_were():
    predictions, batch = problem([[0.6, 0.5, 0.2, 0.4]], [1], [[0.5, 0.5, 0.2, 0.4]], [[0.4, -1.0]])
    config = LossConfig(classification="mal", cost_class=3.0)
    boxes = matching_cost(predictions, batch, replace(config, cost_class=0.0))
    # GIoU equals IoU, a third, where the hull of two boxes is filled
    assert boxes.item() == pytest.approx(5 * 0.1 - 2 / 3)
    unlike = class_cost(predictions.logits, config)[0, 0, 0, 1].item()
    assert matching_cost(predictions, batch, config).item() == pytest.approx(boxes.item() + 3 * unlike)


def test_sigmoids_are_divided_by_the_objects_and_groups_share_the_weight_of_one():
    softmax, sigmoid = LossConfig(), LossConfig(classification="mal")
    one = normalisers([3, 0, 1], 2, softmax)
    assert (one.objects, one.class_weight) == (4, pytest.approx(3 + 0.1 * 3))
    four = normalisers([3, 0, 1], 2, softmax, groups=4)
    assert (four.objects, four.class_weight) == (16, pytest.approx(4 * 3.3))
    assert (normalisers([3, 0, 1], 2, sigmoid).objects, normalisers([3, 0, 1], 2, sigmoid).class_weight) == (4, 4)
    grouped = normalisers([3, 0, 1], 2, sigmoid, groups=4)
    assert (grouped.objects, grouped.class_weight) == (16, 16)
    nothing = normalisers([0, 0], 2, sigmoid, groups=4)
    assert (nothing.objects, nothing.class_weight) == (4, 4)


def test_groups_that_say_the_same_lose_what_one_would():
    boxes, logits = [[0.5, 0.5, 0.2, 0.4], [0.9, 0.9, 0.1, 0.1]], [[0.4, -1.0], [0.8, 0.2]]
    predictions, batch = problem([[0.6, 0.5, 0.2, 0.4]], [1], boxes, logits)
    three = Predictions(predictions.logits.expand(3, -1, -1, -1), predictions.boxes_cxcywh.expand(3, -1, -1, -1))
    config = LossConfig(classification="mal")
    alone = set_loss(predictions, batch, normalisers([1], 2, config), config).total
    together = set_loss(three, batch, normalisers([1], 2, config, groups=3), config).total
    assert together.item() == pytest.approx(alone.item())


CATEGORIES = Categories(ids=(3, 7), names=("cat", "dog"))


def test_with_sigmoids_one_query_may_say_two_classes_and_the_best_of_all_are_kept():
    logits = torch.tensor([[[[2.0, 1.0], [-1.0, -2.0], [0.5, -3.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.25, 0.75, 0.5, 0.5]]]])
    (found,) = postprocess(Predictions(logits, boxes), ((100, 200),), CATEGORIES)
    assert found.names == ["cat", "dog", "cat"]  # the first query twice, then the third; three queries, three answers
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (2.0, 1.0, 0.5)])
    expected = torch.tensor([[80, 40, 120, 60], [80, 40, 120, 60], [0, 50, 100, 100]]).float()
    torch.testing.assert_close(found.boxes_xyxy, expected)


def test_only_the_last_layer_answers_and_every_image_for_itself():
    logits = torch.zeros(2, 2, 1, 2)
    logits[0] = 9.0  # an earlier layer
    logits[1, 0, 0, 1], logits[1, 1, 0, 0] = 1.0, 2.0
    found = postprocess(Predictions(logits, torch.full((2, 2, 1, 4), 0.5)), ((8, 8), (8, 8)), CATEGORIES)
    assert [each.category_ids for each in found] == [[7], [3]]
    assert [each.scores.item() for each in found] == pytest.approx([1 / (1 + math.exp(-x)) for x in (1.0, 2.0)])


def test_with_a_softmax_every_query_says_its_best_real_class_once():
    logits = torch.tensor([[[[2.0, 1.0, 5.0], [0.0, 3.0, 0.0]]]])
    (found,) = postprocess(Predictions(logits, torch.full((1, 1, 2, 4), 0.5)), ((8, 8),), CATEGORIES)
    assert found.names == ["dog", "cat"]
    assert found.scores.tolist() == pytest.approx(
        [math.exp(3) / (math.exp(3) + 2), math.exp(2) / (math.exp(2) + math.exp(1) + math.exp(5))]
    )
