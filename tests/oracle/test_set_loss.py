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

from .drawn import FITTING, agree, examples, loss_configs, pairs, random_predictions
from .test_matching import batch_of

CONFIGS = st.one_of(loss_configs("softmax"), loss_configs("sigmoid"))
TERMS = ("total", "classification", "l1", "giou")


def check(predictions: Predictions, batch: Batch, norm: fast.Normalisers, config: LossConfig) -> None:
    """Compare all terms, the matching, and the gradients at logits and boxes."""
    quick = fast.set_loss(predictions, batch, norm, config)
    slow = engine.loss(predictions, batch, norm, config)
    assert pairs(quick.assignment) == pairs(slow.assignment)
    leaves = (predictions.logits, predictions.boxes_cxcywh)
    agree(quick.tokens, slow.tokens, "tokens")
    for term in TERMS:
        agree(getattr(quick, term), getattr(slow, term), term)
        at_quick = torch.autograd.grad(getattr(quick, term).sum(), leaves, retain_graph=True, allow_unused=True)
        at_slow = torch.autograd.grad(getattr(slow, term).sum(), leaves, retain_graph=True, allow_unused=True)
        for where, one, other in zip(("logits", "boxes"), at_quick, at_slow, strict=True):
            zero = torch.zeros_like(getattr(predictions, "logits" if where == "logits" else "boxes_cxcywh"))
            agree(zero if one is None else one, zero if other is None else other, f"gradient of {term} at {where}")


@examples(60)
@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=3).map(tuple),
    queries=st.integers(1, 6),
    layers=st.integers(1, 3),
    num_classes=st.integers(1, 4),
    config=CONFIGS,
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_drawn_predictions(counts, queries, layers, num_classes, config, groups, dtype, seed):
    slots = num_classes + (config.classification == "cross_entropy")
    predictions = random_predictions(layers * groups, len(counts), queries, slots, seed, dtype)
    batch = batch_of(counts, num_classes, seed, dtype)
    norm = fast.normalisers(counts, queries, config, groups=groups)
    slow = reference.normalisers(counts, queries, config, groups=groups)
    assert norm.objects == slow.objects
    assert norm.class_weight == pytest.approx(slow.class_weight, rel=1e-12)
    check(predictions, batch, norm, config)


@pytest.mark.parametrize("way", FITTING["sigmoid"])
@pytest.mark.parametrize("size", [0.3, 30.0, 600.0])
def test_logits_however_sure(way, size):
    """At ±600, p and 1 − p round to 0 and 1, and their logarithms must come from the logit."""
    predictions, batch = random_predictions(1, 1, 6, 3, seed=9), batch_of((4,), 3, seed=9)
    with torch.no_grad():
        predictions.logits.copy_(size * predictions.logits.sign())
    check(predictions, batch, fast.normalisers((4,), 6, LossConfig(way)), LossConfig(way))


@pytest.mark.parametrize("way", FITTING["sigmoid"])
def test_the_quality_is_no_way_to_cheat(way):
    """The overlap says what score to learn; the boxes do not move to make a poor score right."""
    predictions, batch = random_predictions(2, 1, 5, 3, seed=3), batch_of((3,), 3, seed=3)
    losses = reference.set_loss(predictions, batch, reference.normalisers((3,), 5, LossConfig(way)), LossConfig(way))
    (gradient,) = torch.autograd.grad(losses.classification.sum(), predictions.boxes_cxcywh)
    assert gradient.abs().max() == 0


@examples(30)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple),
    tokens=st.integers(1, 30),
    times=st.integers(1, 5),
    layers=st.integers(1, 2),
    config=loss_configs("sigmoid"),
    seed=st.integers(0, 2**16),
)
def test_each_object_teaches_several_tokens(counts, tokens, times, layers, config, seed):
    """Also where there are fewer tokens than objects ask for, and where two objects want the same."""
    config = replace(config, tokens_per_object=times)
    all_say = random_predictions(layers, len(counts), tokens, 3, seed + 1)
    predictions = replace(random_predictions(2, len(counts), 5, 3, seed), tokens=all_say)
    batch, norm = batch_of(counts, 3, seed), fast.normalisers(counts, 5, config)
    check(predictions, batch, norm, config)
    quick, slow = (
        torch.autograd.grad(loss(predictions, batch, norm, config).total, (all_say.logits, all_say.boxes_cxcywh))
        for loss in (fast.set_loss, engine.loss)
    )
    for name, one, other in zip(("logits", "boxes"), quick, slow, strict=True):
        agree(one, other, f"gradient at the tokens' {name}")


