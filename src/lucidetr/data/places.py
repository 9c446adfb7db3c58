"""Pictures that show one place from two positions: tiles of one scan, views through a microscope, frames of a film.

Where two splits share a place, what was learned by heart counts as found. Pairs are found by normalised
cross-correlation (Lewis 1995, "Fast normalized cross-correlation") of small grey copies: shifts alone, neither turns
nor zooms, between pictures of one size that have enough details to be told apart.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lucidetr.data.decoding import to_rgb, turned_as
from lucidetr.data.raw import Finding, Raw

LONG = 128  # pixels of the longer side of a small copy
SHORTEST = 16  # and of the shorter one, at least
SMALLEST = 0.15  # share of a picture that two must have in common
ALIKE = 0.75  # correlation from which on two show one place
ROUGH = 0.65  # times as much at half that size makes a candidate,
NEARLY = 0.75  # and times as much at the full size before the shift is exact
CHANCE = 1.25  # times the largest correlation that chance brings about among so many pairs
BLOCKS, SPREAD = 6, 12  # of 6 × 6 blocks of what both see, so many must agree: one shape on a plain page is no place
BLOCK = 64  # pictures that one is compared with at a time
MOST_COMPARED = 1000  # pictures: of more, every two are compared only if that is asked for
MOST_PARTNERS = 20  # of a picture that are written down: before a camera that stands, all pictures show one place
ORDER = {"train": 0, "val": 1, "test": 2}


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
    """Return pairs that show one place, so many that they link all pictures of it.

    Each picture is compared with those before it; once it has MOST_PARTNERS, only with those that are not linked to it.
    """
    groups: dict[tuple, list[View]] = defaultdict(list)
    for view in views:
        groups[view.size].append(view)
    num_pairs = sum(len(group) * (len(group) - 1) // 2 for group in groups.values())
    return [pair for group in groups.values() for pair in _pairs_of_one_size(group, num_pairs)]


def _pairs_of_one_size(views: Sequence[View], num_pairs: int) -> Iterator[Pair]:
    """Yield the pairs among pictures of one size: at first by shifting all at half size, then by a closer look."""
    if len(views) < 2 or min(views[0].small.shape) < SHORTEST:
        return
    small = torch.from_numpy(np.stack([view.small for view in views])).float()
    fine = details_of(small, 15)
    independent = num_details(fine)
    scale = max(views[0].size) / max(views[0].small.shape)
    partners, links = Counter[int](), Links(len(views))
    for first, second, (dx, dy), rough in _candidates(details_of(F.avg_pool2d(small[:, None], 2)[:, 0], 5)):
        if partners[second] >= MOST_PARTNERS and links.root(first) == links.root(second):
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
            links.join(first, second)
            yield Pair(views[first], views[second], (x * scale, y * scale), share)


class Links:
    """Hold which of so many things are linked, directly or by way of others (union-find, Tarjan 1975).

    >>> links = Links(4)
    >>> links.join(0, 2), links.join(2, 3)
    (None, None)
    >>> [links.root(each) for each in range(4)]
    [0, 1, 0, 0]
    """

    def __init__(self, number: int) -> None:
        """Begin with nothing linked."""
        self.above = list(range(number))

    def root(self, each: int) -> int:
        """Return what stands for all that are linked to one."""
        while self.above[each] != each:
            self.above[each] = each = self.above[self.above[each]]
        return each

    def join(self, first: int, second: int) -> None:
        """Link two."""
        first, second = self.root(first), self.root(second)
        self.above[max(first, second)] = min(first, second)


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


def num_details(details: Float[Tensor, "image height width"]) -> list[float]:
    """Return how many details each picture has that are independent of each other: frequencies that share its power.

    The correlation of two unrelated pictures with n details has a standard deviation of about 1/√n.
    """
    power = torch.fft.fft2(details).abs().square().flatten(1)
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


def paths(pair: Pair) -> frozenset[Path]:
    """Return the two files of a pair."""
    return frozenset((pair.first.path, pair.second.path))


def rank(split: str) -> int:
    """Return where a split stands among the others: what is trained on, then what chooses the model, then the test."""
    return ORDER.get(split, 0)


def shared_places(pairs: Sequence[Pair]) -> list[Finding]:
    """Return what two splits share: for each picture that of an earlier split, training first, with most in common.

    The first of each pair is of the same split or of an earlier one.
    """
    best: dict[Path, Pair] = {}
    for pair in sorted(pairs, key=lambda each: (rank(each.first.raw.split), -each.share)):
        if pair.first.raw is not pair.second.raw:
            best.setdefault(pair.second.path, pair)
    return [Finding("splits-share-place", "warning", _words(pair)) for pair in best.values()]


def _words(pair: Pair) -> str:
    first, second, (x, y) = pair.first, pair.second, pair.shift_xy
    text = f"{second.path} ({second.raw.split}) looks like {first.path} ({first.raw.split})"
    across, down = (
        f"{abs(x):.0f} pixels to the {'left' if x > 0 else 'right'}",
        f"{abs(y):.0f} {'up' if y > 0 else 'down'}",
    )
    return f"{text} moved {across} and {down}, {pair.share:.0%} of it one place: put both into one split"
