"""Hints: noised truths that a group of queries starts from when training (Li et al. 2022, DN-DETR; Zhang et al. 2023).

The papers fix beforehand which hint answers for which object. Here the hints are matched as all queries are, which
needs no second loss: the nearest hint wins its object, the farther ones learn to say no.
"""

import torch
from torch import Tensor

from lucidetr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from lucidetr.models.queries import SMALLEST_START
from lucidetr.structures import Batch, Hints

FLIPPED = 0.25  # share of the labels that lie


def draw_hints(batch: Batch, number: int, num_classes: int, noise: float, generator: torch.Generator) -> Hints:
    """Return `number` hints for each image: its objects' boxes with their corners moved, a quarter of the labels wrong.

    The first hint of an object lies near: corners move by up to noise · half a side. All further ones lie off, by
    once to twice that. An image without objects gets boxes anywhere. The draws come from `generator`, on the host.
    """
    images, device = len(batch), batch.boxes_cxcywh.device
    counts = batch.counts[:, None]
    slots = torch.arange(number).expand(images, -1)
    which = torch.where(counts > 0, slots % counts.clamp(min=1), 0).to(device)
    far = (slots >= counts)[..., None]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(images, number, *shape, generator=generator)

    shift = (uniform(4) + far) * noise * (1 - 2 * (uniform(4) < 0.5).float())
    anywhere = torch.cat([uniform(2), 0.05 + 0.3 * uniform(2)], dim=-1)
    lie, false = uniform() < FLIPPED, (uniform() * num_classes).long().clamp(max=num_classes - 1)
    empty = (counts == 0).to(device)
    if not batch.boxes_cxcywh.shape[1]:  # not one object in the whole batch
        return Hints(boxes_cxcywh=anywhere.to(batch.boxes_cxcywh), labels=false.to(device))

    boxes = batch.boxes_cxcywh.gather(1, which[..., None].expand(-1, -1, 4))
    corners = cxcywh_to_xyxy(boxes) + shift.to(boxes) * boxes[..., 2:].repeat(1, 1, 2) / 2
    low, high = corners.clamp(0, 1).split(2, dim=-1)
    noised = xyxy_to_cxcywh(torch.cat([torch.minimum(low, high), torch.maximum(low, high)], dim=-1))
    noised = torch.cat([noised[..., :2], noised[..., 2:].clamp(min=SMALLEST_START)], dim=-1)
    labels = torch.where(lie.to(device) | empty, false.to(device), batch.labels.gather(1, which))
    return Hints(boxes_cxcywh=torch.where(empty[..., None], anywhere.to(boxes), noised), labels=labels)
