"""Generated scenes: real handwritten digits over crops of real photographs, from scikit-learn, no download.

The default set is fixed, because figures are compared on it. Image i of a split depends on nothing but the
parameters, the split and i.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.errors import InputError, did_you_mean

NAME = "generated:digits"
SPLITS = {"train": 0, "val": 1}
SOURCE_DIGITS = {"train": (0, 1200), "val": (1200, 1797)}  # no writer's digit is in both
CATEGORIES = Categories(ids=tuple(range(10)), names=tuple("0123456789"))
CROP_SIDES = (128, 400)
BRIGHTNESS = 0.6
COLOURS = (120, 255)
BOX_ALPHA = 0.3  # a digit's box holds its pixels above this
PLACEMENT_TRIES = 100


@dataclass(frozen=True)
class DigitsConfig:
    """Set the scenes: side in pixels, digits per image, their sides, and how many images."""

    size: int = 128
    objects: tuple[int, int] = (1, 8)
    digit: tuple[int, int] = (14, 47)
    train: int = 4000
    val: int = 500
    seed: int = 0


def parse(text: str) -> DigitsConfig:
    """Return the config that a name such as generated:digits?size=256&objects=5-60 stands for.

    >>> parse("generated:digits?objects=5-60").objects
    (5, 60)
    """
    name, _, query = text.partition("?")
    if name != NAME:
        raise InputError(f"{text}: unknown generated data; known: {NAME}")
    defaults, values = DigitsConfig(), {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in vars(defaults):
            raise InputError(f"{text}: unknown parameter {key}: {did_you_mean(key, vars(defaults))}")
        low, _, high = value.partition("-")
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise InputError(f"{text}: {key} = {value!r}; expected a number, or a range such as 5-60")
        pair = isinstance(getattr(defaults, key), tuple)
        if high and not pair:
            raise InputError(f"{text}: {key} = {value!r}; expected one number")
        values[key] = (int(low), int(high or low)) if pair else int(low)
    config = DigitsConfig(**values)
    low, high = config.digit
    if not (8 <= low <= high <= config.size) or config.size > 2048:
        raise InputError(f"{text}: digits of {low}…{high} pixels in a picture of {config.size} (at most 2048)")
    if not 0 <= config.objects[0] <= config.objects[1] or config.train < 1 or config.val < 1:
        raise InputError(f"{text}: objects={config.objects}, train={config.train}, val={config.val} is no data set")
    return config


@functools.cache
def _source() -> tuple[UInt8[Tensor, "2 3 427 640"], Tensor, np.ndarray]:
    """Return the two photographs, the 1,797 digits in 0…1 and their classes."""
    from sklearn.datasets import load_digits, load_sample_images

    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    pixels, classes = load_digits(return_X_y=True)
    return photos, torch.from_numpy(pixels).float().view(-1, 8, 8) / 16, np.asarray(classes)


@dataclass(frozen=True)
class Placed:
    """Say which digit lies where in a scene, at what side, in which colour."""

    source: int
    side: int
    left: int
    top: int
    colour: tuple[int, int, int]


@functools.lru_cache(maxsize=4096)
def _alpha(source: int, side: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return a digit's opacity at that side, and left, top, width, height of its ink in it."""
    alpha = F.interpolate(_source()[1][source][None, None], (side, side), mode="bilinear")[0, 0]
    ink = (alpha > BOX_ALPHA).nonzero()
    (y0, x0), (y1, x1) = ink.amin(0).tolist(), (ink.amax(0) + 1).tolist()
    return alpha, (x0, y0, x1 - x0, y1 - y0)


class DigitScenes:
    """Draw the scenes of a split: what is in scene `index` is laid out first, and painted only when it is looked at."""

    def __init__(self, config: DigitsConfig, split: str):
        if split not in SPLITS:
            raise InputError(f"{NAME} has no split {split}: {did_you_mean(split, SPLITS)}")
        self.config, self.split = config, split

    def __len__(self) -> int:
        return self.config.train if self.split == "train" else self.config.val

    def layout(self, index: int) -> tuple[tuple[int, int, int, int], list[Placed]]:
        """Return photograph, side, top and left of the background's crop, and the digits.

        A crowded scene may end up with fewer digits than drawn for it: a digit that finds no free place after
        100 tries is left out.
        """
        config = self.config
        random = np.random.default_rng([config.seed, SPLITS[self.split], index])
        which = int(random.integers(2))
        _, _, height, width = _source()[0].shape
        crop = int(random.integers(CROP_SIDES[0], CROP_SIDES[1] + 1))
        top, left = int(random.integers(height - crop + 1)), int(random.integers(width - crop + 1))
        placed: list[Placed] = []
        for _ in range(random.integers(config.objects[0], config.objects[1] + 1)):
            side = int(random.integers(config.digit[0], config.digit[1] + 1))
            source = int(random.integers(*SOURCE_DIGITS[self.split]))
            red, green, blue = random.integers(COLOURS[0], COLOURS[1] + 1, 3).tolist()
            place = self._free_place(random, side, placed)
            if place:
                placed.append(Placed(source, side, *place, (red, green, blue)))
        return (which, crop, top, left), placed

    def picture(self, index: int) -> UInt8[Tensor, "3 size size"]:
        """Return the pixels of scene `index`: digits over a darkened crop of a photograph."""
        (which, crop, top, left), placed = self.layout(index)
        photo = _source()[0][which, None, :, top : top + crop, left : left + crop].float()
        size = (self.config.size, self.config.size)
        scene = F.interpolate(photo, size, mode="bilinear", antialias=True)[0] * BRIGHTNESS
        for digit in placed:
            alpha, _ = _alpha(digit.source, digit.side)
            window = scene[:, digit.top : digit.top + digit.side, digit.left : digit.left + digit.side]
            window += alpha * (torch.tensor(digit.colour).float()[:, None, None] - window)
        return scene.round().clamp(0, 255).to(torch.uint8)

    def boxes(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes [object, 4] of scene `index` as left, top, width, height, and their labels."""
        classes = _source()[2]
        _, placed = self.layout(index)
        boxes = []
        for digit in placed:
            x, y, width, height = _alpha(digit.source, digit.side)[1]
            boxes.append([digit.left + x, digit.top + y, width, height])
        labels = [classes[digit.source] for digit in placed]
        return np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(labels, dtype=np.int64)

    def _free_place(self, random: np.random.Generator, side: int, placed: list[Placed]) -> tuple[int, int] | None:
        """Return a left and top where a digit overlaps no other, or None."""
        for _ in range(PLACEMENT_TRIES):
            left, top = random.integers(0, self.config.size - side + 1, 2).tolist()
            if all(
                d.left + d.side <= left or left + side <= d.left or d.top + d.side <= top or top + side <= d.top
                for d in placed
            ):
                return left, top
        return None

    def annotations(self) -> Annotations:
        """Return the boxes of the whole split; image ids start at 1 as in COCO files."""
        scenes = [self.boxes(index) for index in range(len(self))]
        boxes = np.concatenate([boxes for boxes, _ in scenes])
        count = len(self)
        image = np.repeat(np.arange(count), [len(labels) for _, labels in scenes])
        names = np.array([f"{index + 1:06d}.png" for index in range(count)])
        pictures = Pictures(np.arange(1, count + 1), names, np.full((count, 2), self.config.size))
        objects = Objects.numbered(image, boxes, np.concatenate([labels for _, labels in scenes]).tolist())
        return gather(CATEGORIES, Path(self.split), pictures, objects, np.ones(len(boxes), dtype=bool))
