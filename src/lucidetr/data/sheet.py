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
    columns = max(round(float(np.sqrt(number * 4 / 3))), 1)
    rows = -(-number // columns)
    cells = [draw_truth(dataset, index) for index in chosen]
    for cell in cells:
        cell.thumbnail((CELL, CELL))
    tallest = max(cell.height for cell in cells)
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * (tallest + GAP) + GAP), PAPER)
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        sheet.paste(cell, (GAP + column * (CELL + GAP), GAP + row * (tallest + GAP)))
    return sheet


def draw_truth(dataset: Dataset, index: int) -> Image.Image:
    """Return one image with its true boxes and their names."""
    boxes_xyxy, labels = dataset.annotations.objects(index)
    names = [dataset.annotations.categories.names[label] for label in labels.tolist()]
    boxes = torch.from_numpy(boxes_xyxy.astype(np.float32))
    return draw_boxes(dataset.image(index), boxes, names, labels.tolist())
