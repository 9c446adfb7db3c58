"""Hints: noised truths that a group of queries starts from when training (Li et al. 2022, DN-DETR; Zhang et al. 2023).

The papers fix beforehand which hint answers for which object. Here the hints are matched as all queries are, which
needs no second loss: the nearest hint wins its object, the farther ones learn to say no. As in DINO an object gives one
near and one far hint to a group, no more: hints of one group attend to each other, and the mean of many noised copies
would tell the truth.
"""

import numpy as np
import torch
from torch import Tensor

from lucidetr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from lucidetr.config import ModelConfig
from lucidetr.models.queries import SMALLEST_START
from lucidetr.structures import Batch, Hints

FLIPPED = 0.25  # share of the labels that are drawn anew, and mostly lie


def draw_hints(batch: Batch, model: ModelConfig, seed: int, step: int) -> Hints | None:
    """Return a hint for each query and image: its objects' boxes, corners moved, a quarter of the labels drawn anew.

    The first hint of an object lies near: corners move by up to `denoising` · half a side. The second lies off, by once
    to twice that. All other hints are boxes anywhere, with any label. The draws are made on the host and depend on
    seed, step and the image's id alone, however a batch is cut. None where the model has no hints.
    """
    if not model.denoising:
        return None
    number, num_classes, noise = model.num_queries, model.num_classes, model.denoising
    device, generators = batch.boxes_cxcywh.device, [generator(seed, step, image) for image in batch.image_ids]
    images = len(generators)
    counts = batch.counts[:, None]
    slots = torch.arange(number).expand(images, -1)
    which = torch.where(counts > 0, slots % counts.clamp(min=1), 0).to(device)
    far = (slots >= counts)[..., None]

    def uniform(*shape: int) -> Tensor:
        return torch.stack([torch.rand(number, *shape, generator=own) for own in generators])

    shift = (uniform(4) + far) * noise * (1 - 2 * (uniform(4) < 0.5).float())
    anywhere = torch.cat([uniform(2), 0.05 + 0.3 * uniform(2)], dim=-1)
    lie, other = uniform() < FLIPPED, (uniform() * num_classes).long().clamp(max=num_classes - 1)
    spare = (slots >= 2 * counts).to(device)  # no object is left for them
    if not batch.boxes_cxcywh.shape[1]:  # not one object in the whole batch
        return Hints(boxes_cxcywh=anywhere.to(batch.boxes_cxcywh), labels=other.to(device))

    boxes = batch.boxes_cxcywh.gather(1, which[..., None].expand(-1, -1, 4))
    corners = cxcywh_to_xyxy(boxes) + shift.to(boxes) * boxes[..., 2:].repeat(1, 1, 2) / 2
    low, high = corners.clamp(0, 1).split(2, dim=-1)
    noised = xyxy_to_cxcywh(torch.cat([torch.minimum(low, high), torch.maximum(low, high)], dim=-1))
    noised = torch.cat([noised[..., :2], noised[..., 2:].clamp(min=SMALLEST_START)], dim=-1)
    labels = torch.where(lie.to(device) | spare, other.to(device), batch.labels.gather(1, which))
    return Hints(boxes_cxcywh=torch.where(spare[..., None], anywhere.to(boxes), noised), labels=labels)


def generator(seed: int, step: int, image_id: int) -> torch.Generator:
    """Return the random numbers of one image in one step; an id may be negative, as COCO files have them."""
    words = np.random.SeedSequence([seed, step, image_id % 2**64]).generate_state(1)  # it takes no negative number
    return torch.Generator().manual_seed(int(words[0]))
