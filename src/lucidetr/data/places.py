"""Pictures that show one place from two positions: tiles of one scan, views through a microscope, frames of a film.

Where two splits share a place, what was learned by heart counts as found. Where the objects of one place were labelled
twice, the two sets of labels tell how well a detector can do by these labels at all. Pairs are found by normalised
cross-correlation (Lewis 1995, "Fast normalized cross-correlation") of small grey copies: shifts alone, neither turns
nor zooms, between pictures of one size.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lucidetr.boxes import iou
from lucidetr.data.decoding import to_rgb, turned_as
from lucidetr.data.raw import Box, Finding, Raw

LONG = 128  # pixels of the longer side of a small copy
SMALLEST = 0.15  # share of a picture that two must have in common
ALIKE = 0.75  # correlation from which on two show one place
ROUGH = 0.65  # times as much at half that size makes a candidate,
NEARLY = 0.75  # and times as much at the full size before the shift is exact
CHANCE = 1.25  # times the largest correlation that chance brings about among so many pairs
BLOCKS, SPREAD = 6, 12  # of 6 × 6 blocks of what both see, so many must agree: one shape on a plain page is no place
BLOCK = 64  # pictures that one is compared with at a time
MARGIN = 0.01  # of the longer side: objects nearer to an edge of what both see may be cut
PATCH = 8  # pixels of a small copy, at least, in which an object must look the same,
SAME = 0.85  # that is have this correlation
MOST_COMPARED = 1000  # pictures, of which every two are compared unless that is asked for or forbidden: 20 seconds
MOST_PARTNERS = 20  # of a picture: before a camera that stands still all pictures show one place
ORDER = {"train": 0, "val": 1, "test": 2}
IOUS = tuple(step / 100 for step in range(50, 100, 5))  # COCO's


class View(NamedTuple):
    """Hold one picture of a split: which, and a small grey copy of it as it is seen upright."""

    raw: Raw
    number: int
    size: tuple[int, int]  # width and height in pixels
    small: UInt8[np.ndarray, "height width"]

    @property
    def path(self) -> Path:
        """Return its file."""
        return self.raw.pictures[self.number].path


class Pair(NamedTuple):
    """Hold two pictures of one place: what lies at x, y in the second lies at x, y + `shift_xy` in the first."""

    first: View
    second: View
    shift_xy: tuple[float, float]  # in pixels
    share: float  # of each of them that both see
    alike: float  # correlation there, 1: the same


@dataclass(frozen=True)
class Twice:
    """Hold how two labellings of the same objects agree."""

    labels: int  # of both labellings, where both could see the object whole
    paired: float  # share of them with a partner of their category in the other, at an IoU of at least 0.5
    iou: float | None  # mean over the partners, None where there are none
    within: float | None  # mean over COCO's ten IoUs of the share of partners that agree so well
    ideal: float | None  # and of the share of labels that boxes without any error would meet so well


@dataclass(frozen=True)
class Agreement:
    """Hold how far labels agree in pairs of pictures that show one place."""

    pairs: int
    together: Twice
    categories: dict[str, Twice]


def compares(pictures: int, places: Literal["auto", "all", "off"]) -> bool:
    """Say whether every two of so many pictures are compared."""
    return places == "all" or (places == "auto" and pictures <= MOST_COMPARED)


def small_copy(image: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """Return a picture in grey, upright, its longer side LONG pixels (one that is smaller stays as it is)."""
    plain = image if image.mode in ("L", "RGB", "I", "F") else Image.fromarray(to_rgb(image))
    scale = min(1.0, LONG / max(image.size))
    size = [max(1, round(side * scale)) for side in image.size]
    return np.asarray(turned_as(plain.convert("L").resize(size, Image.Resampling.BOX), image))


def find_pairs(views: Sequence[View]) -> list[Pair]:
    """Return the pairs that show one place: each picture with those before it, until MOST_PARTNERS are found."""
    groups: dict[tuple, list[View]] = defaultdict(list)
    for view in views:
        groups[view.size].append(view)
    num_pairs = sum(len(group) * (len(group) - 1) // 2 for group in groups.values())
    return [pair for group in groups.values() for pair in _pairs_of_one_size(group, num_pairs)]


def _pairs_of_one_size(views: Sequence[View], num_pairs: int) -> Iterator[Pair]:
    """Yield the pairs among pictures of one size: at first by shifting all at half size, then by a closer look."""
    if len(views) < 2 or min(views[0].small.shape) < 2 * PATCH:
        return
    small = torch.from_numpy(np.stack([view.small for view in views])).float()
    fine, independent = details_of(small, 15), num_details(small)
    scale = max(views[0].size) / max(views[0].small.shape)
    partners: Counter[int] = Counter()
    for first, second, (dx, dy), rough in _candidates(details_of(F.avg_pool2d(small[:, None], 2)[:, 0], 5)):
        if partners[second] == MOST_PARTNERS:
            continue
        both = seen_by_both(fine[first], fine[second], (2 * dx, 2 * dy))
        share = both[0].numel() / fine[first].numel()
        least = max(ALIKE, CHANCE * _by_chance(share * min(independent[first], independent[second]), num_pairs))
        if rough < ROUGH * least or correlation(*both) < NEARLY * least:
            continue
        found = {
            (x, y): correlation(*seen_by_both(fine[first], fine[second], (x, y)))
            for x in range(2 * dx - 2, 2 * dx + 3)
            for y in range(2 * dy - 2, 2 * dy + 3)
        }
        (dx, dy), alike = max(found.items(), key=lambda each: each[1])
        both = seen_by_both(fine[first], fine[second], (dx, dy))
        if alike >= least and spread(*both) >= SPREAD:
            x = dx + _vertex(found.get((dx - 1, dy)), alike, found.get((dx + 1, dy)))
            y = dy + _vertex(found.get((dx, dy - 1)), alike, found.get((dx, dy + 1)))
            share = both[0].numel() / fine[first].numel()
            partners[second] += 1
            yield Pair(views[first], views[second], (x * scale, y * scale), share, alike)


def _by_chance(independent: float, num_pairs: int) -> float:
    """Return the largest correlation to expect among so many unrelated pairs, each tried at as many shifts as details.

    >>> round(_by_chance(500, 66_000), 2)
    0.26
    """
    return math.sqrt(2 * math.log(max(2.0, independent * num_pairs)) / max(independent, 1e-9))


def _candidates(
    pictures: Float[Tensor, "image height width"],
) -> Iterator[tuple[int, int, tuple[int, int], float]]:
    """Yield every two pictures that agree somewhere when one is shifted over the other, by how much, and how well."""
    rows, columns = pictures.shape[1:]
    size = (2 * rows, 2 * columns)  # what is shifted out at one side must not come in at the other
    spectra = torch.fft.rfft2(pictures, s=size)
    everywhere = torch.fft.rfft2(torch.ones(rows, columns), s=size)
    common = torch.fft.irfft2(everywhere * everywhere.conj(), s=size).round()
    weight = (common >= SMALLEST * rows * columns) / common.clamp(min=1)
    for first in range(len(pictures) - 1):
        for start in range(first + 1, len(pictures), BLOCK):
            product = torch.fft.irfft2(spectra[first] * spectra[start : start + BLOCK].conj(), s=size) * weight
            best, where = product.flatten(1).max(1)
            for offset in (best >= ROUGH * ALIKE).nonzero().flatten().tolist():
                dy, dx = divmod(int(where[offset]), size[1])
                shift = ((dx + columns) % size[1] - columns, (dy + rows) % size[0] - rows)
                yield first, start + offset, shift, float(best[offset])


def details_of(pictures: Float[Tensor, "image height width"], window: int) -> Float[Tensor, "image height width"]:
    """Return pictures without their mean over a window about each pixel, with a standard deviation of 1.

    Shades that span a picture look alike in many; what is finer than the window tells places apart.
    """
    mean = F.avg_pool2d(pictures[:, None], window, 1, window // 2, count_include_pad=False)[:, 0]
    details = pictures - mean
    return details / details.std((1, 2), keepdim=True).clamp(min=1.0)  # less than a step of brightness is noise


def num_details(pictures: Float[Tensor, "image height width"]) -> list[float]:
    """Return how many details each picture has that are independent of each other: frequencies that share its power.

    The correlation of two unrelated pictures with n details has a standard deviation of about 1/√n.
    """
    power = torch.fft.fft2(details_of(pictures, 15)).abs().square().flatten(1)
    return (power.sum(1).square() / power.square().sum(1).clamp(min=1e-9)).tolist()


def seen_by_both(
    first: Float[Tensor, "height width"], second: Float[Tensor, "height width"], shift_xy: tuple[int, int]
) -> tuple[Float[Tensor, "common_h common_w"], Float[Tensor, "common_h common_w"]]:
    """Return what two pictures have in common where the second lies `shift_xy` to the right of, and below, the first.

    >>> seen_by_both(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 3.0, 4.0]]), (1, 0))
    (tensor([[2., 3.]]), tensor([[2., 3.]]))
    """
    (rows, columns), (dx, dy) = first.shape, shift_xy
    mine = first[max(0, dy) : max(0, rows + min(0, dy)), max(0, dx) : max(0, columns + min(0, dx))]
    return mine, second[max(0, -dy) : max(0, rows - max(0, dy)), max(0, -dx) : max(0, columns - max(0, dx))]


def correlation(first: Float[Tensor, "common_h common_w"], second: Float[Tensor, "common_h common_w"]) -> float:
    """Return the correlation of two patches, 0 where one of them is plain or too small to tell.

    >>> patch = torch.arange(16.0).reshape(4, 4)
    >>> correlation(patch, 3 * patch + 1), correlation(patch, torch.ones(4, 4))
    (1.0, 0.0)
    """
    if first.numel() < 16:
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    size = float((first.square().sum() * second.square().sum()).sqrt())
    return round(float((first * second).sum()) / size, 6) if size > 1e-6 else 0.0


def spread(first: Float[Tensor, "common_h common_w"], second: Float[Tensor, "common_h common_w"]) -> float:
    """Return over how many of BLOCKS × BLOCKS blocks the agreement of two patches is spread: those that share its sum.

    >>> spread(torch.ones(12, 12), torch.ones(12, 12)), spread(torch.eye(12), torch.eye(12))
    (36.0, 6.0)
    """
    agree = F.adaptive_avg_pool2d((first * second).clamp(min=0)[None], BLOCKS).flatten()
    return float(agree.sum().square() / agree.square().sum().clamp(min=1e-9))


def _vertex(before: float | None, here: float, behind: float | None) -> float:
    """Return where the parabola through three neighbouring correlations is largest, −0.5 to 0.5 from the middle one."""
    if before is None or behind is None or (bend := before - 2 * here + behind) >= 0:
        return 0.0
    return min(0.5, max(-0.5, 0.5 * (before - behind) / bend))


def rank(split: str) -> int:
    """Return where a split stands among the others: what is trained on, then what chooses the model, then the test."""
    return ORDER.get(split, 0)


def shared_places(pairs: Sequence[Pair]) -> list[Finding]:
    """Return what two splits share: for each picture, that one of the first split before its own that shows most of it.

    The first of each pair is of the same split or one before it.
    """
    best: dict[Path, Pair] = {}
    for pair in sorted(pairs, key=lambda each: (rank(each.first.raw.split), -each.share)):
        if pair.first.raw is not pair.second.raw:
            best.setdefault(pair.second.path, pair)
    return [Finding("splits-share-place", "warning", _words(pair)) for pair in best.values()]


def _words(pair: Pair) -> str:
    first, second, (x, y) = pair.first, pair.second, pair.shift_xy
    text = f"{second.path} ({second.raw.split}) looks like {first.path} ({first.raw.split})"
    moved = f"moved by {round(-x)} and {round(-y)} pixels, {pair.share:.0%} of it one place"
    return f"{text} {moved}: put both into one split"


def agreement(pairs: Sequence[Pair]) -> Agreement | None:
    """Return how far labels agree where a place was labelled twice; None where none was.

    An object counts if both pictures show the whole of it and it looks the same in both, so that what has moved before
    a camera that stands still is left out.
    """
    labels: dict[str, int] = defaultdict(int)
    ious: dict[str, list[tuple[float, float]]] = defaultdict(list)
    boxes = _boxes_of(pairs)
    for pair in pairs:
        first, second = (
            [(name, xyxy) for name, xyxy in _moved(boxes[_key(view)], shift) if _same_in_both(pair, xyxy)]
            for view, shift in ((pair.first, (0.0, 0.0)), (pair.second, pair.shift_xy))
        )
        for name, _ in (*first, *second):
            labels[name] += 1
        for name in {name for name, _ in first} & {name for name, _ in second}:
            mine, other = (torch.tensor([xyxy for each, xyxy in side if each == name]) for side in (first, second))
            overlaps = iou(mine[:, None], other[None])
            i, j = map(torch.from_numpy, linear_sum_assignment(overlaps.numpy(), maximize=True))
            # two labels with independent errors are √2 times as far apart as one of them from the truth
            true = mine[i] + (other[j] - mine[i]) / math.sqrt(2)
            both = zip(overlaps[i, j].tolist(), iou(mine[i], true).tolist(), strict=True)
            ious[name] += [each for each in both if each[0] >= IOUS[0]]
    if not labels:
        return None
    categories = {name: _twice(labels[name], ious[name]) for name in sorted(labels)}
    return Agreement(
        len(pairs), _twice(sum(labels.values()), [each for own in ious.values() for each in own]), categories
    )


def _twice(labels: int, ious: Sequence[tuple[float, float]]) -> Twice:
    """Return the numbers of one category, from the IoU of each two partners and that of one with the likely truth.

    >>> _twice(5, [(0.5, 0.6), (0.75, 0.8)])
    Twice(labels=5, paired=0.8, iou=0.625, within=0.35, ideal=0.5)
    """
    if not ious:
        return Twice(labels, 0.0, None, None, None)
    within, ideal = np.mean([[np.greater_equal(each, least) for least in IOUS] for each in ious], axis=(0, 1)).tolist()
    return Twice(labels, 2 * len(ious) / labels, float(np.mean(ious, axis=0)[0]), within, ideal)


def _boxes_of(pairs: Sequence[Pair]) -> dict[tuple[int, int], list[Box]]:
    """Return the objects of every picture that is in a pair; neither regions to be ignored nor what is no box."""
    boxes: dict[tuple[int, int], list[Box]] = {_key(view): [] for pair in pairs for view in pair[:2]}
    for raw in {id(view.raw): view.raw for pair in pairs for view in pair[:2]}.values():
        for box in raw.boxes:
            sound = all(map(math.isfinite, box.box_xywh)) and min(box.box_xywh[2:]) > 0
            if (id(raw), box.picture) in boxes and sound and not box.crowd:
                boxes[id(raw), box.picture].append(box)
    return boxes


def _key(view: View) -> tuple[int, int]:
    return id(view.raw), view.number


def _moved(boxes: Sequence[Box], shift_xy: tuple[float, float]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield the name of each object and its corners after a shift."""
    for box in boxes:
        left, top = box.box_xywh[0] + shift_xy[0], box.box_xywh[1] + shift_xy[1]
        yield box.name, (left, top, left + box.box_xywh[2], top + box.box_xywh[3])


def _same_in_both(pair: Pair, box_xyxy: Sequence[float]) -> bool:
    """Say whether both pictures show the whole of a box, which lies in the first one's pixels, and the same in it."""
    size, shape = np.array(pair.first.size), np.array(pair.first.small.shape[::-1])
    corners, shift = np.array(box_xyxy).reshape(2, 2), np.array(pair.shift_xy)
    margin = MARGIN * size.max()
    if (corners[0] < np.maximum(0, shift) + margin).any() or (corners[1] > size + np.minimum(0, shift) - margin).any():
        return False
    scale = shape.max() / size.max()
    steps = (shift * scale).round().astype(int)
    mine, other = (torch.tensor(view.small).float() for view in (pair.first, pair.second))
    both = seen_by_both(mine, other, (int(steps[0]), int(steps[1])))
    wide = max(PATCH, (corners[1] - corners[0]).max() * scale) / 2
    middle = corners.mean(0) * scale - np.maximum(0, steps)
    (left, top), (right, bottom) = np.maximum(0, middle - wide).astype(int), np.ceil(middle + wide).astype(int)
    return correlation(*(part[top:bottom, left:right] for part in both)) >= SAME
