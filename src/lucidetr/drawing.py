"""Boxes, names and scores onto a picture."""

import colorsys
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lucidetr.structures import Detections

GOLDEN_ANGLE = 0.381966  # of a turn: neighbours in the list of categories get colours far apart


def colour(label: int) -> tuple[int, int, int]:
    """Return a colour of its own for each label.

    >>> colour(0)
    (255, 64, 64)
    """
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_ANGLE % 1.0, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(image: UInt8[Tensor, "3 height width"], detections: Detections) -> Image.Image:
    """Return the picture with each detection's box, name and score; weak ones below strong ones."""
    captions = [f"{name} {score:.2f}" for name, score in zip(detections.names, detections.scores.tolist(), strict=True)]
    return draw_boxes(image, detections.boxes_xyxy, captions, detections.labels.tolist())


def draw_boxes(
    image: UInt8[Tensor, "3 height width"],
    boxes_xyxy: Float[Tensor, "box 4"],
    captions: list[str],
    labels: list[int],
) -> Image.Image:
    """Return the picture with boxes in their labels' colours and a caption on each; the first box lies on top.

    Line and letter size follow the picture's, so that a caption stays readable and small boxes stay visible.
    """
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    short = min(picture.size)
    line, letters = max(1, round(short / 250)), max(9, round(short / 35))
    pen, fonts = ImageDraw.Draw(picture), {plain: font_of(plain, letters) for plain in {c.isascii() for c in captions}}
    for box, caption, label in reversed(list(zip(boxes_xyxy.tolist(), captions, labels, strict=True))):
        ink, font = colour(label), fonts[caption.isascii()]
        left, top, right, bottom = _inside(box, picture.size)
        pen.rectangle((left, top, right, bottom), outline=ink, width=line)
        if not caption:
            continue
        _, _, width, height = pen.textbbox((0, 0), caption, font=font)
        x = min(left, max(picture.width - width - 2, 0))
        y = top - height - 2 if top >= height + 2 else top
        pen.rectangle((x, y, x + width + 2, y + height + 2), fill=ink)
        pen.text((x + 1, y), caption, fill=(0, 0, 0), font=font)
    return picture


def font_of(plain: bool, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, or, for text that is not plain ASCII, DejaVu Sans, which matplotlib brings along.

    DejaVu Sans has the letters of most scripts, but for those of China, Japan and Korea, which become boxes.
    """
    if plain:
        return ImageFont.load_default(size)
    import matplotlib as mpl

    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _inside(box: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of a box that can be drawn; a reversed box becomes a line."""
    width, height = size
    left, right = (min(max(x, 0.0), width - 1.0) for x in (box[0], box[2]))
    top, bottom = (min(max(y, 0.0), height - 1.0) for y in (box[1], box[3]))
    return left, top, max(left, right), max(top, bottom)