def test_an_object_teaches_as_many_tokens_as_it_is_asked_to():
    config = LossConfig("mal", tokens_per_object=3)
    all_say, batch = random_predictions(1, 2, 20, 3, seed=1), batch_of((2, 1), 3, seed=1)
    with torch.no_grad():  # half of the tokens lie at the first object, half at the second
        batch.boxes_cxcywh[:, :, 2:] = 0.1
        batch.boxes_cxcywh[:, :, :2] = torch.tensor([[0.2, 0.2], [0.8, 0.8]]).expand_as(batch.boxes_cxcywh[:, :, :2])
        all_say.boxes_cxcywh.mul_(0.01).add_(batch.boxes_cxcywh.repeat(1, 10, 1))
    predictions = replace(random_predictions(1, 2, 5, 3, seed=2), tokens=all_say)
    losses = fast.set_loss(predictions, batch, fast.normalisers((2, 1), 5, config), config)
    (at_boxes,) = torch.autograd.grad(losses.total, all_say.boxes_cxcywh)
    assert at_boxes[0].ne(0).any(-1).sum(-1).tolist() == [6, 3]
    alone = fast.set_loss(replace(predictions, tokens=None), batch, fast.normalisers((2, 1), 5, config), config)
    assert alone.tokens == 0
    agree(losses.total, alone.total + losses.tokens, "total")


def test_groups_are_the_mean_of_their_losses():
    config, counts = LossConfig("mal"), (2, 5)
    both, batch = random_predictions(6, 2, 6, 3, seed=1), batch_of(counts, 3, seed=1)
    one = reference.normalisers(counts, 6, config)
    alone = [
        reference.set_loss(Predictions(both.logits[g::2], both.boxes_cxcywh[g::2]), batch, one, config).total
        for g in (0, 1)
    ]
    together = reference.set_loss(both, batch, reference.normalisers(counts, 6, config, groups=2), config).total
    agree(together, (alone[0] + alone[1]) / 2, "groups")


def test_parts_of_a_batch_add_up_to_the_whole():
    config, counts = LossConfig(), (2, 0, 5)
    predictions, batch = random_predictions(2, 3, 6, 4, seed=1), batch_of(counts, 3, seed=1)
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


@pytest.mark.parametrize("way", ["cross_entropy", *FITTING["sigmoid"]])
def test_a_perfect_box_and_a_box_without_area(way):
    slots = 4 if way == "cross_entropy" else 3
    predictions, batch = random_predictions(2, 1, 5, slots, seed=3), batch_of((3,), 3, seed=3)
    with torch.no_grad():
        batch.boxes_cxcywh[0, 1, 2:] = 0
        predictions.boxes_cxcywh[:, 0, 2] = batch.boxes_cxcywh[0, 0]
    check(predictions, batch, fast.normalisers((3,), 5, LossConfig(way)), LossConfig(way))


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
def test_a_slot_for_no_object_may_weigh_nothing(counts):
    """A step without objects then has nothing to learn from: its loss is 0, not 0 / 0."""
    predictions, batch = random_predictions(2, 2, 5, 4, seed=3), batch_of(counts, 3, seed=3)
    config = LossConfig(no_object=0.0)
    norm, slow = fast.normalisers(counts, 5, config, groups=2), reference.normalisers(counts, 5, config, groups=2)
    assert (norm.objects, norm.class_weight) == (slow.objects, slow.class_weight)
    check(predictions, batch, norm, config)
    total = fast.set_loss(predictions, batch, norm, config).total
    assert total.isfinite()
    assert (total == 0) == (sum(counts) == 0)


def test_without_objects_the_box_head_gets_zero_not_nothing():
    predictions, batch = random_predictions(2, 2, 5, 4, seed=3), batch_of((0, 0), 3, seed=3)
    norm = reference.normalisers((0, 0), 5, LossConfig())
    reference.set_loss(predictions, batch, norm, LossConfig()).total.backward()
    assert predictions.boxes_cxcywh.grad.abs().max() == 0
    assert predictions.logits.grad.abs().max() > 0
