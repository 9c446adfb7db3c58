"""Random changes of square images, a whole batch at once: one affine map for pixels and boxes, colour as arithmetic.

Every draw of a sample comes from its own seed. All arithmetic is pixel by pixel (or exact), so a sample is the same
bit for bit whatever shares its batch and however many threads make it. Places are measured from the picture's centre
in half sides: −1 and 1 are its edges, as in torch's grid_sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from lucidetr.config import AugmentationConfig, ImageConfig
from lucidetr.data.dataset import Dataset
from lucidetr.data.preprocessing import normalise
from lucidetr.structures import Batch

SMALLEST_SHARE = 0.15  # of a box's area; with less of it left inside, what it held cannot be told
SIDE_STEP = 32  # growing images have sides that every backbone's strides divide
GREY = (0.299, 0.587, 0.114)  # luma of red, green, blue (ITU-R BT.601)
PIXELS_AT_ONCE = 2**16  # what is in work fits the processor's cache, and its memory need not be fetched anew
SPARSE = 4  # every fourth pixel tells an image's mean grey

# One number in 0…1 for each decision about a sample, always in this order: turning one change off leaves the others.
DRAWS = ("flip", "flip_vertical", "turn", "direction", "zoom", "shift_x", "shift_y")
DRAWS += ("brightness", "contrast", "saturation", "mosaic", "place", "second", "third", "fourth")
Draws = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class BatchObjects:
    """Hold the objects of all images of a batch in one list, those of its first image first."""

    image: Int[np.ndarray, " object"]
    boxes_xyxy: Float[np.ndarray, "object 4"]  # in half sides from the centre
    labels: Int[np.ndarray, " object"]


class BatchAugmentation:
    """Make changed batches of square images as the config lists it, at the side that the run has reached."""

    def __init__(self, config: AugmentationConfig, images: ImageConfig):
        self.config, self.images = config, images

    def __call__(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        seeds: Sequence[int],
        progress: float,
        usable: Callable[[int], int] = int,
    ) -> Batch:
        """Return the images `indices` changed; `progress` is the share of the run that is done.

        `usable` says which image to take for one that a mosaic asks for.
        """
        config = self.config
        draws = draw(seeds)
        pictures, objects = self.scenes(dataset, indices, draws, progress, usable)
        maps = affine_maps(draws, config)
        side = side_at(progress, config, self.images)
        few = max(PIXELS_AT_ONCE // self.images.size**2, 1)
        parts = [slice(start, start + few) for start in range(0, len(indices), few)]
        images = torch.cat([self.pixels(pictures[each], draws_of(draws, each), maps[each], side) for each in parts])
        sizes = [(int(height), int(width)) for height, width in dataset.annotations.sizes[list(indices)]]
        ids = dataset.annotations.image_ids[list(indices)].tolist()
        return collated(images, moved_objects(objects, maps), tuple(ids), tuple(sizes))

    def pixels(
        self,
        pictures: UInt8[Tensor, "batch 3 height width"],
        draws: Draws,
        maps: Float[np.ndarray, "batch 2 3"],
        side: int,
    ) -> Float[Tensor, "batch 3 h w"]:
        """Return pictures coloured, normalised and moved."""
        spread = self.config.colour
        return moved(normalise(coloured(pictures, draws, spread) if spread else pictures, self.images), maps, side)

    def scenes(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        draws: Draws,
        progress: float,
        usable: Callable[[int], int] = int,
    ) -> tuple[UInt8[Tensor, "batch 3 size size"], BatchObjects]:
        """Return the pictures before any change, single or as mosaics, and their objects."""
        config = self.config
        in_time = config.mosaic_from <= progress < config.mosaic_until
        chosen = draws["mosaic"] < (config.mosaic if in_time else 0.0)
        pictures, boxes, labels = [], [], []
        for i, index in enumerate(indices):
            if chosen[i]:
                four = [usable(int(draws[name][i] * len(dataset))) for name in ("second", "third", "fourth")]
                four.insert(int(draws["place"][i] * 4), index)
                scene = mosaic(dataset, four, self.images.size)
            else:
                scene = picture(dataset, index, self.images.size)
            pictures.append(scene[0])
            boxes.append(scene[1])
            labels.append(scene[2])
        owner = np.repeat(np.arange(len(indices)), [len(each) for each in labels])
        return torch.stack(pictures), BatchObjects(owner, 2 * np.concatenate(boxes) - 1, np.concatenate(labels))


def picture(
    dataset: Dataset, index: int, side: int
) -> tuple[UInt8[Tensor, "3 size size"], Float[np.ndarray, "object 4"], Int[np.ndarray, " object"]]:
    """Return one image at side × side pixels, its boxes' corners as fractions of it, and their labels."""
    corners, labels = dataset.annotations.objects(index)
    height, width = dataset.annotations.sizes[index]
    return dataset.square(index, side), corners / (width, height, width, height), labels


