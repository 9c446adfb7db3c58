"""Boxes, how one moves, how much two overlap, and the slope that apart boxes still have (DETR, A.2)."""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_AREA = 1e-12  # two boxes without area overlap by 0 / 1e-12 instead of 0 / 0
MOST_GROWTH = 3.0  # one move makes a side at most e³ = 20 times as long, or as short


def corners(boxes_cxcywh: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """Return left, top, right, bottom of boxes given by centre and size.

    >>> corners(torch.tensor([0.5, 0.5, 0.25, 1.0])).tolist()
    [0.375, 0.0, 0.625, 1.0]
    """
    x, y, width, height = boxes_cxcywh.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)


def move(reference_cxcywh: Float[Tensor, "*any 4"], delta: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """Return the box that `delta` moves and stretches the reference to, in units of its own width and height.

    Centre + delta · size, and size · e^delta: the same delta says "half a width to the right, twice as wide" to a
    small box and to a large one (Girshick et al. 2014, appendix C).

    >>> import math
    >>> half_right = torch.tensor([0.5, 0.0, 0.0, 0.0])
    >>> move(torch.tensor([0.5, 0.5, 0.25, 1.0]), half_right).tolist()
    [0.625, 0.5, 0.25, 1.0]
    >>> move(torch.tensor([0.5, 0.5, 0.25, 1.0]), torch.tensor([0.0, 0.0, math.log(2), 100.0])).tolist()
    [0.5, 0.5, 0.5, 20.08553695678711]
    """
    centre, size = reference_cxcywh[..., :2], reference_cxcywh[..., 2:]
    growth = delta[..., 2:].clamp(min=-MOST_GROWTH, max=MOST_GROWTH)
    return torch.cat([centre + delta[..., :2] * size, size * torch.exp(growth)], dim=-1)


def box_area(boxes_xyxy: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any"]:
    """Return width × height, 0 where a side would be negative.

    >>> box_area(torch.tensor([[0.0, 0.0, 2.0, 3.0], [2.0, 0.0, 0.0, 3.0]])).tolist()
    [6.0, 0.0]
    """
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return (right - left).clamp(min=0) * (bottom - top).clamp(min=0)


def intersection(a_xyxy: Float[Tensor, "*#any 4"], b_xyxy: Float[Tensor, "*#any 4"]) -> Float[Tensor, "*any 4"]:
    """Return the box both share: the inner of each pair of sides; its sides are reversed where they do not meet.

    >>> intersection(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])).tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    low = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    return torch.cat([low, high], dim=-1)


def enclosing(a_xyxy: Float[Tensor, "*#any 4"], b_xyxy: Float[Tensor, "*#any 4"]) -> Float[Tensor, "*any 4"]:
    """Return the smallest box that holds both: the outer of each pair of sides.

    >>> enclosing(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0])).tolist()
    [0.0, 0.0, 3.0, 3.0]
    """
    low = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    return torch.cat([low, high], dim=-1)


def plain_iou(a_xyxy: Float[Tensor, "*#any 4"], b_xyxy: Float[Tensor, "*#any 4"]) -> Float[Tensor, "*any"]:
    """Return what both share / what either covers, in 0…1.

    >>> plain_iou(torch.tensor([0.0, 0.0, 2.0, 4.0]), torch.tensor([0.0, 2.0, 2.0, 4.0])).item()  # 4 / 8
    0.5
    """
    shared = box_area(intersection(a_xyxy, b_xyxy))
    covered = box_area(a_xyxy) + box_area(b_xyxy) - shared
    return shared / covered.clamp(min=SMALLEST_AREA)


def generalised_iou(a_xyxy: Float[Tensor, "*#any 4"], b_xyxy: Float[Tensor, "*#any 4"]) -> Float[Tensor, "*any"]:
    """Return IoU − (empty part of the enclosing box) / (enclosing box), in −1…1 (Rezatofighi et al. 2019).

    IoU is 0 for all pairs that do not meet, near or far. The second term tells them apart.

    >>> a = torch.tensor([0.0, 0.0, 1.0, 1.0])
    >>> for left in (0.0, 0.5, 1.0, 9.0):
    ...     print(round(generalised_iou(a, torch.tensor([left, 0.0, left + 1, 1.0])).item(), 4))
    1.0
    0.3333
    0.0
    -0.8
    """
    shared = box_area(intersection(a_xyxy, b_xyxy))
    covered = box_area(a_xyxy) + box_area(b_xyxy) - shared
    hull = box_area(enclosing(a_xyxy, b_xyxy))
    empty = (hull - covered) / hull.clamp(min=SMALLEST_AREA)
    return plain_iou(a_xyxy, b_xyxy) - empty
