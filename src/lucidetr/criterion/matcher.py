"""The optimal matching of predictions and objects (DETR, section 3.1, equation 1), and the choice of taught tokens."""

from dataclasses import fields

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lucidetr.boxes import cxcywh_to_xyxy, giou
from lucidetr.config import LossConfig
from lucidetr.criterion.classification import focal_negative, focal_positive
from lucidetr.structures import Assignment, Batch, Predictions


def matching_cost(
    predictions: Predictions, batch: Batch, config: LossConfig
) -> Float[Tensor, "layer batch query object"]:
    """Return the cost of every pair: how unlike the object's class the query is, L1 and −GIoU of the boxes.

    Computed in float32 at least, whatever the model's precision; columns past an image's count mean nothing.
    """
    predictions = predictions.in_full_precision()
    boxes = predictions.boxes_cxcywh[..., None, :]
    objects = batch.boxes_cxcywh[None, :, None]
    layers, _, queries, _ = predictions.logits.shape
    labels = batch.labels[None, :, None].expand(layers, -1, queries, -1)
    if config.classification == "cross_entropy":
        unlikeness = class_cost(predictions.logits, config).gather(-1, labels)
    else:  # what a sigmoid costs depends on no other class: there may be many of them, and many tokens
        unlikeness = class_cost(predictions.logits.gather(-1, labels), config)
    return (
        config.cost_class * unlikeness
        + config.cost_l1 * (boxes - objects).abs().sum(-1)
        - config.cost_giou * giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects))
    )


def class_cost(
    logits: Float[Tensor, "layer batch query category"], config: LossConfig
) -> Float[Tensor, "layer batch query category"]:
    """Return what it costs to call a query each of the classes.

    With a softmax −probability (the paper); with sigmoids what the focal loss would lose as a yes minus what it
    would lose as a no (Zhu et al. 2021).
    """
    if config.classification == "cross_entropy":
        return -logits.softmax(-1)
    return focal_positive(logits) - focal_negative(logits)


@torch.no_grad()
def match(predictions: Predictions, batch: Batch, config: LossConfig) -> Assignment:
    """Return the cheapest one-to-one assignment for every layer and image.

    Images are solved one by one, but their costs are computed together and copied to the host once. An image
    with more objects than queries leaves some objects unmatched. A cost that is not finite is a
    FloatingPointError that names the image.
    """
    cost = matching_cost(predictions, batch, config).cpu()
    counts = batch.counts.tolist()
    pairs: list[tuple[int, int, int, int]] = []
    for image, count in enumerate(counts):
        if not cost[:, image, :, :count].isfinite().all():
            name, parts = batch.image_ids[image], _blame(predictions, batch, image)
            raise FloatingPointError(f"the matching cost of image {name} is not finite: {parts}")
        for layer in range(len(cost)):
            queries, objects = linear_sum_assignment(cost[layer, image, :, :count].numpy())
            pairs += [(layer, image, q, o) for q, o in zip(queries.tolist(), objects.tolist(), strict=True)]
    columns = torch.tensor(pairs, dtype=torch.long).reshape(-1, 4).to(predictions.logits.device).unbind(1)
    return Assignment(**{f.name: column for f, column in zip(fields(Assignment), columns, strict=True)})


@torch.no_grad()
def choose(predictions: Predictions, batch: Batch, config: LossConfig) -> Assignment:
    """Return for every object the `tokens_per_object` queries of every layer that cost it least.

    Where two objects choose the same query, the cheaper pair keeps it, and the other object teaches one fewer. Unlike
    the optimal matching it is no more than sorting, on whatever device the predictions lie: tokens are many.
    """
    cost = matching_cost(predictions, batch, config)
    counts = batch.counts.to(cost.device, non_blocking=True)
    none = torch.arange(cost.shape[-1], device=cost.device) >= counts[:, None]
    cost = cost.masked_fill(none[None, :, None], torch.inf)
    cheapest = cost.topk(min(config.tokens_per_object, cost.shape[2]), dim=2, largest=False).indices
    wanted = torch.zeros_like(cost, dtype=torch.bool).scatter(2, cheapest, True) & ~none[None, :, None]
    layer, image, query = wanted.any(-1).nonzero().unbind(1)
    costs = cost.masked_fill(~wanted, torch.inf)[layer, image, query]
    thing = costs.argmin(-1) if len(costs) else layer  # a batch without objects has no column to look at
    return Assignment(layer=layer, image=image, query=query, object=thing)


def _blame(predictions: Predictions, batch: Batch, image: int) -> str:
    """Name the part of the cost that is not finite."""
    parts = {
        "the model's class logits": predictions.logits[:, image],
        "the model's boxes": predictions.boxes_cxcywh[:, image],
        "the image's object boxes": batch.boxes_cxcywh[image],
    }
    bad = [name for name, values in parts.items() if not values.isfinite().all()]
    return f"{' and '.join(bad) or 'a sum overflowed; the values'} hold nan or infinity"