def mosaic(
    dataset: Dataset, indices: Sequence[int], side: int
) -> tuple[UInt8[Tensor, "3 size size"], Float[np.ndarray, "object 4"], Int[np.ndarray, " object"]]:
    """Return four images, row by row, in the four quarters of one (Bochkovskiy et al. 2020), as `picture` does."""
    scene = torch.empty(3, side, side, dtype=torch.uint8)
    half = (side + 1) // 2  # of an odd side: the quarters then share a line
    starts = (0, side - half)
    boxes, labels = [], []
    for index, (top, left) in zip(indices, ((y, x) for y in starts for x in starts), strict=True):
        pixels, corners, kinds = picture(dataset, index, half)
        scene[:, top : top + half, left : left + half] = pixels
        boxes.append((corners * half + (left, top, left, top)) / side)
        labels.append(kinds)
    return scene, np.concatenate(boxes), np.concatenate(labels)


def draw(seeds: Sequence[int]) -> Draws:
    """Return all random numbers of a batch by name, each in 0…1 and of its sample's own seed."""
    numbers = np.stack([np.random.default_rng(seed).random(len(DRAWS)) for seed in seeds])
    return dict(zip(DRAWS, numbers.T, strict=True))


def draws_of(draws: Draws, part: slice) -> Draws:
    """Return the random numbers of some images of a batch."""
    return {name: numbers[part] for name, numbers in draws.items()}


def side_at(progress: float, config: AugmentationConfig, images: ImageConfig) -> int:
    """Return the side of the images once `progress` of the run is done: it grows linearly, by whole strides.

    >>> growing = AugmentationConfig(start_size=0.5, full_size_at=0.5)
    >>> [side_at(done, growing, ImageConfig(size=160)) for done in (0.0, 0.2, 0.4, 0.5, 1.0)]
    [64, 128, 128, 160, 160]
    """
    done = min(progress / config.full_size_at, 1.0) if config.full_size_at else 1.0
    share = config.start_size + (1 - config.start_size) * done
    if share >= 1:
        return images.size
    return min(max(round(share * images.size / SIDE_STEP), 1) * SIDE_STEP, images.size)


def affine_maps(draws: Draws, config: AugmentationConfig) -> Float[np.ndarray, "batch 2 3"]:
    """Return the matrices that take a place in each picture to its place in the changed one.

    Mirror, then quarter turn, then zoom about the centre, then shift.
    """
    count = len(draws["zoom"])
    maps = np.zeros((count, 2, 3))
    maps[:, 0, 0] = np.where(draws["flip"] < config.flip, -1.0, 1.0)
    maps[:, 1, 1] = np.where(draws["flip_vertical"] < config.flip_vertical, -1.0, 1.0)
    turned = draws["turn"] < config.turn
    sense = np.where(draws["direction"] < 0.5, -1.0, 1.0)[turned, None]
    maps[turned, 0], maps[turned, 1] = -sense * maps[turned, 1], sense * maps[turned, 0]
    maps *= factors(draws["zoom"], config.zoom)[:, None, None]
    maps[:, :, 2] = 2 * config.shift * (2 * np.stack([draws["shift_x"], draws["shift_y"]], 1) - 1)
    return maps


def factors(numbers: Float[np.ndarray, " batch"], spread: float) -> Float[np.ndarray, " batch"]:
    """Return numbers in 0…1 as factors 1 − spread … 1 + spread."""
    return 1 + spread * (2 * numbers - 1)


