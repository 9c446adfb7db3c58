"""Hints: noised truths that one more group of queries starts from."""

from dataclasses import replace

import pytest
import torch

from lucid_tools import TINY
from lucidetr.boxes import cxcywh_to_xyxy, iou
from lucidetr.criterion.denoising import draw_hints
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch

MODEL = replace(TINY, decoder_layers=2, fused=(), num_queries=4, queries="selected", denoising=0.4)


def batch_of(*counts: int) -> Batch:
    most = max(counts)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).repeat(len(counts), most, 1)
    labels = torch.ones(len(counts), most, dtype=torch.long)
    for i, count in enumerate(counts):
        boxes[i, count:], labels[i, count:] = 0, 0
    return Batch(
        images=torch.randn(len(counts), 3, 64, 64),
        padding=torch.zeros(len(counts), 64, 64, dtype=torch.bool),
        boxes_cxcywh=boxes,
        labels=labels,
        counts=torch.tensor(counts),
        image_ids=tuple(range(len(counts))),
        sizes=((64, 64),) * len(counts),
    )


def draw(batch: Batch, number: int = 400, noise: float = 0.4, seed: int = 0):
    return draw_hints(batch, replace(MODEL, num_queries=number, num_classes=3, denoising=noise), seed, step=0)


def test_the_first_hint_of_an_object_lies_near_and_the_second_off():
    batch = batch_of(1)
    corner = cxcywh_to_xyxy(batch.boxes_cxcywh[0, 0])
    half = batch.boxes_cxcywh[0, 0, 2:].repeat(2) / 2
    moved = torch.stack(
        [((cxcywh_to_xyxy(draw(batch, 2, seed=s).boxes_cxcywh[0]) - corner).abs() / half) for s in range(200)]
    )
    assert moved[:, 0].max() <= 0.4 + 1e-5 < 0.4 + moved[:, 1].min()
    assert moved[:, 1].max() <= 0.8 + 1e-5
    truth = corner.expand(200, 4)
    near, far = (
        cxcywh_to_xyxy(torch.stack([draw(batch, 2, seed=s).boxes_cxcywh[0, i] for s in range(200)])) for i in (0, 1)
    )
    assert iou(near, truth).mean() > iou(far, truth).mean() + 0.15


def test_a_quarter_of_the_labels_lie():
    labels = draw(batch_of(200)).labels
    # a lie is drawn among all three classes, so a third of the lies are true
    assert abs((labels != 1).float().mean().item() - 0.25 * 2 / 3) < 0.06
    assert labels.min() >= 0
    assert labels.max() <= 2


def test_an_object_gives_two_hints_and_all_others_tell_nothing_of_it():
    batch = batch_of(2)
    hints = draw(batch, 400)
    truth = cxcywh_to_xyxy(batch.boxes_cxcywh[0, :1])
    overlaps = iou(cxcywh_to_xyxy(hints.boxes_cxcywh[0]), truth.expand(400, 4))
    assert overlaps[:2].min() > 0.3  # near
    assert overlaps[4:].mean() < 0.15
    assert len(hints.labels[0, 4:].unique()) == 3
    assert abs((hints.labels[0, 4:] == 1).float().mean().item() - 1 / 3) < 0.08


@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (3, 1)])
def test_boxes_lie_in_the_picture_also_where_there_are_none(counts):
    hints = draw(batch_of(*counts), noise=1.0)
    assert hints.boxes_cxcywh.shape == (2, 400, 4)
    corners = cxcywh_to_xyxy(hints.boxes_cxcywh)
    assert (hints.boxes_cxcywh[..., 2:] > 0).all()
    assert corners.isfinite().all()
    assert ((hints.boxes_cxcywh[..., :2] >= 0) & (hints.boxes_cxcywh[..., :2] <= 1)).all()


def test_without_noise_the_first_hints_are_the_truth():
    batch = batch_of(2)
    torch.testing.assert_close(draw(batch, 2, noise=1e-9).boxes_cxcywh[0], batch.boxes_cxcywh[0])


def test_hints_depend_on_the_image_alone_however_a_batch_is_cut():
    batch = replace(batch_of(2, 2, 0), image_ids=(7, -3, 5))  # COCO files may have negative ids
    together = draw(batch, 10)
    assert not torch.equal(together.boxes_cxcywh[0], together.boxes_cxcywh[1])
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in vars(batch).items()}
        alone = draw(Batch(**one), 10)
        assert torch.equal(alone.boxes_cxcywh[0], together.boxes_cxcywh[i])
        assert torch.equal(alone.labels[0], together.labels[i])
    assert not torch.equal(draw(batch, 10, seed=1).boxes_cxcywh, together.boxes_cxcywh)


def test_hints_are_one_more_group_that_the_others_do_not_see():
    torch.manual_seed(0)
    model, batch = DETR(MODEL).train(), batch_of(2, 1)
    alone = model(batch.images, batch.padding)
    hints = draw(batch, 4)
    beside = model(batch.images, batch.padding, hints)
    assert len(alone.logits) == 3  # proposals and two layers
    assert len(beside.logits) == 5  # proposals, then hints and queries after each of two layers
    for own, row in ((0, 0), (1, 2), (2, 4)):
        torch.testing.assert_close(beside.logits[row], alone.logits[own])
        torch.testing.assert_close(beside.boxes_cxcywh[row], alone.boxes_cxcywh[own])
    assert not torch.allclose(beside.logits[1], beside.logits[2])
    beside.logits[1].sum().backward()
    assert model.hints.label.weight.grad.abs().sum() > 0


def test_hints_need_queries_with_boxes():
    with pytest.raises(InputError, match=r"model\.denoising needs queries that start from a box"):
        replace(MODEL, queries="learned", boxes="absolute", box_bias="none")


@pytest.mark.parametrize("side", [64, 32])
def test_where_tokens_are_fewer_than_queries_there_are_as_many_hints(side):
    model, batch = DETR(replace(MODEL, num_queries=50)).train(), batch_of(2, 1)
    small = replace(batch, images=batch.images[..., :side, :side], padding=batch.padding[..., :side, :side])
    predictions = model(small.images, small.padding, draw(batch, 50))
    assert predictions.logits.shape == (5, 2, (side // 16) ** 2, 3)
