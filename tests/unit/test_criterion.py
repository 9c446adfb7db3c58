"""The matching against exhaustive search, and the set loss against its definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lucidetr.boxes import cxcywh_to_xyxy, giou
from lucidetr.config import LossConfig
from lucidetr.criterion.matcher import match, matching_cost
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.structures import Batch, Predictions

CONFIG = LossConfig()


def make_problem(seed, counts, layers=2, queries=4, classes=3, dtype=torch.float64):
    """Return random predictions and objects."""
    random = torch.Generator().manual_seed(seed)
    batch, most = len(counts), max(counts, default=0)

    def boxes(*shape):
        centre = 0.3 + 0.4 * torch.rand(*shape, 2, generator=random, dtype=dtype)
        size = 0.05 + 0.3 * torch.rand(*shape, 2, generator=random, dtype=dtype)
        return torch.cat([centre, size], -1)

    there = torch.arange(most) < torch.tensor(counts)[:, None]
    objects = Batch(
        images=torch.zeros(batch, 3, 8, 8),
        padding=torch.zeros(batch, 8, 8, dtype=torch.bool),
        boxes_cxcywh=boxes(batch, most) * there[..., None],
        labels=torch.randint(classes, (batch, most), generator=random) * there,
        counts=torch.tensor(counts),
        image_ids=tuple(range(100, 100 + batch)),
        sizes=((8, 8),) * batch,
    )
    logits = torch.randn(layers, batch, queries, classes + 1, generator=random, dtype=dtype)
    return Predictions(logits=logits, boxes_cxcywh=boxes(layers, batch, queries)), objects


def pairs_of(assignment, layer, image):
    here = (assignment.layer == layer) & (assignment.image == image)
    return list(zip(assignment.query[here].tolist(), assignment.object[here].tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 5))
def test_matching_is_the_cheapest_of_all(seed, counts, queries):
    predictions, batch = make_problem(seed, counts, queries=queries)
    cost = matching_cost(predictions, batch, CONFIG)
    assignment = match(predictions, batch, CONFIG)
    for layer in range(2):
        for image, count in enumerate(counts):
            found = pairs_of(assignment, layer, image)
            size = min(count, queries)
            assert len(found) == size
            assert len({q for q, _ in found}) == len({o for _, o in found}) == size
            every = (
                zip(some_queries, some_objects, strict=True)
                for some_queries in itertools.permutations(range(queries), size)
                for some_objects in itertools.combinations(range(count), size)
            )
            cheapest = min(sum(cost[layer, image, q, o].item() for q, o in pairs) for pairs in every)
            assert sum(cost[layer, image, q, o].item() for q, o in found) == pytest.approx(cheapest, abs=1e-9)


def test_cost_is_the_papers():
    predictions, batch = make_problem(1, [2], layers=1)
    cost = matching_cost(predictions, batch, CONFIG)
    for q, o in itertools.product(range(4), range(2)):
        mine, theirs = predictions.boxes_cxcywh[0, 0, q], batch.boxes_cxcywh[0, o]
        expected = (
            -predictions.logits[0, 0, q].softmax(-1)[batch.labels[0, o]]
            + 5 * (mine - theirs).abs().sum()
            - 2 * giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs))
        )
        torch.testing.assert_close(cost[0, 0, q, o], expected)


def test_a_cost_that_is_no_number_names_image_and_part():
    predictions, batch = make_problem(0, [1, 2])
    predictions.boxes_cxcywh[0, 1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"image 101 .*the model's boxes"):
        match(predictions, batch, CONFIG)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_set_loss_is_its_definition(seed, counts):
    predictions, batch = make_problem(seed, counts)
    losses = set_loss(predictions, batch, normalisers(counts, 4, CONFIG), CONFIG)
    for layer in range(2):
        target = torch.full((len(counts), 4), 3)
        l1 = overlap = torch.zeros((), dtype=torch.float64)
        for image in range(len(counts)):
            for q, o in pairs_of(losses.assignment, layer, image):
                target[image, q] = batch.labels[image, o]
                mine, theirs = predictions.boxes_cxcywh[layer, image, q], batch.boxes_cxcywh[image, o]
                l1 = l1 + (mine - theirs).abs().sum()
                overlap = overlap + 1 - giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs))
        weight = torch.tensor([1, 1, 1, CONFIG.no_object], dtype=torch.float64)
        nll = F.cross_entropy(predictions.logits[layer].flatten(0, 1), target.flatten(), weight)
        torch.testing.assert_close(losses.classification[layer], nll)
        torch.testing.assert_close(losses.l1[layer], l1 / max(sum(counts), 1))
        torch.testing.assert_close(losses.giou[layer], overlap / max(sum(counts), 1))
    expected = (losses.classification + 5 * losses.l1 + 2 * losses.giou).sum()
    torch.testing.assert_close(losses.total, expected)


def test_parts_of_a_batch_sum_to_the_whole():
    counts = [3, 0, 1, 2]
    predictions, batch = make_problem(5, counts)
    norm = normalisers(counts, 4, CONFIG)
    whole = set_loss(predictions, batch, norm, CONFIG).total
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 4)):
        some = Predictions(predictions.logits[:, part], predictions.boxes_cxcywh[:, part])
        rest = Batch(
            images=batch.images[part],
            padding=batch.padding[part],
            boxes_cxcywh=batch.boxes_cxcywh[part],
            labels=batch.labels[part],
            counts=batch.counts[part],
            image_ids=batch.image_ids[part],
            sizes=batch.sizes[part],
        )
        total = total + set_loss(some, rest, norm, CONFIG).total
    torch.testing.assert_close(total, whole)


def test_no_objects_at_all_is_a_finite_loss_with_gradients():
    predictions, batch = make_problem(3, [0, 0])
    logits = predictions.logits.requires_grad_()
    losses = set_loss(Predictions(logits, predictions.boxes_cxcywh), batch, normalisers([0, 0], 4, CONFIG), CONFIG)
    losses.total.backward()
    assert losses.l1.tolist() == losses.giou.tolist() == [0.0, 0.0]
    assert losses.total.isfinite()
    assert logits.grad.abs().sum() > 0


def test_half_precision_predictions_are_judged_in_float32():
    predictions, batch = make_problem(7, [2, 3], dtype=torch.float32)
    half = Predictions(predictions.logits.bfloat16(), predictions.boxes_cxcywh.bfloat16())
    losses = set_loss(half, batch, normalisers([2, 3], 4, CONFIG), CONFIG)
    assert losses.total.dtype == losses.giou.dtype == torch.float32
    exact = Predictions(half.logits.float(), half.boxes_cxcywh.float())
    assert torch.equal(losses.total, set_loss(exact, batch, normalisers([2, 3], 4, CONFIG), CONFIG).total)