def moved(
    images: Float[Tensor, "batch 3 height width"], maps: Float[np.ndarray, "batch 2 3"], side: int
) -> Float[Tensor, "batch 3 h w"]:
    """Return the normalised pictures moved by their maps, at side × side pixels; what comes in from outside is zero."""
    linear, shift = np.linalg.inv(maps[:, :, :2]), maps[:, :, 2]
    offset = -np.einsum("bij,bj->bi", linear, shift)
    centres = (2 * np.arange(side) + 1) / side - 1
    # place looked up = linear · (column, row) + offset; a sum of what the column gives and what the row gives
    by_column = linear[:, None, :, 0] * centres[:, None]
    by_row = linear[:, None, :, 1] * centres[:, None] + offset[:, None]
    grid = torch.from_numpy(by_row).float()[:, :, None] + torch.from_numpy(by_column).float()[:, None]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def moved_objects(objects: BatchObjects, maps: Float[np.ndarray, "batch 2 3"]) -> BatchObjects:
    """Return the objects moved by their images' maps and cut to the picture; those of which too little is left go."""
    own = maps[objects.image]
    corners = objects.boxes_xyxy.reshape(-1, 2, 2) @ own[:, :, :2].swapaxes(1, 2) + own[:, None, :, 2]
    low, high = corners.min(1), corners.max(1)
    boxes = np.concatenate([low, high], 1).clip(-1, 1)
    sides = boxes[:, 2:] - boxes[:, :2]
    whole = (high - low).prod(1)
    keep = sides.prod(1) >= SMALLEST_SHARE * whole
    return BatchObjects(objects.image[keep], boxes[keep], objects.labels[keep])


def coloured(
    images: UInt8[Tensor, "batch 3 height width"], draws: Draws, spread: float
) -> Float[Tensor, "batch 3 height width"]:
    """Return pictures in 0…255 with brightness, then contrast, then saturation times 1 − spread … 1 + spread.

    Contrast is measured from the picture's mean grey, saturation from each pixel's grey; both being linear, the
    three are one sum: saturation · (contrast · brightness · pixel) + …, cut to 0…255 once at the end.
    """
    bright, contrast, vivid = (factors(draws[name], spread) for name in ("brightness", "contrast", "saturation"))
    sums = images[:, :, ::SPARSE, ::SPARSE].sum((2, 3), dtype=torch.float64)  # whole numbers: exact in any order
    mean = sums.numpy() / images[0, 0, ::SPARSE, ::SPARSE].numel() @ np.array(GREY)
    of_pixel, of_grey, constant = (
        torch.from_numpy(each).float()[:, None, None, None]
        for each in (vivid * contrast * bright, (1 - vivid) * contrast * bright, (1 - contrast) * bright * mean)
    )
    pixels = images.float()
    grey = pixels[:, :1] * GREY[0] + pixels[:, 1:2] * GREY[1] + pixels[:, 2:] * GREY[2]
    return pixels.mul_(of_pixel).add_(grey * of_grey + constant).clamp_(0, 255)


def collated(
    images: Float[Tensor, "batch 3 height width"],
    objects: BatchObjects,
    ids: tuple[int, ...],
    sizes: tuple[tuple[int, int], ...],
) -> Batch:
    """Return images of one size and their objects as a batch, the objects padded to the largest count."""
    counts = np.bincount(objects.image, minlength=len(images))
    slots = np.arange(len(objects.image)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(images), int(counts.max()))
    boxes_cxcywh, labels = np.zeros((*shape, 4), dtype=np.float32), np.zeros(shape, dtype=np.int64)
    low, high = objects.boxes_xyxy[:, :2], objects.boxes_xyxy[:, 2:]
    boxes_cxcywh[objects.image, slots] = np.concatenate([(low + high) / 4 + 0.5, (high - low) / 2], 1)
    labels[objects.image, slots] = objects.labels
    return Batch(
        images=images,
        padding=torch.zeros(len(images), *images.shape[2:], dtype=torch.bool),
        boxes_cxcywh=torch.from_numpy(boxes_cxcywh),
        labels=torch.from_numpy(labels),
        counts=torch.from_numpy(counts),
        image_ids=ids,
        sizes=sizes,
    )
