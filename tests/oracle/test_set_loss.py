"""The fast set loss against the one that walks from query to query."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lucidetr.config import LossConfig
from lucidetr.criterion import set_loss as fast
from lucidetr.reference import engine
from lucidetr.reference import set_loss as reference
from lucidetr.structures import Batch, Predictions

from .drawn import agree, examples, loss_configs, pairs, random_predictions
from .test_matching import batch_of

TERMS = ("total", "classification", "l1", "giou")


def check(predictions: Predictions, batch: Batch, norm: fast.Normalisers, config: LossConfig) -> None:
    """Compare all terms, the matching, and the gradients at logits and boxes."""
    quick = fast.set_loss(predictions, batch, norm, config)
    slow = engine.loss(predictions, batch, norm, config)
    assert pairs(quick.assignment) == pairs(slow.assignment)
    leaves = (predictions.logits, predictions.boxes_cxcywh)
    for term in TERMS:
        agree(getattr(quick, term), getattr(slow, term), term)
        at_quick = torch.autograd.grad(getattr(quick, term).sum(), leaves, retain_graph=True, allow_unused=True)
        at_slow = torch.autograd.grad(getattr(slow, term).sum(), leaves, retain_graph=True, allow_unused=True)
        for where, one, other in zip(("logits", "boxes"), at_quick, at_slow, strict=True):
            zero = torch.zeros_like(getattr(predictions, "logits" if where == "logits" else "boxes_cxcywh"))
            agree(zero if one is None else one, zero if other is None else other, f"gradient of {term} at {where}")


@examples(40)
@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=3).map(tuple),
    queries=st.integers(1, 6),
    layers=st.integers(1, 3),
    num_classes=st.integers(1, 4),
    config=loss_configs(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_drawn_predictions(counts, queries, layers, num_classes, config, dtype, seed):
    predictions = random_predictions(layers, len(counts), queries, num_classes, seed, dtype)
    batch = batch_of(counts, num_classes, seed, dtype)
    norm = fast.normalisers(counts, queries, config)
    slow = reference.normalisers(counts, queries, config)
    assert norm.objects == slow.objects
    assert norm.class_weight == pytest.approx(slow.class_weight, rel=1e-12)
    check(predictions, batch, norm, config)


def test_parts_of_a_batch_add_up_to_the_whole():
    config, counts = LossConfig(), (2, 0, 5)
    predictions, batch = random_predictions(2, 3, 6, 3, seed=1), batch_of(counts, 3, seed=1)
    norm = reference.normalisers(counts, 6, config)
    whole = reference.set_loss(predictions, batch, norm, config).total
    parts = []
    for image in range(3):
        rows = slice(image, image + 1)
        one = replace(
            batch,
            images=batch.images[rows],
            padding=batch.padding[rows],
            boxes_cxcywh=batch.boxes_cxcywh[rows],
            labels=batch.labels[rows],
            counts=batch.counts[rows],
            image_ids=batch.image_ids[rows],
            sizes=batch.sizes[rows],
        )
        said = Predictions(logits=predictions.logits[:, rows], boxes_cxcywh=predictions.boxes_cxcywh[:, rows])
        parts.append(reference.set_loss(said, one, norm, config).total)
    agree(torch.stack(parts).sum(), whole, "sum of parts")


def test_a_perfect_box_and_a_box_without_area():
    predictions, batch = random_predictions(2, 1, 5, 3, seed=3), batch_of((3,), 3, seed=3)
    with torch.no_grad():
        batch.boxes_cxcywh[0, 1, 2:] = 0
        predictions.boxes_cxcywh[:, 0, 2] = batch.boxes_cxcywh[0, 0]
    check(predictions, batch, fast.normalisers((3,), 5, LossConfig()), LossConfig())


def test_without_objects_the_box_head_gets_zero_not_nothing():
    predictions, batch = random_predictions(2, 2, 5, 3, seed=3), batch_of((0, 0), 3, seed=3)
    norm = reference.normalisers((0, 0), 5, LossConfig())
    reference.set_loss(predictions, batch, norm, LossConfig()).total.backward()
    assert predictions.boxes_cxcywh.grad.abs().max() == 0
    assert predictions.logits.grad.abs().max() > 0
