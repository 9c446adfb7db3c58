"""One way to turn an image file, or any picture in memory, into pixels: the same for every command."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from lucidetr.errors import InputError, unreadable

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
SUFFIXES += (".avif",) if ".avif" in Image.registered_extensions() else ()  # from Pillow 11.3 on
MAX_PIXELS = 100_000_000  # refused by the header, before anything is decoded
# Above so many, which cost half a second and 130 MB, a file must have bytes for what it claims. Photographs have, even
# blank ones: a byte for at most 260 pixels in JPEG, 340 in RGB PNG, 560 in WebP, 820 in grey PNG. What is refused is
# large and nearly empty: one colour all over as a GIF or a PNG of a palette or of 1 bit (1,400 to 2,900 pixels a byte)
# or as lossless WebP (25,000), and a scanned page of 1 bit (TIFF, Group 4, 600 dpi) of a few lines: blank 11,600, five
# lines 2,200; twenty have 630.
PIXELS_ON_TRUST = 16_000_000
PIXELS_PER_BYTE = 1000
BAND = 1 << 20  # pixels that are converted at a time: a large picture is not held in four forms at once
BACKGROUND = (255, 255, 255)  # what transparent pixels are laid upon
# what Pillow raises on damaged files; the last ones come from its readers of EXIF notes and TIFF tags
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, struct.error)
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
EXIF_ORIENTATION = 274
TIFF_SIDES = (256, 257)  # tags of width and height as they are stored
TURNS = {  # what an EXIF note of orientation asks for
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path) -> UInt8[Tensor, "3 height width"]:
    """Decode an image file upright, in RGB; what cannot be decoded is an InputError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap follows
            with Image.open(path) as image:
                refuse_by_header(image, Path(path).stat().st_size, str(path))
                return from_pillow(image)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such image file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not an image that can be read ({error})") from None
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno:  # the system's own: the file may well be sound
            raise InputError(unreadable(path, error)) from None
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        raise InputError(f"{path}: damaged or truncated image of {size:,} bytes ({error}); replace the file") from None


def refuse_by_header(image: Image.Image, num_bytes: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an opened picture, before it is decoded: a program, too many pixels, or far too many for its bytes."""
    width, height = image.size
    if image.format == "EPS":  # Pillow would have Ghostscript run it, whatever the file is called
        raise UnidentifiedImageError("EPS is a program; save it as PNG")
    if width * height > max_pixels:
        raise InputError(f"{name}: {width} × {height} is more than {max_pixels:,} pixels; make it smaller")
    if width * height > max(PIXELS_ON_TRUST, PIXELS_PER_BYTE * num_bytes):
        raise InputError(
            f"{name}: {width} × {height} pixels in {num_bytes:,} bytes, more than {PIXELS_PER_BYTE:,} to a byte, as in "
            "a decompression bomb; save it as JPEG, or make it smaller"
        )


def from_pillow(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """Return the pixels of a Pillow image: turned upright by its EXIF note, 8 bit, RGB.

    The first frame of an animation; 16-bit grey is scaled, not cut; transparent pixels lie upon white.
    """
    image = _upright(image)
    if image.mode in ("I", "F"):
        raise InputError(f"pixel mode {image.mode} (32-bit) has no agreed brightness; save it with 8 or 16 bits")
    width, height = image.size
    pixels = torch.empty((3, height, width), dtype=torch.uint8)
    rows = max(1, BAND // max(1, width))
    for top in range(0, height, rows):
        band = to_rgb(image.crop((0, top, width, min(top + rows, height))))
        pixels[:, top : top + rows] = torch.from_numpy(band).permute(2, 0, 1)
    return pixels


def _upright(image: Image.Image) -> Image.Image:
    """Return a Pillow image, loaded, as its EXIF note turns it; without a note it is the same one, not a copy."""
    if isinstance(image, ImageFile.ImageFile):
        name, image.filename = image.filename, ""  # else Pillow maps plain TIFFs, and mixes up the rows of turned ones
        try:
            image.load()
        finally:
            image.filename = name
    return turned_as(image, image)


def turned_as(image: Image.Image, noted: Image.Image) -> Image.Image:
    """Return a Pillow image as the EXIF note of another, loaded, one turns it; without a note it is the same one."""
    # not by ImageOps.exif_transpose, which writes the whole note anew and fails on any odd tag in it
    turn = TURNS.get(noted.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of an upright Pillow image of any mode that has a meaning."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return np.array(image.convert("RGB"))


def as_image(picture: Any) -> UInt8[Tensor, "3 height width"]:
    """Return the pixels of a file, a Pillow image, a "height width 3" array or a "3 height width" tensor of bytes."""
    if isinstance(picture, (str, Path)):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        _refuse_empty(picture.size)
        try:
            return from_pillow(picture)
        except InputError:
            raise
        except DAMAGED as error:
            raise InputError(f"a Pillow image that cannot be read ({error}); open or convert it anew") from None
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InputError(f"an array of {picture.dtype} {picture.shape}; expected uint8 (height, width, 3) in RGB")
        _refuse_empty(picture.shape)
        return torch.from_numpy(picture.transpose(2, 0, 1).copy())
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
            raise InputError(f"a tensor of {picture.dtype} {tuple(picture.shape)}; expected uint8 (3, height, width)")
        _refuse_empty(picture.shape)
        return picture.cpu()
    raise InputError(
        f"a picture of type {type(picture).__name__}; expected a path, a Pillow image, an array or a tensor"
    )


def _refuse_empty(shape: tuple[int, ...]) -> None:
    """Refuse a picture without pixels, as a cut beyond an edge gives."""
    if 0 in shape:
        raise InputError(f"a picture of shape {tuple(shape)} has no pixels; cut inside the picture")


def upright_size(path: Path) -> tuple[int, int]:
    """Return height and width of a picture as it will be seen: upright. Only its header is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap follows
            with Image.open(path) as image:
                refuse_by_header(image, path.stat().st_size, str(path))  # now, not in the midst of training
                width, height = upright_sides(image)
    except InputError:
        raise
    except (Image.DecompressionBombError, *DAMAGED) as error:
        raise InputError(f"{path}: not an image that can be read ({error})") from None
    return height, width


def upright_sides(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened picture as it will be seen; a TIFF may state them turned already."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags[tag] for tag in TIFF_SIDES) if image.format == "TIFF" else image.size
    return (height, width) if image.getexif().get(EXIF_ORIENTATION) in TURNED else (width, height)
