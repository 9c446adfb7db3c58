"""Noise: pictures and annotation files changed at random are read or refused, and cost little."""

import io
import mmap
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hostile_tools
from hostile_tools import coco_set, examine, limited, picture, train, voc_set, yolo_list
from lucidetr.data.decoding import read_image, upright_size
from lucidetr.errors import InputError

PNG = b"\x89PNG\r\n\x1a\n"


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Return a file with bytes changed, cut out, put in, or doubled: one place or several."""
    for _ in range(int(random.integers(1, 6))):
        at = int(random.integers(len(data) + 1))
        size = int(random.choice([1, 1, 2, 4, 16, 200]))
        noise = random.bytes(size) if random.random() < 0.6 else bytes([int(random.choice([0, 255, 128, 127]))]) * size
        kind = int(random.integers(5))
        if kind <= 1:
            data = data[:at] + noise[: len(data) - at] + data[at + size :]
        elif kind == 2:
            data = data[:at] + noise + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + size :]
        else:
            data = data[:at] + data[at : at + size] * 2 + data[at + size :]
    return data[: int(random.integers(len(data) + 1))] if random.random() < 0.15 else data


def resealed(data: bytes) -> bytes:
    """Return a PNG with right checksums for its chunks, without which nearly every change is found by them alone."""
    if not data.startswith(PNG):
        return data
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        parts.append(data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end])))
        at = end + 4
    return b"".join(parts) + data[at:]


def sample_pictures(random: np.random.Generator) -> list[bytes]:
    """Return pictures of every kind that is read, with EXIF notes, palettes, transparency, frames, 16 bits."""
    noise = Image.fromarray(random.integers(0, 255, (12, 17, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(random.integers(0, 65535, (12, 17), dtype=np.uint16))
    kinds = [
        (noise, "JPEG", {"exif": exif}), (noise, "JPEG", {"progressive": True}), (noise.convert("CMYK"), "JPEG", {}),
        (noise, "PNG", {"exif": exif}), (noise.convert("RGBA"), "PNG", {}), (deep, "PNG", {}),
        (noise.convert("P"), "PNG", {"transparency": 3}), (noise.convert("1"), "PNG", {}), (noise, "BMP", {}),
        (noise, "GIF", {"transparency": 3}), (noise, "GIF", {"save_all": True, "append_images": [noise]}),
        (noise, "TIFF", {}), (noise.convert("L"), "TIFF", {"exif": exif}), (noise, "TIFF", {"big_tiff": True}),
        (noise, "TIFF", {"compression": "tiff_lzw"}), (noise, "TIFF", {"compression": "jpeg"}),
        (noise, "TIFF", {"compression": "tiff_adobe_deflate"}), (noise, "TIFF", {"compression": "packbits"}),
        (noise.convert("1"), "TIFF", {"compression": "group4"}), (deep, "TIFF", {}), (noise, "PPM", {}),
        (noise, "WEBP", {}), (noise, "WEBP", {"lossless": True}),
        (noise, "WEBP", {"save_all": True, "append_images": [noise.rotate(180)]}),
    ]  # fmt: skip
    files = []
    for image, form, options in kinds:
        file = io.BytesIO()
        image.save(file, form, **options)
        files.append(file.getvalue())
    return files


SIZES = pytest.mark.parametrize(
    ("seed", "number"), [(0, 1000), pytest.param(1, 10_000, marks=pytest.mark.slow)], ids=["1000", "10000"]
)


@SIZES
def test_mutated_pictures_are_read_or_refused(tmp_path, seed, number):
    random = np.random.default_rng(seed)
    samples, path, refused = sample_pictures(random), tmp_path / "picture", 0
    for i in range(number):
        content = mutated(samples[i % len(samples)], random)
        put(path, resealed(content) if random.random() < 0.5 else content)
        try:
            with limited(i), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on damaged notes
                refused += sum(is_refused(read, path) for read in (read_image, upright_size))
        except Exception as error:
            error.add_note(f"number {i}: {path.read_bytes()[:2000]!r}")
            raise
    assert number / 4 < refused < 2 * number


def put(file: Path, content: bytes) -> None:
    """Write a new file in place of an old one: to write over it would wait for the disk (ext4, some milliseconds)."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def is_refused(read: Callable, path: Path) -> bool:
    """Read a picture; say whether it was refused, by a sentence that names it."""
    try:
        read(path)
    except InputError as error:
        assert str(path) in str(error)
        return True
    return False


