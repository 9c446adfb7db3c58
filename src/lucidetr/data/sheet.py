"""A sheet of pictures with their boxes: the quickest check that labels mean what one thinks."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lucidetr.boxes import cxcywh_to_xyxy
from lucidetr.config import ImageConfig, TrainConfig
from lucidetr.data.batching import Cut, Steps, build_augmentation
from lucidetr.data.dataset import Dataset
from lucidetr.drawing import draw_boxes
from lucidetr.structures import Batch

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CELL = 320  # pixels
GAP = 8
PAPER = (128, 128, 128)


def draw_sheet(dataset: Dataset, number: int, seed: int) -> Image.Image:
    """Return a sheet of up to `number` images drawn at random, each with boxes and category names."""
    number = min(number, len(dataset))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:number]).tolist()
    return arrange([draw_truth(dataset, index) for index in chosen], CELL, CELL)


def draw_augmented(dataset: Dataset, config: TrainConfig, number: int, versions: int) -> Image.Image:
    """Return a sheet with a row for each of `number` images drawn at random: as it is, then as its first epochs see it.

    The versions are those of a run with this config and seed, at its start.
    """
    number = min(number, len(dataset))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(dataset))[:number]).tolist()
    change = build_augmentation(config.augmentation, config.images)
    cut = Cut(batch=versions, micro_batch=versions)
    plain = Steps(dataset, config.images, None, config.seed, cut)
    changed = Steps(dataset, config.images, change, config.seed, cut)
    cells: list[Image.Image] = []
    for index in chosen:
        epochs = [(epoch, index) for epoch in range(versions)]
        for batch in (plain.part(epochs[:1], 0.0), changed.part(epochs, 0.0)):
            cells += draw_batch(batch, config.images, dataset.annotations.categories.names)
    return arrange(cells, CELL, columns=versions + 1)


def arrange(pictures: list[Image.Image], cell: int, column: int = 0, columns: int = 0) -> Image.Image:
    """Return a sheet of pictures, shrunk in place to at most `cell` pixels a side, in so many columns.

    Left out, they are about four to three rows. Columns are `column` pixels wide, or as wide as the widest picture.
    """
    for picture in pictures:
        picture.thumbnail((cell, cell))
    columns = columns or max(round(float(np.sqrt(len(pictures) * 4 / 3))), 1)
    rows = -(-len(pictures) // columns)
    width = (column or max(picture.width for picture in pictures)) + GAP
    height = max(picture.height for picture in pictures) + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), PAPER)
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (GAP + place % columns * width, GAP + place // columns * height))
    return sheet


def draw_truth(dataset: Dataset, index: int) -> Image.Image:
    """Return one image with its true boxes and their names."""
    boxes_xyxy, labels = dataset.annotations.objects(index)
    names = [dataset.annotations.categories.names[label] for label in labels.tolist()]
    boxes = torch.from_numpy(boxes_xyxy.astype(np.float32))
    return draw_boxes(dataset.image(index), boxes, names, labels.tolist())


def draw_batch(part: Batch, images: ImageConfig, names: tuple[str, ...]) -> Iterator[Image.Image]:
    """Yield each image of a batch with its boxes; a small one grows, so that names do not cover it."""
    pixels = denormalise(part.images, images)
    times = max(CELL // max(pixels.shape[-2:]), 1)
    pixels = pixels.repeat_interleave(times, 2).repeat_interleave(times, 3)
    for i, count in enumerate(part.counts.tolist()):
        seen = ~part.padding[i]
        height, width = int(seen.any(1).sum()), int(seen.any(0).sum())
        boxes = cxcywh_to_xyxy(part.boxes_cxcywh[i, :count]) * torch.tensor([width, height, width, height]) * times
        labels = part.labels[i, :count].tolist()
        yield draw_boxes(pixels[i], boxes, [names[label] for label in labels], labels)


def denormalise(
    pixels: Float[Tensor, "batch 3 height width"], images: ImageConfig
) -> UInt8[Tensor, "batch 3 height width"]:
    """Return normalised pixels as pictures; what was padded has the mean's colour.

    >>> denormalise(torch.zeros(1, 3, 1, 1), ImageConfig(mean=(0.0, 0.5, 1.0))).flatten().tolist()
    [0, 128, 255]
    """
    mean, std = (torch.tensor(each)[:, None, None] for each in (images.mean, images.std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
