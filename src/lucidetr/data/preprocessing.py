"""How a picture becomes the model's input: one resize, one normalisation, one padding, for every command.

The settings (`ImageConfig`) travel in the model's card, so training, evaluation and prediction are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from lucidetr.boxes import xyxy_to_cxcywh
from lucidetr.config import ImageConfig
from lucidetr.structures import Batch, Target


@dataclass(frozen=True, eq=False)
class Sample:
    """Hold one resized image, its target in resized pixels, and the id and size of the original picture."""

    image: UInt8[Tensor, "3 height width"]
    target: Target
    image_id: int
    size: tuple[int, int]  # height, width of the original picture


def resized_size(height: int, width: int, config: ImageConfig, short: int | None = None) -> tuple[int, int]:
    """Return the (height, width) that a picture is resized to; `short` replaces config.size.

    Where max_size limits, the long side is max_size; the published code computes it from the rounded short side, and
    may end a few pixels beside it.

    >>> resized_size(480, 640, ImageConfig(size=800, max_size=1333))
    (800, 1066)
    >>> resized_size(200, 1000, ImageConfig(size=800, max_size=1333))
    (267, 1333)
    """
    short = short or config.size
    if config.resize == "square":
        return short, short
    low, high = min(height, width), max(height, width)
    long = int(short * high / low)
    if high / low * short > config.max_size:
        short, long = max(round(config.max_size * low / high), 1), config.max_size
    return (short, long) if height <= width else (long, short)


def resize(image: UInt8[Tensor, "3 height width"], size: tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """Return the picture at another (height, width): bilinear with antialiasing."""
    return tv.resize(image, list(size), antialias=True) if tuple(image.shape[-2:]) != size else image


def prepare(image: UInt8[Tensor, "3 height width"], config: ImageConfig, image_id: int = 0) -> Sample:
    """Return a picture without objects as the model will see it."""
    height, width = image.shape[-2:]
    nothing = Target(boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return Sample(resize(image, resized_size(height, width, config)), nothing, image_id, (height, width))


def normalise(
    images: Shaped[Tensor, "*any 3 height width"], config: ImageConfig
) -> Float[Tensor, "*any 3 height width"]:
    """Return pixels in 0…255 minus the mean and divided by the deviation of each colour."""
    mean = torch.tensor(config.mean)[:, None, None] * 255
    std = torch.tensor(config.std)[:, None, None] * 255
    return (images - mean) / std


def make_batch(samples: Sequence[Sample], config: ImageConfig) -> Batch:
    """Normalise the images, pad them to the largest height and width, pad the objects to the largest count.

    Padding is zero after normalisation, to the right and below (DETR, section 3.2).
    """
    height = max(s.image.shape[1] for s in samples)
    width = max(s.image.shape[2] for s in samples)
    most = max(len(s.target.labels) for s in samples)
    images = torch.zeros(len(samples), 3, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    boxes_cxcywh = torch.zeros(len(samples), most, 4)
    labels = torch.zeros(len(samples), most, dtype=torch.long)
    for i, sample in enumerate(samples):
        h, w = sample.image.shape[1:]
        images[i, :, :h, :w] = normalise(sample.image, config)
        padding[i, :h, :w] = False
        count = len(sample.target.labels)
        boxes_cxcywh[i, :count] = xyxy_to_cxcywh(sample.target.boxes_xyxy) / torch.tensor([w, h, w, h])
        labels[i, :count] = sample.target.labels
    return Batch(
        images=images,
        padding=padding,
        boxes_cxcywh=boxes_cxcywh,
        labels=labels,
        counts=torch.tensor([len(s.target.labels) for s in samples]),
        image_ids=tuple(s.image_id for s in samples),
        sizes=tuple(s.size for s in samples),
    )
