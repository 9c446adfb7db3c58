"""Large pictures in overlapping tiles: each is looked at alone, and what two of them see is merged.

A DETR answers with a set and needs no suppression of duplicates, but the set is that of one tile: an object where
tiles overlap is found in each of them, and one that a tile's border cuts is found in pieces. Merging compares boxes of
different views (tiles, and the whole picture) alone, so that close neighbours in one view always stay.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lucidetr.boxes import area, intersection_and_union
from lucidetr.deployment.detector import Detector
from lucidetr.structures import Detections

SAME = 0.5  # IoU from which on two views have seen the same object
COVERED = 0.7  # share of a cut box in another one, from which on it is a piece of that
NEAR = 0.02  # of a tile's side: a box that ends so close to a border may be cut by it


@dataclass(frozen=True)
class Tiling:
    """Say how a picture is cut: the tiles' side in pixels, and the least share of it that neighbours have in common.

    With `whole`, the picture is looked at as a whole too, for objects larger than a tile.
    """

    side: int
    overlap: float = 0.2
    whole: bool = True


@dataclass(frozen=True)
class View:
    """Hold the part of a picture that is looked at, in its pixels: left and top belong to it, right and bottom not."""

    left: int
    top: int
    right: int
    bottom: int

    def cut(self, image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 h w"]:
        """Return the pixels of this part, without a copy."""
        return image[:, self.top : self.bottom, self.left : self.right]


def starts(length: int, tiling: Tiling) -> list[int]:
    """Return where tiles begin along one side: evenly spread, the first at 0, the last one ending with the picture.

    >>> starts(1000, Tiling(side=400, overlap=0.25)), starts(300, Tiling(side=400))
    ([0, 300, 600], [0])
    """
    room = length - tiling.side
    if room <= 0:
        return [0]
    step = max(int(tiling.side * (1 - tiling.overlap)), 1)
    gaps = -(-room // step)
    return [i * room // gaps for i in range(gaps + 1)]


def views(height: int, width: int, tiling: Tiling) -> list[View]:
    """Return the tiles, row by row, after the whole picture if that is wanted.

    Tiles are squares, or as narrow as the picture; a picture no larger than a tile is looked at once.
    """
    tops, lefts = starts(height, tiling), starts(width, tiling)
    tiles = [
        View(left, top, min(left + tiling.side, width), min(top + tiling.side, height))
        for top, left in itertools.product(tops, lefts)
    ]
    return [View(0, 0, width, height), *tiles] if tiling.whole and len(tiles) > 1 else tiles


def predict_in_tiles(
    detector: Detector, image: UInt8[Tensor, "3 height width"], tiling: Tiling, least: Float[Tensor, " category"]
) -> Detections:
    """Return what is found in all views of a picture, merged, of at least the `least` score of each label."""
    _, height, width = image.shape
    parts = views(height, width, tiling)
    found = detector.predict_many((part.cut(image) for part in parts), float(least.min()))
    return merge([each.above(least) for each in found], parts, height, width)


def merge(found: list[Detections], parts: list[View], height: int, width: int) -> Detections:
    """Return the detections of several views as those of one picture, best score first.

    First come boxes that no border inside the picture cuts, best score first, then the others, largest first. Each is
    kept unless one that is kept already, of the same class and another view, has an IoU of more than 0.5 with it or,
    where it is cut itself, covers more than 0.7 of it.
    """
    boxes_xyxy = torch.cat([each.boxes_xyxy + _corner(each, part) for each, part in zip(found, parts, strict=True)])
    scores, labels = torch.cat([each.scores for each in found]), torch.cat([each.labels for each in found])
    view = torch.repeat_interleave(torch.tensor([len(each) for each in found]))
    cut = torch.cat([touches(each.boxes_xyxy, part, height, width) for each, part in zip(found, parts, strict=True)])
    first = torch.where(cut, -1 / (1 + area(boxes_xyxy)), scores)  # whole ones above 0, cut ones below
    order = first.argsort(descending=True, stable=True)
    together = replace(found[0], boxes_xyxy=boxes_xyxy, scores=scores, labels=labels).only(order)
    together = together.only(unlike(together, view[order], cut[order]))
    return together.only(together.scores.argsort(descending=True, stable=True))


def _corner(found: Detections, part: View) -> Float[Tensor, " 4"]:
    return found.boxes_xyxy.new_tensor([part.left, part.top, part.left, part.top])


def touches(
    boxes_xyxy: Float[Tensor, "detection 4"], part: View, height: int, width: int
) -> Bool[Tensor, " detection"]:
    """Say which boxes, in pixels of a view, reach one of its borders that lies inside the picture."""
    w, h = part.right - part.left, part.bottom - part.top
    left, top, right, bottom = boxes_xyxy.unbind(1)
    cut = torch.zeros(len(boxes_xyxy), dtype=torch.bool)
    for inside, reached in (
        (part.left > 0, left <= NEAR * w),
        (part.top > 0, top <= NEAR * h),
        (part.right < width, right >= w - NEAR * w),
        (part.bottom < height, bottom >= h - NEAR * h),
    ):
        if inside:
            cut |= reached
    return cut


def unlike(
    found: Detections, view: Int[Tensor, " detection"], cut: Bool[Tensor, " detection"]
) -> Bool[Tensor, " detection"]:
    """Say which boxes stay when, in the given order, each takes those like it in other views out."""
    keep = torch.ones(len(found), dtype=torch.bool)
    areas = area(found.boxes_xyxy)
    for i in range(len(found)):
        if not keep[i]:
            continue
        shared, union = intersection_and_union(found.boxes_xyxy[i], found.boxes_xyxy)
        like = (shared > SAME * union) | (cut & (shared > COVERED * areas))
        like &= (found.labels == found.labels[i]) & (view != view[i])
        like[: i + 1] = False
        keep &= ~like
    return keep
