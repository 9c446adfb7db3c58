"""Box formats and overlaps as pure functions (DETR, section 3.1 and appendix A.2).

`cxcywh` is centre and size, `xyxy` two opposite corners (left, top, right, bottom), `xywh` corner and size as in
COCO files. The functions do not care whether the unit is a pixel or a fraction of the picture.
"""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_AREA = 1e-12  # keeps 0/0 out of the overlap of two boxes without area


def cxcywh_to_xyxy(boxes_cxcywh: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """Return the two corners of boxes given by centre and size.

    >>> cxcywh_to_xyxy(torch.tensor([5.0, 4.0, 2.0, 6.0])).tolist()
    [4.0, 1.0, 6.0, 7.0]
    """
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """Return centre and size of boxes given by their two corners.

    >>> xyxy_to_cxcywh(torch.tensor([4.0, 1.0, 6.0, 7.0])).tolist()
    [5.0, 4.0, 2.0, 6.0]
    """
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def xyxy_to_xywh(boxes_xyxy: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any 4"]:
    """Return left, top, width and height of boxes given by their two corners.

    >>> xyxy_to_xywh(torch.tensor([4.0, 1.0, 6.0, 7.0])).tolist()
    [4.0, 1.0, 2.0, 6.0]
    """
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([low, high - low], dim=-1)


def area(boxes_xyxy: Float[Tensor, "*any 4"]) -> Float[Tensor, "*any"]:
    """Return width × height; a box whose corners are reversed has area 0.

    >>> area(torch.tensor([[0.0, 0.0, 2.0, 3.0], [2.0, 0.0, 0.0, 3.0]])).tolist()
    [6.0, 0.0]
    """
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def intersection_and_union(
    a_xyxy: Float[Tensor, "*#any 4"], b_xyxy: Float[Tensor, "*#any 4"]
) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
    """Return the shared and the joint area of boxes, leading axes broadcast."""
    low = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    shared = area(torch.cat([low, high], dim=-1))
    return shared, area(a_xyxy) + area(b_xyxy) - shared


def iou(a_xyxy: Float[Tensor, "*#any 4"], b_xyxy: Float[Tensor, "*#any 4"]) -> Float[Tensor, "*any"]:
    """Return intersection over union in 0…1, leading axes broadcast; two boxes without area give 0.

    All pairs of N and M boxes: `iou(a[:, None], b[None])`.

    >>> a, b = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])
    >>> round(iou(a, b).item(), 4)
    0.3333
    """
    shared, union = intersection_and_union(a_xyxy, b_xyxy)
    return shared / union.clamp(min=SMALLEST_AREA)


def giou(a_xyxy: Float[Tensor, "*#any 4"], b_xyxy: Float[Tensor, "*#any 4"]) -> Float[Tensor, "*any"]:
    """Return generalised IoU in −1…1 (Rezatofighi et al. 2019, eq. in DETR A.2), leading axes broadcast.

    IoU minus the share of the smallest enclosing box that neither box covers: apart boxes still have a slope.

    >>> a, b = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, 4.0, 1.0])
    >>> giou(a, b).item()  # no overlap; half of the enclosing 4 × 1 box is covered by neither
    -0.5
    """
    shared, union = intersection_and_union(a_xyxy, b_xyxy)
    low = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    high = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    enclosing = area(torch.cat([low, high], dim=-1))
    uncovered = (enclosing - union) / enclosing.clamp(min=SMALLEST_AREA)
    return shared / union.clamp(min=SMALLEST_AREA) - uncovered
