"""Videos in and out, frame by frame, by PyAV (the extra `video`)."""

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from lucidetr.data.decoding import MAX_PIXELS, as_image
from lucidetr.errors import InputError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mts", ".m2ts", ".wmv", ".flv", ".3gp")
USUAL_RATE = Fraction(25)  # where a file says nothing
SQUARE = Fraction(1)  # pixels as wide as they are high
LARGEST_DENOMINATOR = 1001  # that of 29.97 frames a second, 30000/1001
MICROSECONDS = 1e6  # FFmpeg's unit of a file's duration
QUALITY = {"crf": "20", "preset": "veryfast"}


class VideoFrame(NamedTuple):
    """Hold a frame upright, its number and its time; `rate`, `share` and `aspect` as in `Frame`."""

    image: UInt8[Tensor, "3 height width"]
    number: int
    seconds: float
    rate: Fraction
    share: float
    aspect: Fraction


def read_frames(file: Path, every: int = 1) -> Iterator[VideoFrame]:
    """Yield each `every`-th frame of a video, turned upright as the file says, one in memory at a time.

    A video that cannot be read, has no frames, or ends too soon is an InputError after the frames that could be read.
    """
    av = _av(file)
    number, last = -1, None
    try:
        # the path is made absolute, and other protocols are shut out: a file can neither name nor be an address
        with av.open(str(file.resolve()), container_options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise InputError(f"{file}: no pictures in this video")
            stream = container.streams.video[0]
            rate = _rate(stream)
            total = max(stream.frames or (container.duration or 0) / MICROSECONDS * float(rate), 1.0)
            for number, last in enumerate(container.decode(stream)):
                if last.width * last.height > MAX_PIXELS:
                    raise InputError(f"{file}: frames of {last.width} × {last.height} pixels; make it smaller")
                if number % every == 0:
                    seconds = float(number / rate) if last.time is None else last.time
                    share = min((number + 1) / total, 1.0)
                    yield VideoFrame(_upright(last), number, seconds, rate / every, share, _aspect(stream, last))
            _check_end(file, container, last, number + 1)
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        where = f"breaks off after {number + 1} frames" if last else "not a video that can be read"
        raise InputError(f"{file}: {where} ({reason})") from None


class DrawnVideo:
    """Write an .mp4 of pictures, H.264 where PyAV has it; it bears its name when it is whole, .partial until then.

    Its colours are stored at half the resolution (yuv420p), which every player reads and which wants even sides: an
    odd one gets its last row or column once more.
    """

    def __init__(self, path: Path, picture: Image.Image, rate: Fraction, aspect: Fraction = SQUARE):
        av = _av(path)
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.av, self.rate, self.count = av, rate, 0
        self.container = av.open(str(self.partial.resolve()), "w", format="mp4")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self.stream = self.container.add_stream(codec, rate=rate, options=QUALITY if codec == "libx264" else {})
        self.stream.width, self.stream.height = (side + side % 2 for side in picture.size)
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.sample_aspect_ratio = aspect

    def add(self, picture: Image.Image) -> None:
        """Append a picture; should its size differ from that of the first, it is scaled."""
        pixels = np.asarray(picture)
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        frame = self.av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = self.count, 1 / self.rate
        self.count += 1
        self._mux(frame)

    def close(self, finished: bool) -> None:
        """Write what is left; the file can be played also when it is not finished, and then keeps .partial."""
        try:
            self._mux(None)
        finally:
            self._call(self.container.close)
        if finished:
            os.replace(self.partial, self.path)

    def _mux(self, frame: Any) -> None:
        self._call(lambda: self.container.mux(self.stream.encode(frame)))

    def _call(self, work: Callable[[], None]) -> None:
        """Do what may meet a full disk, or a size that the encoder does not take."""
        try:
            work()
        except self.av.FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self.partial)) from None


def _upright(frame: Any) -> UInt8[Tensor, "3 height width"]:
    """Return a frame's pixels, turned as the file says; PyAV's degrees are counterclockwise, as numpy's turns."""
    return as_image(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _aspect(stream: Any, frame: Any) -> Fraction:
    """Return how many times as wide as high a frame's pixels are to be shown, once it stands upright."""
    aspect = stream.sample_aspect_ratio or SQUARE
    return 1 / aspect if round(frame.rotation / 90) % 2 else aspect


def _rate(stream: Any) -> Fraction:
    """Return how many frames a second has on average, as a fraction that encoders take."""
    rate = stream.average_rate or stream.guessed_rate or USUAL_RATE
    return max(Fraction(rate).limit_denominator(LARGEST_DENOMINATOR), Fraction(1, LARGEST_DENOMINATOR))


def _check_end(file: Path, container: Any, last: Any, count: int) -> None:
    """Refuse a video without frames, and one that ends too soon: FFmpeg tells of that in some formats only.

    How long the pictures should last is known only where there is no sound, which may last longer.
    """
    if last is None:
        raise InputError(f"{file}: no frames in this video")
    if last.is_corrupt:
        raise InputError(f"{file}: breaks off after {count} frames (the last one is damaged)")
    if len(container.streams) > 1 or not container.duration or last.time is None:
        return
    start, duration = (each / MICROSECONDS for each in (container.start_time or 0, container.duration))
    seen = last.time + float((last.duration or 0) * last.time_base) - start  # the last frame may be shown for long
    if duration - seen > max(1.0, duration / 10):
        raise InputError(
            f"{file}: breaks off after {count} frames, at {seen:.1f} of the {duration:.1f} s that it tells"
        )


def _av(file: Path) -> Any:
    try:
        return import_module("av")
    except ImportError as error:
        raise InputError(f"{file}: videos need the package av ({error}): pip install 'lucidetr[video]'") from None
