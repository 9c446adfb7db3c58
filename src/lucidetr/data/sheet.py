"""A sheet of pictures with their boxes: the quickest check that labels mean what one thinks."""

import numpy as np
import torch
from PIL import Image

from lucidetr.data.dataset import Dataset
from lucidetr.drawing import draw_boxes

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CELL = 320  # pixels
GAP = 8
PAPER = (128, 128, 128)


def draw_sheet(dataset: Dataset, number: int, seed: int) -> Image.Image:
    """Return a sheet of up to `number` images drawn at random, each with boxes and category names."""
    number = min(number, len(dataset))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:number]).tolist()
    return arrange([draw_truth(dataset, index) for index in chosen], CELL, CELL)


def arrange(pictures: list[Image.Image], cell: int, column: int = 0) -> Image.Image:
    """Return a sheet of pictures, shrunk in place to at most `cell` pixels a side, about four columns to three rows.

    Columns are `column` pixels wide, or as wide as the widest picture.
    """
    for picture in pictures:
        picture.thumbnail((cell, cell))
    columns = max(round(float(np.sqrt(len(pictures) * 4 / 3))), 1)
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
