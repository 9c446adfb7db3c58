"""One way to turn an image file, or any picture in memory, into pixels: the same for every command."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lucidetr.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
MAX_PIXELS = 100_000_000  # refused by the header, before anything is decoded
BACKGROUND = (255, 255, 255)  # what transparent pixels are laid upon


def read_image(path: str | Path) -> UInt8[Tensor, "3 height width"]:
    """Decode an image file upright, in RGB; what cannot be decoded is an InputError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap follows
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(f"{path}: {width} × {height} pixels are more than {MAX_PIXELS:,}; make it smaller")
                image.filename = ""  # else Pillow maps plain TIFFs into memory, and mixes up the rows of turned ones
                return from_pillow(image)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({error})") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on damaged files
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        raise InputError(f"{path}: damaged or truncated image of {size:,} bytes ({error}); replace the file") from None


def from_pillow(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """Return the pixels of a Pillow image: turned upright by its EXIF note, 8 bit, RGB.

    The first frame of an animation; 16-bit grey is scaled, not cut; transparent pixels lie upon white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) / 257).round().astype(np.uint8)
        image = Image.fromarray(grey)
    elif image.mode in ("I", "F"):
        raise InputError(f"pixel mode {image.mode} (32-bit) has no agreed brightness; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(paper, image)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def as_image(picture: Any) -> UInt8[Tensor, "3 height width"]:
    """Return the pixels of a file, a Pillow image, a "height width 3" array or a "3 height width" tensor of bytes."""
    if isinstance(picture, (str, Path)):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        return from_pillow(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(f"an array of {picture.dtype} {picture.shape}; expected uint8 (height, width, 3) in RGB")
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).contiguous()
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise InputError(f"a tensor of {picture.dtype} {tuple(picture.shape)}; expected uint8 (3, height, width)")
        return picture
    raise InputError(
        f"a picture of type {type(picture).__name__}; expected a path, a Pillow image, an array or a tensor"
    )
