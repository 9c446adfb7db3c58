"""What each pixel mode means in each of the eight positions that a camera notes, and what a bomb costs."""

import io
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from lucidetr.data.decoding import from_pillow, read_image
from lucidetr.data.examine import look_at
from lucidetr.data.raw import Picture, Raw
from lucidetr.data.yolo import upright_size
from lucidetr.errors import InputError

HEIGHT, WIDTH = 5, 7
ORIENTATION = 0x0112  # of EXIF
GREY = (np.arange(HEIGHT * WIDTH, dtype=np.uint8) * 7).reshape(HEIGHT, WIDTH)
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
ALPHA = np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3 == 0, 0, 255).astype(np.uint8)
WHITE = np.uint8(255)

# How the pixels of a picture that is seen upright are stored, by the number of its EXIF note
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


class Mode(NamedTuple):
    """Hold a picture of a mode as an array, how it becomes one of Pillow's, a form of file, and the RGB it means."""

    stored: np.ndarray
    image: Callable[[np.ndarray], Image.Image]
    form: str
    rgb: np.ndarray


def of_mode(mode: str) -> Callable[[np.ndarray], Image.Image]:
    """Return what makes a picture of a mode that Pillow cannot guess from the array."""

    def make(pixels: np.ndarray) -> Image.Image:
        return Image.frombytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())

    return make


def of_palette(transparent: bool) -> Callable[[np.ndarray], Image.Image]:
    """Return what makes a picture of colour numbers; with `transparent`, number 14 is clear."""

    def make(numbers: np.ndarray) -> Image.Image:
        image = of_mode("P")(numbers)
        image.putpalette(np.stack([PALETTE, PALETTE[::-1], PALETTE // 2], axis=-1).tobytes())
        if transparent:
            image.info["transparency"] = 14
        return image

    return make


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def upon_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.where(alpha[..., None] == 0, WHITE, rgb)


def converted(mode: str, pixels: np.ndarray) -> np.ndarray:
    """Return what Pillow makes of colours whose brightness is no straight line."""
    return np.asarray(of_mode(mode)(pixels).convert("RGB"))


PALETTE = np.arange(256, dtype=np.uint8)
PAINTED = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
NEUTRAL = np.stack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 128)], axis=-1)
INKS = np.concatenate([COLOUR, np.zeros_like(COLOUR[..., :1])], axis=-1)
MODES = {
    "1": Mode(GREY > 100, Image.fromarray, "PNG", grey(np.where(GREY > 100, WHITE, np.uint8(0)))),
    "L": Mode(GREY, Image.fromarray, "PNG", grey(GREY)),
    "LA": Mode(np.stack([GREY, ALPHA], -1), of_mode("LA"), "PNG", upon_white(grey(GREY), ALPHA)),
    "P": Mode(GREY, of_palette(transparent=False), "PNG", PAINTED),
    "P with a clear colour": Mode(GREY, of_palette(True), "PNG", np.where(grey(GREY) == 14, WHITE, PAINTED)),
    "RGB": Mode(COLOUR, Image.fromarray, "PNG", COLOUR),
    "RGBA": Mode(np.dstack([COLOUR, ALPHA]), Image.fromarray, "PNG", upon_white(COLOUR, ALPHA)),
    "CMYK": Mode(INKS, of_mode("CMYK"), "TIFF", 255 - COLOUR),
    "YCbCr": Mode(NEUTRAL, of_mode("YCbCr"), "memory", grey(GREY)),
    "LAB": Mode(NEUTRAL, of_mode("LAB"), "TIFF", converted("LAB", NEUTRAL)),
    "HSV": Mode(np.stack([GREY, 0 * GREY, GREY], -1), of_mode("HSV"), "memory", grey(GREY)),
    "I;16": Mode(GREY.astype(np.uint16) * 257, Image.fromarray, "PNG", grey(GREY)),
}
WITHOUT_MEANING = {"I": np.int32, "F": np.float32}


def noted(image: Image.Image, form: str, orientation: int) -> Image.Image | io.BytesIO:
    """Return a picture with an EXIF note, in a file or, of modes that no file keeps, in memory."""
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    if form == "memory":
        image.info["exif"] = exif.tobytes()
        return image
    file = io.BytesIO()
    keep = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(file, form, exif=exif, **keep)
    file.seek(0)
    return file


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", MODES)
def test_a_mode_means_the_same_in_every_position(tmp_path, name, orientation):
    mode = MODES[name]
    image = mode.image(np.ascontiguousarray(STORED[orientation](mode.stored)))
    assert image.mode == name.split()[0]
    made = noted(image, mode.form, orientation)
    if isinstance(made, Image.Image):
        pixels = from_pillow(made)
    else:
        (tmp_path / "picture").write_bytes(made.getvalue())
        with Image.open(made) as file:
            assert file.mode == image.mode
            assert np.array_equal(from_pillow(file).numpy(), read_image(tmp_path / "picture").numpy())
        pixels = read_image(tmp_path / "picture")
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), mode.rgb)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", WITHOUT_MEANING)
def test_32_bits_are_refused_in_every_position(tmp_path, name, orientation):
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](GREY)).astype(WITHOUT_MEANING[name]))
    assert image.mode == name
    file = noted(image, "TIFF", orientation)
    assert isinstance(file, io.BytesIO)
    (tmp_path / "picture").write_bytes(file.getvalue())
    with pytest.raises(InputError, match=f"picture: pixel mode {name} .32-bit. has no agreed brightness"):
        read_image(tmp_path / "picture")


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("name", ["L", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_turned_tiff_is_as_large_as_it_looks(tmp_path, name, compression, orientation):
    """Pillow turns these by itself, and reads plain ones through a map of the file's memory."""
    mode = MODES[name]
    image = mode.image(np.ascontiguousarray(STORED[orientation](mode.stored)))
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "a.tif", exif=exif, compression=compression)
    assert np.array_equal(read_image(tmp_path / "a.tif").permute(1, 2, 0).numpy(), mode.rgb)
    assert upright_size(tmp_path / "a.tif") == (HEIGHT, WIDTH)
    raw = Raw("train", [Picture("a", tmp_path / "a.tif", WIDTH, HEIGHT)])
    assert look_at(raw, raw.pictures[0])
    assert not [finding for finding in raw.findings if finding.severity == "error"]


MEASURE = """
import resource, sys, time
from lucidetr.data.decoding import read_image
from lucidetr.errors import InputError
def refused(path):
    try:
        read_image(path)
    except InputError as error:
        return str(error)
refused(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
said = refused(sys.argv[1])
seconds = time.process_time() - started
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, seconds, said)
"""


def test_a_bomb_of_20_kilobytes_costs_little(tmp_path):
    """Peak memory and computing time of a process of its own, which has read a broken picture before."""
    Image.new("1", (12_600, 12_600)).save(tmp_path / "bomb.png", optimize=True)
    assert 15_000 < (tmp_path / "bomb.png").stat().st_size < 25_000
    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments = [sys.executable, "-c", MEASURE, tmp_path / "bomb.png", tmp_path / "broken.png"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    megabytes, seconds, said = done.stdout.split(maxsplit=2)
    assert "12600 × 12600 pixels are more than 100,000,000" in said
    assert float(megabytes) <= 50
    assert float(seconds) <= 0.1
