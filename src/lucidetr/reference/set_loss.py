"""The set loss, one image and one query at a time (DETR, section 3.1, equation 2, and A.2)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.config import LossConfig
from lucidetr.reference.boxes import corners, generalised_iou, plain_iou
from lucidetr.reference.classification import yes_or_no_loss
from lucidetr.reference.elementary import log_softmax
from lucidetr.reference.matching import choose, match
from lucidetr.structures import Assignment, Batch, Predictions


@dataclass(frozen=True)
class Normalisers:
    """Hold what the sums of a step are divided by: its objects, and the class weights of all its queries."""

    objects: float
    class_weight: float


@dataclass(frozen=True, eq=False)
class Losses:
    """Hold the number to minimise and the terms it is made of, one value for each decoder layer.

    `tokens`: what every token says adds to that number, where tokens are taught.
    """

    total: Float[Tensor, ""]
    classification: Float[Tensor, " layer"]
    l1: Float[Tensor, " layer"]
    giou: Float[Tensor, " layer"]
    tokens: Float[Tensor, ""]
    assignment: Assignment


def normalisers(counts: Iterable[int], num_queries: int, config: LossConfig, groups: int = 1) -> Normalisers:
    """Return what to divide by, from the number of objects of each image in the step.

    A query that answers for an object weighs 1, any other `no_object`; where that makes 0, divide by 1. Where
    every class is a yes or no of its own, the classification too is divided by the objects. Groups of queries learn
    as if alone: each sums up its own losses, so the divisors grow with their number.

    >>> normalisers([3, 0], num_queries=10, config=LossConfig())  # 3 · 1 + 17 · 0.1
    Normalisers(objects=3.0, class_weight=4.7)
    >>> normalisers([3, 0], num_queries=10, config=LossConfig(classification="focal"), groups=2)
    Normalisers(objects=6.0, class_weight=6.0)
    """
    objects, class_weight = 0.0, 0.0
    for count in counts:
        matched = min(count, num_queries)
        objects += count
        class_weight += matched + config.no_object * (num_queries - matched)
    objects, class_weight = max(objects, 1.0), class_weight or 1.0
    if config.classification != "cross_entropy":
        class_weight = objects
    return Normalisers(objects=groups * objects, class_weight=groups * class_weight)


def query_loss(
    logits: Float[Tensor, " category"], label: int | None, quality: Float[Tensor, ""], config: LossConfig
) -> Float[Tensor, ""]:
    """Return what a query pays for its logits, in the way the config names.

    −log p(label), or for a query without an object (label None) that of the last slot, weighed down. `quality` is
    the IoU of the query's box with its object, as a constant: see classification.py for the ways that ask for it.

    >>> query_loss(torch.zeros(4), 0, torch.tensor(0.5), LossConfig()).exp().round(decimals=3).item()  # 1 of 4 chances
    4.0
    """
    if config.classification != "cross_entropy":
        return yes_or_no_loss(logits, label, quality, config.classification)
    log_probability = log_softmax(logits)
    if label is None:
        return -config.no_object * log_probability[-1]
    return -log_probability[label]


def distance_loss(box_cxcywh: Float[Tensor, " 4"], object_cxcywh: Float[Tensor, " 4"]) -> Float[Tensor, ""]:
    """Return |Δx| + |Δy| + |Δw| + |Δh|, in fractions of the picture.

    >>> distance_loss(torch.tensor([0.5, 0.5, 0.25, 0.25]), torch.tensor([0.5, 0.75, 0.25, 0.5])).item()
    0.5
    """
    return (box_cxcywh - object_cxcywh).abs().sum()


def overlap_loss(box_cxcywh: Float[Tensor, " 4"], object_cxcywh: Float[Tensor, " 4"]) -> Float[Tensor, ""]:
    """Return 1 − GIoU: 0 for the same box, nearly 2 for specks at opposite ends."""
    return 1 - generalised_iou(corners(box_cxcywh), corners(object_cxcywh))


def overlap_quality(box_cxcywh: Float[Tensor, " 4"], object_cxcywh: Float[Tensor, " 4"]) -> Float[Tensor, ""]:
    """Return the plain IoU in 0…1 as a constant: it says what score to learn, and is not learned through it."""
    return plain_iou(corners(box_cxcywh), corners(object_cxcywh)).detach().clamp(min=0.0, max=1.0)


def set_loss(predictions: Predictions, batch: Batch, norm: Normalisers, config: LossConfig) -> Losses:
    """Return Σ over layers of the weighted terms; each layer is matched anew and judged by itself.

    Where every token speaks, too, each object is for `tokens_per_object` of them to find.
    """
    losses = judge(predictions, batch, match(predictions, batch, config), norm, config)
    if predictions.tokens is None:
        return losses
    times = config.tokens_per_object
    norm = Normalisers(objects=times * norm.objects, class_weight=times * norm.class_weight)
    said = judge(predictions.tokens, batch, choose(predictions.tokens, batch, config), norm, config)
    tokens = config.weight_tokens * said.total
    return replace(losses, total=losses.total + tokens, tokens=tokens)


def judge(
    predictions: Predictions, batch: Batch, assignment: Assignment, norm: Normalisers, config: LossConfig
) -> Losses:
    """Return what a matching costs: every layer's sums, divided, and all of them weighted and added up."""
    columns = (assignment.layer, assignment.image, assignment.query, assignment.object)
    matches = list(zip(*(column.tolist() for column in columns), strict=True))
    classification, l1, giou = [], [], []
    for layer, (logits, boxes) in enumerate(zip(predictions.logits, predictions.boxes_cxcywh, strict=True)):
        here = {(image, query): thing for at, image, query, thing in matches if at == layer}
        sums = layer_sums(logits, boxes, batch, here, config)
        classification.append(sums[0] / norm.class_weight)
        l1.append(sums[1] / norm.objects)
        giou.append(sums[2] / norm.objects)
    total = sum(
        config.weight_class * classification[layer] + config.weight_l1 * l1[layer] + config.weight_giou * giou[layer]
        for layer in range(len(classification))
    )
    return Losses(
        total=torch.as_tensor(total),
        classification=torch.stack(classification),
        l1=torch.stack(l1),
        giou=torch.stack(giou),
        tokens=torch.zeros_like(classification[0]),
        assignment=assignment,
    )


def layer_sums(
    logits: Float[Tensor, "batch query category"],
    boxes_cxcywh: Float[Tensor, "batch query 4"],
    batch: Batch,
    object_of: dict[tuple[int, int], int],
    config: LossConfig,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Return one layer's sums over all images and queries: classification, L1 and 1 − GIoU.

    `object_of` gives the object of each matched (image, query).
    """
    # without any object the boxes' gradient is 0, not missing: an optimiser treats the two differently
    nothing = 0 * boxes_cxcywh.sum()
    classification, l1, giou = nothing, nothing, nothing
    for image, (image_logits, image_boxes) in enumerate(zip(logits, boxes_cxcywh, strict=True)):
        for query, (query_logits, box) in enumerate(zip(image_logits, image_boxes, strict=True)):
            thing = object_of.get((image, query))
            if thing is None:
                classification = classification + query_loss(query_logits, None, torch.zeros_like(nothing), config)
                continue
            truth, label = batch.boxes_cxcywh[image, thing], int(batch.labels[image, thing])
            quality = overlap_quality(box, truth)
            classification = classification + query_loss(query_logits, label, quality, config)
            l1 = l1 + distance_loss(box, truth)
            giou = giou + overlap_loss(box, truth)
    return classification, l1, giou
