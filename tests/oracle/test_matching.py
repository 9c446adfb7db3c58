"""Every matcher against every other: the fast one, the spelled-out one, every way tried, and scipy's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from lucidetr.boxes import cxcywh_to_xyxy, giou
from lucidetr.config import LossConfig
from lucidetr.criterion import matcher as fast
from lucidetr.reference import matching as reference
from lucidetr.reference.boxes import corners, generalised_iou
from lucidetr.structures import Batch

from .drawn import agree, examples, loss_configs, objects, pairs, random_predictions

SHAPES = st.tuples(st.integers(0, 6), st.integers(0, 6))


def batch_of(counts: tuple[int, ...], num_classes: int, seed: int, dtype=torch.float64) -> Batch:
    """Return a batch of which only the objects matter."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(counts), 3, 1, 1)
    padding = torch.zeros(len(counts), 1, 1, dtype=torch.bool)
    sizes = tuple((1, 1) for _ in counts)
    return Batch(images=images, padding=padding, **objects(counts, num_classes, generator, dtype), sizes=sizes)


def total(cost: list[list[float]], matched: list[tuple[int, int]]) -> float:
    return sum(cost[row][column] for row, column in matched)


def one_to_one(matched: list[tuple[int, int]], rows: int, columns: int) -> bool:
    some_rows, some_columns = {row for row, _ in matched}, {column for _, column in matched}
    return len(matched) == len(some_rows) == len(some_columns) == min(rows, columns)


@examples(150)
@given(shape=SHAPES, whole=st.booleans(), seed=st.integers(0, 2**16))
def test_hungarian_is_as_cheap_as_every_way_tried_and_as_scipy(shape, whole, seed):
    cost = np.random.default_rng(seed).normal(size=shape) * 3
    if whole:
        cost = cost.round()  # many equal costs: the pairs may differ, their sum may not
    rows = cost.tolist()
    found = reference.hungarian_matching(rows)
    assert one_to_one(found, *shape)
    best = total(rows, reference.exhaustive_matching(rows))
    assert total(rows, found) == pytest.approx(best, abs=1e-12)
    scipy_pairs = list(zip(*(axis.tolist() for axis in linear_sum_assignment(cost)), strict=True))
    assert total(rows, scipy_pairs) == pytest.approx(best, abs=1e-12)
    if not whole:
        assert found == scipy_pairs == reference.exhaustive_matching(rows)


@examples(15)
@given(queries=st.sampled_from([25, 100]), count=st.integers(1, 120), seed=st.integers(0, 2**16))
def test_hungarian_at_the_size_of_a_real_image(queries, count, seed):
    cost = np.random.default_rng(seed).normal(size=(queries, count))
    expected = list(zip(*(axis.tolist() for axis in linear_sum_assignment(cost)), strict=True))
    assert reference.hungarian_matching(cost.tolist()) == expected


@examples(40)
@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=3).map(tuple),
    queries=st.integers(1, 6),
    layers=st.integers(1, 3),
    config=st.one_of(loss_configs("softmax"), loss_configs("sigmoid")),
    seed=st.integers(0, 2**16),
)
def test_fast_matcher(counts, queries, layers, config, seed):
    slots = 4 if config.classification == "cross_entropy" else 3
    batch, predictions = batch_of(counts, 3, seed), random_predictions(layers, len(counts), queries, slots, seed)
    cost = fast.matching_cost(predictions, batch, config)
    for layer in range(layers):
        for image, count in enumerate(counts):
            slow = reference.pair_costs(
                predictions.logits[layer, image],
                predictions.boxes_cxcywh[layer, image],
                batch.labels[image, :count],
                batch.boxes_cxcywh[image, :count],
                config,
            )
            agree(cost[layer, image, :, :count], slow, "cost")
    quick, slow = fast.match(predictions, batch, config), reference.match(predictions, batch, config)
    assert pairs(quick) == pairs(slow)
    assert len(pairs(quick)) == layers * sum(min(count, queries) for count in counts)


def test_equal_objects_cost_the_same_whichever_is_matched():
    predictions, batch = random_predictions(2, 1, 6, 4, seed=4), batch_of((4,), 3, seed=4)
    twins = replace(batch, boxes_cxcywh=batch.boxes_cxcywh[:, [0, 0, 2, 2]], labels=batch.labels[:, [0, 0, 2, 2]])
    cost = fast.matching_cost(predictions, twins, LossConfig())
    sums = [
        sum(cost[layer, image, query, thing].item() for layer, image, query, thing in pairs(match))
        for match in (fast.match(predictions, twins, LossConfig()), reference.match(predictions, twins, LossConfig()))
    ]
    assert sums[0] == pytest.approx(sums[1], abs=1e-10)


@pytest.mark.parametrize("match", [fast.match, reference.match], ids=["fast", "reference"])
def test_a_cost_that_is_no_number_is_named(match):
    predictions, batch = random_predictions(1, 2, 3, 4, seed=4), batch_of((1, 1), 3, seed=4)
    with torch.no_grad():
        predictions.logits[0, 1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="image 1 is not finite"):
        match(predictions, batch, LossConfig())


BOX = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), min_size=4, max_size=4)


@examples(100)
@given(one=BOX, other=BOX)
def test_overlap_of_any_two_boxes(one, other):
    """Boxes without area, equal boxes, boxes that touch: the same value and the same slope."""
    a = torch.tensor(one, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(other, dtype=torch.float64, requires_grad=True)
    quick, slow = giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)), generalised_iou(corners(a), corners(b))
    agree(quick, slow, "giou")
    for at_quick, at_slow in zip(torch.autograd.grad(quick, (a, b)), torch.autograd.grad(slow, (a, b)), strict=True):
        agree(at_quick, at_slow, "slope of giou")
