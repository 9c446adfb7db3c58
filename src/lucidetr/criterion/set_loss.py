"""The set loss: what training minimises, once the matching is known (DETR, section 3.1, equation 2, and A.2)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.boxes import cxcywh_to_xyxy, giou, iou
from lucidetr.config import LossConfig
from lucidetr.criterion.classification import classification_loss
from lucidetr.criterion.matcher import choose, match
from lucidetr.structures import Assignment, Batch, Predictions

NOTHING = -1  # the label of a query without an object


@dataclass(frozen=True)
class Normalisers:
    """Hold what the sums are divided by, counted over the global batch: all ranks, all accumulated parts."""

    objects: float
    class_weight: float


@dataclass(frozen=True, eq=False)
class Losses:
    """Hold the number to minimise and the terms it is made of, one value for each decoder layer, before their weights.

    Each term is a sum over matches or queries, divided by the normaliser; `giou` is that of 1 − GIoU.
    `tokens` is what the tokens add to it where they are taught, 0 elsewhere.
    """

    total: Float[Tensor, ""]
    classification: Float[Tensor, " layer"]
    l1: Float[Tensor, " layer"]
    giou: Float[Tensor, " layer"]
    tokens: Float[Tensor, ""]
    assignment: Assignment


def normalisers(counts: Iterable[int], num_queries: int, config: LossConfig, groups: int = 1) -> Normalisers:
    """Return the normalisers of one optimiser step from the number of objects in each of its images.

    With a softmax every matched query weighs 1 in the log-likelihood, every other `no_object`; with sigmoids the
    classes are divided by the objects, too. How many match is known before the model runs, so the parts of a batch
    can be summed in any order, on any number of machines. Groups of queries share the weight of one.
    """
    counts = list(counts)
    objects = max(float(sum(counts)), 1.0) * groups
    if config.classification != "cross_entropy":
        return Normalisers(objects=objects, class_weight=objects)
    matched = sum(min(count, num_queries) for count in counts)
    unmatched = len(counts) * num_queries - matched
    weight = matched + config.no_object * unmatched or 1.0  # without objects and with no_object 0, nothing weighs
    return Normalisers(objects=objects, class_weight=groups * weight)


def set_loss(predictions: Predictions, batch: Batch, norm: Normalisers, config: LossConfig) -> Losses:
    """Return the weighted sum of all terms over all decoder layers, each layer with its own matching.

    Tokens that are taught are judged as queries are, each object by several of them, and divided by as many as the
    objects ask for. Computed in float32 at least, whatever the model's precision.
    """
    predictions = predictions.in_full_precision()
    losses = judge(predictions, batch, match(predictions, batch, config), norm, config)
    if predictions.tokens is None:
        return losses
    times = config.tokens_per_object
    norm = Normalisers(objects=times * norm.objects, class_weight=times * norm.class_weight)
    said = judge(predictions.tokens, batch, choose(predictions.tokens, batch, config), norm, config)
    tokens = config.weight_tokens * said.total
    return replace(losses, total=losses.total + tokens, tokens=tokens)


def judge(predictions: Predictions, batch: Batch, a: Assignment, norm: Normalisers, config: LossConfig) -> Losses:
    """Return the weighted sum of all terms over all layers, given which query answers for which object."""
    logits, boxes = predictions.logits, predictions.boxes_cxcywh
    layers = len(logits)

    found, truth = boxes[a.layer, a.image, a.query], batch.boxes_cxcywh[a.image, a.object]
    found_xyxy, truth_xyxy = cxcywh_to_xyxy(found), cxcywh_to_xyxy(truth)
    distance = (found - truth).abs().sum(-1)
    shortfall = 1 - giou(found_xyxy, truth_xyxy)
    l1 = boxes.new_zeros(layers).index_add(0, a.layer, distance) / norm.objects
    giou_term = boxes.new_zeros(layers).index_add(0, a.layer, shortfall) / norm.objects

    labels = torch.full(logits.shape[:-1], NOTHING, device=logits.device)
    labels[a.layer, a.image, a.query] = batch.labels[a.image, a.object]
    quality = boxes.new_zeros(logits.shape[:-1])
    quality[a.layer, a.image, a.query] = iou(found_xyxy, truth_xyxy).detach()
    losses = classification_loss(logits, labels, quality, config)
    classification = losses.flatten(1).sum(1) / norm.class_weight

    total = (config.weight_class * classification + config.weight_l1 * l1 + config.weight_giou * giou_term).sum()
    return Losses(total, classification, l1, giou_term, tokens=total.new_zeros(()), assignment=a)
