"""The set loss: what training minimises, once the matching is known (DETR, section 3.1, equation 2, and A.2)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lucidetr.boxes import cxcywh_to_xyxy, giou
from lucidetr.config import LossConfig
from lucidetr.criterion.matcher import match
from lucidetr.structures import Assignment, Batch, Predictions


@dataclass(frozen=True)
class Normalisers:
    """Hold what the sums are divided by, counted over the global batch: all ranks, all accumulated parts."""

    objects: float
    class_weight: float


@dataclass(frozen=True, eq=False)
class Losses:
    """Hold the number to minimise and the terms it is made of, one value for each decoder layer."""

    total: Float[Tensor, ""]
    classification: Float[Tensor, " layer"]
    l1: Float[Tensor, " layer"]
    giou: Float[Tensor, " layer"]
    assignment: Assignment


def normalisers(counts: Iterable[int], num_queries: int, config: LossConfig) -> Normalisers:
    """Return the normalisers of one optimiser step from the number of objects in each of its images.

    Every matched query weighs 1 in the log-likelihood, every other `no_object`. How many match is known before
    the model runs, so the parts of a batch can be summed in any order, on any number of machines.
    """
    counts = list(counts)
    matched = sum(min(count, num_queries) for count in counts)
    unmatched = len(counts) * num_queries - matched
    return Normalisers(objects=max(float(sum(counts)), 1.0), class_weight=matched + config.no_object * unmatched)


def set_loss(predictions: Predictions, batch: Batch, norm: Normalisers, config: LossConfig) -> Losses:
    """Return the weighted sum of all terms over all decoder layers, each layer with its own matching.

    Computed in float32 at least, whatever the model's precision.
    """
    predictions = predictions.in_full_precision()
    assignment = match(predictions, batch, config)
    a = assignment
    logits, boxes = predictions.logits, predictions.boxes_cxcywh
    layers, _, _, slots = logits.shape

    target = torch.full(logits.shape[:-1], slots - 1, device=logits.device)
    target[a.layer, a.image, a.query] = batch.labels[a.image, a.object]
    weight = logits.new_ones(slots)
    weight[-1] = config.no_object
    nll = F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, reduction="none")
    classification = nll.view(layers, -1).sum(1) / norm.class_weight

    found = boxes[a.layer, a.image, a.query]
    truth = batch.boxes_cxcywh[a.image, a.object]
    distance = (found - truth).abs().sum(-1)
    shortfall = 1 - giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(truth))
    l1 = boxes.new_zeros(layers).index_add(0, a.layer, distance) / norm.objects
    overlap = boxes.new_zeros(layers).index_add(0, a.layer, shortfall) / norm.objects

    total = (config.weight_class * classification + config.weight_l1 * l1 + config.weight_giou * overlap).sum()
    return Losses(total=total, classification=classification, l1=l1, giou=overlap, assignment=assignment)