WORDS = (
    "-1", "0", "1e999", "-1e999", "1e308", "9" * 400, "9" * 5000, "NaN", "Infinity", "null", "true", '""', "[]", "{}",
    "[[]]", '"\\u0000"', '"\\ud800"', '"../x"', "1.5", "nan", "inf", "1_0", "0x10", "2026-99-99", "*a", "!!set {}",
    "~", "&#0;", "<a>", "</object>", "\ufeff", "\u2028", "é", "🙂", "-0.0", "1e-400", str(2**31), str(2**63),
    str(2**64), str(2**53 + 1), "٣", "½", "\0", "\t", "'", '"', "\\", "..", "/", "*", "&a b", "!!python/none", "---",
    "? :", "#", "&a;", "<![CDATA[", "]]>", "<!--", "<?xml?>", "<!DOCTYPE a>",
)  # fmt: skip


def reworded(data: bytes, random: np.random.Generator) -> bytes:
    """Return a text with some of its numbers and words exchanged for others that mean trouble."""
    text = data.decode()
    places = [match.span() for match in re.finditer(r"\"[^\"]*\"|-?[\d.]+|\w+", text)]
    for _ in range(int(random.integers(1, 4))):
        start, end = places[int(random.integers(len(places)))]
        if end <= len(text):
            text = text[:start] + WORDS[int(random.integers(len(WORDS)))] + text[end:]
    return text.encode("utf-8")


def annotation_files(folder: Path, make: Callable) -> list[Path]:
    picture(folder / "images" / "good.png")
    if make is coco_set:
        picture(folder / "images" / "other.png")
        return [make(folder, "other.png") / "train.json"]
    if make is voc_set:
        make(folder, "good.png")
        listed = folder / "ImageSets" / "Main" / "train.txt"
        listed.parent.mkdir(parents=True)
        listed.write_text("x\n")
        return [folder / "Annotations" / "x.xml", listed]
    make(folder, "images/good.png")
    return [folder / "data.yaml", folder / "list.txt", folder / "labels" / "good.txt"]


MAKERS = [coco_set, voc_set, yolo_list]


@pytest.mark.parametrize("make", MAKERS)
@SIZES
@pytest.mark.parametrize("read", [train, examine])
def test_mutated_annotations_are_read_or_refused(tmp_path, read, make, seed, number):
    random, refused = np.random.default_rng(seed), 0
    files = annotation_files(tmp_path, make)
    sound = {file: file.read_bytes() for file in files}
    assert not train(tmp_path)
    for i in range(number):
        file = files[i % len(files)]
        change = mutated if random.random() < 0.5 else reworded
        put(file, change(sound[file], random))
        try:
            with limited(i):
                refused += bool(read(tmp_path))
        except Exception as error:
            error.add_note(f"number {i}, {file.name}: {file.read_bytes()[:2000]!r}")
            raise
        put(file, sound[file])
    assert refused > number / 4


def test_the_limits_are_felt(monkeypatch):
    monkeypatch.setattr(hostile_tools, "LONGEST", 0.05)
    started = time.process_time()
    with pytest.raises(AssertionError, match=r"slow: .* seconds of computing"), limited("slow"):
        while time.process_time() - started < 0.06:
            pass


@pytest.mark.skipif(not hostile_tools.MEASURES_MEMORY, reason="the peak of memory is measured on Linux only")
def test_the_limit_of_memory_is_felt(monkeypatch):
    """A peak that is over before the end counts; an earlier one, or memory that was there before, does not.

    The blocks are asked of the system itself: numpy's may lie where an earlier test's lay, in memory that the process
    has kept, and then cost none. They are twice the limit, as other memory may be given back in the midst.
    """
    monkeypatch.setattr(hostile_tools, "MOST", 128 << 20)

    def filled() -> mmap.mmap:
        block = mmap.mmap(-1, 256 << 20)
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)  # each page is touched, and so is there
        return block

    with filled(), limited("nothing"):
        pass
    with pytest.raises(AssertionError, match=r"large: \d+ MiB of memory"), limited("large"):
        filled().close()
    with limited("nothing"):
        pass
