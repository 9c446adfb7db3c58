"""What to predict on: files, folders, patterns and lists become pictures and frames, one after the other."""

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from lucidetr.data.decoding import SUFFIXES, read_image
from lucidetr.data.faults import KEPT, is_within
from lucidetr.deployment.video import SQUARE, VIDEOS, read_frames
from lucidetr.errors import InputError


@dataclass(frozen=True)
class Source:
    """Name a picture or video, and the place below the results' folder where it is drawn, which is no one else's."""

    file: Path
    place: Path

    @property
    def is_video(self) -> bool:
        """Say whether this is a video, by its name."""
        return self.file.suffix.lower() in VIDEOS


@dataclass(frozen=True, eq=False)
class Frame:
    """Hold a picture, or a frame of a video with its number and time.

    `rate` is that of the frames which are used, a second; `share` says how far into its source the frame lies, 0…1;
    `aspect` how many times as wide as high its pixels are shown.
    """

    image: UInt8[Tensor, "3 height width"]
    source: Source
    number: int | None = None
    seconds: float | None = None
    rate: Fraction | None = None
    share: float = 1.0
    aspect: Fraction = SQUARE


def find_sources(inputs: Sequence[str], out: Path) -> list[Source]:
    """Return every picture and video among files, folders, patterns and, for `-`, the lines of standard input.

    Folders and patterns are in the order of their names; what lies below `out`, where that is inside them, was drawn
    earlier and does not count, nor does what programs keep in a folder for themselves. Nothing found is an InputError.
    """
    found: list[tuple[Path, Path]] = []
    for text in inputs:
        if text == "-":
            for line in filter(None, (os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer)):
                found += _files(line, out, patterns=False)
        else:
            found += _files(text, out, patterns=True)
    if not found:
        raise InputError("no pictures: name files, folders, patterns, or - for a list of files on standard input")
    return _places(found)


def frames(sources: Iterable[Source], every: int, refused: list[str]) -> Iterator[Frame]:
    """Yield every picture, and each `every`-th frame of every video; what cannot be used is said in `refused`."""
    for source in sources:
        try:
            if source.is_video:
                for frame in read_frames(source.file, every):
                    yield Frame(source=source, **frame._asdict())
            else:
                yield Frame(read_image(source.file), source)
        except InputError as error:
            refused.append(str(error))


def _files(text: str, out: Path, patterns: bool) -> list[tuple[Path, Path]]:
    """Return each file and its name below the folder that was given."""
    path = Path(text)
    if path.is_file():
        return [(path, Path(path.name))]
    if path.is_dir():
        base, files = path, _below(path)
    elif patterns and glob.has_magic(text):
        base = Path(*_before_pattern(path.parts))
        files = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
    else:
        raise InputError(f"{text}: no such picture, video or folder")
    files = [file for file in files if file.suffix.lower() in (*SUFFIXES, *VIDEOS) and file.is_file()]
    files = [file for file in files if not _is_kept(file.relative_to(base))]
    if not is_within(base, [out]):
        files = [file for file in files if not is_within(file, [out])]
    if not files:
        raise InputError(f"{text}: no pictures or videos there ({', '.join((*SUFFIXES, *VIDEOS))})")
    return [(file, _downwards(file.relative_to(base))) for file in files]


def _below(folder: Path) -> list[Path]:
    """Return all files below a folder, through links too; no folder counts twice."""
    found, entered = [], set()
    for place, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # by a link, maybe to a folder above
            inner.clear()
            continue
        entered.add(real)
        inner[:] = [name for name in inner if not name.startswith(KEPT)]  # such a one may hold links to a whole disk
        inner.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        found += [Path(place, name) for name in names]
    return sorted(found)


def _is_kept(name: Path) -> bool:
    """Say whether a program keeps a file for itself, by its name below the folder that was given.

    >>> [_is_kept(Path(name)) for name in ("@eaDir/a.jpg", "b/.cache/a.jpg", "._a.jpg", "b/@a.jpg")]
    [True, True, True, False]
    """
    return name.name.startswith(".") or any(part.startswith(KEPT) for part in name.parent.parts if part != "..")


def _downwards(name: Path) -> Path:
    """Return a name without the steps upwards that a pattern may contain after its wildcard."""
    return Path(*(part for part in name.parts if part != ".."))


def _before_pattern(parts: Sequence[str]) -> list[str]:
    """Return the folders before the first one with a wildcard.

    >>> _before_pattern(("scenes", "val*", "a", "*.png"))
    ['scenes']
    """
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return list(parts[:first])


def _places(found: Sequence[tuple[Path, Path]]) -> list[Source]:
    """Give each file a place of its own: its name, numbered where two would meet.

    Pictures are told apart without their suffix, so that what is cut out of them is too.
    """
    taken: set[Path] = set()
    sources = []
    for file, name in found:
        video = file.suffix.lower() in VIDEOS
        suffix = ".mp4" if video else ".jpg" if file.suffix.lower() in (".jpg", ".jpeg") else ".png"
        stem, number = name.with_suffix(""), 1
        while (key := stem.with_name(stem.name + ".mp4") if video else stem) in taken:
            number += 1
            stem = name.with_name(f"{name.stem}-{number}")
        taken.add(key)
        sources.append(Source(file, stem.with_name(stem.name + suffix)))
    return sources


def safe_names(names: Sequence[str]) -> list[str]:
    r"""Return a folder name for each category: letters, digits, spaces, - and _ stay, no two are the same.

    >>> safe_names(["red cell", "../x", "a/b", "a\\b", ".", "A_B"])
    ['red cell', '___x', 'a_b', 'a_b-2', '_', 'A_B-3']
    """
    made: list[str] = []
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w -]", "_", name).strip()[:80] or "_"
        safe, number = plain, 1
        while safe.casefold() in taken:  # some disks do not tell capitals from small letters
            number += 1
            safe = f"{plain}-{number}"
        taken.add(safe.casefold())
        made.append(safe)
    return made
