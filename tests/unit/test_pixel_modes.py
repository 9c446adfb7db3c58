"""What each pixel mode means in each of the eight positions that a camera notes, and what bombs and photos cost."""

import io
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from hostile_tools import MEASURES_MEMORY, limited, peak_memory, reset_peak
from lucidetr.data import decoding
from lucidetr.data.decoding import as_image, from_pillow, read_image, upright_size
from lucidetr.data.examine import look_at
from lucidetr.data.raw import Picture, Raw
from lucidetr.deployment.service.worker import decode
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


@pytest.mark.parametrize("name", MODES)
def test_bands_meet_without_a_seam(monkeypatch, name):
    monkeypatch.setattr(decoding, "BAND", 2 * WIDTH)
    pixels = from_pillow(MODES[name].image(MODES[name].stored))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), MODES[name].rgb)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_of_nothing_has_no_pixels(size):
    assert from_pillow(Image.new("RGB", size)).shape == (3, *size[::-1])


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
    with Image.open(tmp_path / "a.tif") as opened:  # by the caller, and left unread
        assert np.array_equal(as_image(opened).permute(1, 2, 0).numpy(), mode.rgb)
        assert opened.filename == str(tmp_path / "a.tif")
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
    assert "12600 × 12600 is more than 100,000,000 pixels" in said
    assert float(megabytes) <= 50
    assert float(seconds) <= 0.1


def claiming(width: int, height: int) -> bytes:
    """Return a small GIF whose header says that it is large."""
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, "GIF")
    content = bytearray(file.getvalue())
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def decode_body(path: Path):
    return decode(path.read_bytes(), decoding.MAX_PIXELS)


@pytest.mark.parametrize("read", [read_image, upright_size, decode_body])
def test_a_bomb_below_the_largest_size_is_refused_by_its_bytes(tmp_path, read):
    path = tmp_path / "bomb.gif"
    path.write_bytes(claiming(30_993, 3072))
    said = r"30993 × 3072 pixels in [\d,]+ bytes, more than 1,000 to a byte, .*save it as JPEG, or make it smaller"
    with limited("bomb"), pytest.raises(InputError, match=said) as refused:
        read(path)
    assert ("the picture" if read is decode_body else str(path)) in str(refused.value)
    path.write_bytes(claiming(4000, 4000))  # on trust: cheap enough
    with limited("small bomb"):
        read(path)


def test_the_doctor_refuses_the_same_bomb(tmp_path):
    (tmp_path / "bomb.gif").write_bytes(claiming(30_993, 3072))
    raw = Raw("train", [Picture("a", tmp_path / "bomb.gif", 30_993, 3072)])
    assert look_at(raw, raw.pictures[0]) is None
    assert [finding.kind for finding in raw.findings] == ["image-huge"]
    assert "more than 1,000 to a byte" in raw.findings[0].text


@pytest.mark.parametrize("read", [read_image, upright_size])
def test_no_picture_starts_ghostscript(tmp_path, monkeypatch, read):
    """Pillow knows EPS by its content, whatever the file is called."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
        monkeypatch.setattr(type(image), "load", lambda self: pytest.fail("it is run"))
    said = r"photo\.jpg: not an image that can be read \(EPS is a program; save it as PNG\)"
    with pytest.raises(InputError, match=said):
        read(path)
    raw = Raw("train", [Picture("a", path, 9, 9)])
    assert look_at(raw, raw.pictures[0]) is None
    assert [finding.kind for finding in raw.findings] == ["image-format"]


@pytest.mark.parametrize(("mode", "form"), [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("L", "PNG")])
def test_large_blank_photos_are_no_bombs(tmp_path, mode, form):
    path = tmp_path / "blank"
    Image.new(mode, (5000, 3400), "white").save(path, form)
    assert upright_size(path) == (3400, 5000)
    assert read_image(path).min() == 255


@pytest.mark.skipif(not MEASURES_MEMORY, reason="the peak of memory is measured on Linux only")
def test_a_large_picture_is_held_in_few_forms_at_once():
    """Its pixels, 3 bytes each, and one band at a time on its way there."""
    image = Image.new("P", (5000, 5000), 7)
    image.info["transparency"] = 7
    before = reset_peak()
    assert from_pillow(image).shape == (3, 5000, 5000)
    assert peak_memory() - before < (3 * 25 + 50) * 1e6
