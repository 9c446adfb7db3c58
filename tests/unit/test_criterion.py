"""What matching and set loss do with numbers that are none, and with half of the precision."""

import pytest
import torch

from lucidetr.config import LossConfig
from lucidetr.criterion.matcher import match
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


def test_a_cost_that_is_no_number_names_image_and_part():
    predictions, batch = make_problem(0, [1, 2])
    predictions.boxes_cxcywh[0, 1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"image 101 .*the model's boxes"):
        match(predictions, batch, CONFIG)


def test_half_precision_predictions_are_judged_in_float32():
    predictions, batch = make_problem(7, [2, 3], dtype=torch.float32)
    half = Predictions(predictions.logits.bfloat16(), predictions.boxes_cxcywh.bfloat16())
    losses = set_loss(half, batch, normalisers([2, 3], 4, CONFIG), CONFIG)
    assert losses.total.dtype == losses.giou.dtype == torch.float32
    exact = Predictions(half.logits.float(), half.boxes_cxcywh.float())
    assert torch.equal(losses.total, set_loss(exact, batch, normalisers([2, 3], 4, CONFIG), CONFIG).total)
