"""What can be wrong with boxes and ids, in words: shared by all readers of annotation files."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Literal

import numpy as np

from lucidetr.errors import InputError

BadBoxes = Literal["refuse", "drop"]
KEPT = (".", "@")  # how the names of folders begin that programs keep for themselves: .ipynb_checkpoints, @eaDir
EDGE_TOLERANCE = 2.0  # pixels that a box may reach over the picture's edge: rounding in labelling tools
SHOWN = 10  # faults listed in one message


def inside(path: Path, what: str, name: str, folder: Path) -> None:
    """Refuse the name of a file that leads out of its folder, by itself or by a link.

    `path` is the annotation file that names it. A link may lead to anywhere in the data set: the annotation file's
    folder or the one above it, whichever holds `folder`. The file need not exist. Windows' forms are refused too.
    """
    windows = PureWindowsPath(name)
    if Path(name).is_absolute() or windows.anchor or ".." in windows.parts:
        raise InputError(f"{path}: {what}: {name} leads out of {folder}; use paths inside that folder")
    homes = [home for home in (path.parent, path.parent.parent) if folder.is_relative_to(home)]
    refuse_outside(path, what, [folder / name], homes[:1] or [folder])


def refuse_outside(path: Path, what: str, files: Iterable[Path], folders: list[Path]) -> None:
    """Refuse files that lie, links followed, in none of some folders, and those that are no plain files."""
    for file in files:
        if not is_within(file, folders):
            listed = " and ".join(map(str, folders))
            raise InputError(f"{path}: {what}: {file} leads out of {listed}; put the file itself there")
        try:
            kind = file.stat().st_mode
        except (OSError, ValueError):
            continue  # whether it must be there, others say
        if not stat.S_ISREG(kind):
            raise InputError(f"{path}: {what}: {file} is no file but a folder or a device; name a picture's file")


def hidden(path: Path, place: Path) -> bool:
    """Say whether a file lies in a folder that programs keep for themselves: .ipynb_checkpoints, @eaDir."""
    return any(part.startswith(KEPT) for part in path.relative_to(place).parts)


def is_within(place: Path, folders: list[Path]) -> bool:
    """Say whether a file or folder lies, links followed, in one of some folders."""
    try:
        linked = place.is_symlink() or place.name in ("", "..")
        real = os.path.realpath(place) if linked else os.path.join(_real(str(place.parent)), place.name)
        return any(Path(real).is_relative_to(_real(str(folder))) for folder in folders)
    except (OSError, ValueError):  # a name that the disk cannot hold
        return False


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    """Return a folder's own place, its links followed; a data set has few folders and many files."""
    return os.path.realpath(folder)


def is_file(place: Path) -> bool:
    """Say whether a file is there; a name that no disk can hold is none."""
    try:
        return place.is_file()
    except (OSError, ValueError):
        return False


def listing(things: list[str]) -> str:
    """Return the first of a list of things, and how many more there are."""
    rest = len(things) - SHOWN
    return ", ".join(things[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def refuse_twice(path: Path, names: list[str], places: list[str], fix: str) -> None:
    """Refuse pictures that a data set has more than once; `places` says for each where it is named."""
    for first, second in repeats(names)[:1]:
        named = f"{places[first]} and {places[second]}" if places[first] != places[second] else places[first]
        raise InputError(f"{path}: the picture {names[second]} is there twice: {named}; {fix}")


def repeats(names: list[str]) -> list[tuple[int, int]]:
    """Return the positions of each name that was there before, that of the first one before them.

    >>> repeats(["a", "b", "a", "a"])
    [(0, 2), (0, 3)]
    """
    first: dict[str, int] = {}
    return [(there, n) for n, name in enumerate(names) if (there := first.setdefault(name, n)) != n]


def refuse_duplicates(path: Path, what: str, ids: np.ndarray) -> None:
    """Refuse ids that stand for more than one thing."""
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        twice = listing([str(v) for v in values[counts > 1]])
        raise InputError(f"{path}: {what} ids used more than once: {twice}; give each {what} its own id")


def check_boxes(
    path: Path, boxes: np.ndarray, sizes: np.ndarray, place: Callable[[int], str], policy: BadBoxes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the boxes (cut to the picture under "drop"), which to keep and which were cut; "refuse" lists every fault.

    Boxes are [left, top, width, height] in pixels, `sizes` the (height, width) of each one's picture; `place` says
    where a row stands in the user's files.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # of infinite numbers, which are named as such
        faults = list(box_faults(boxes, sizes))
    if faults and policy == "refuse":
        listed = "; ".join(f"{place(i)} {boxes[i].tolist()} {what}" for i, what in faults[:SHOWN])
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        with np.errstate(invalid="ignore", over="ignore"):
            looks = corner_hint(boxes, sizes)
        raise InputError(
            f"{path}: {len(faults)} of {len(boxes)} boxes cannot be used: {listed}{more}. {looks}"
            "Correct them, or use --bad-boxes drop to leave out those without area and cut those over the edge"
        )
    keep, cut = np.ones(len(boxes), dtype=bool), np.zeros(len(boxes), dtype=bool)
    for i, _ in faults:
        height, width = sizes[i]
        low = np.nan_to_num(boxes[i, :2]).clip(0, (width, height))
        high = np.nan_to_num(boxes[i, :2] + boxes[i, 2:]).clip(0, (width, height))
        keep[i] = np.isfinite(boxes[i]).all() and (high > low).all()
        if keep[i]:
            boxes[i], cut[i] = [*low, *(high - low)], True
    return boxes, keep, cut


def box_faults(boxes: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield the row and the fault of every box that is no box or not in its picture."""
    height, width = sizes[:, 0], sizes[:, 1]
    high = boxes[:, :2] + boxes[:, 2:]
    over = np.stack([-boxes[:, 0], -boxes[:, 1], high[:, 0] - width, high[:, 1] - height], axis=1)
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    inside = np.minimum(high, sizes[:, ::-1]) - np.maximum(boxes[:, :2], 0)
    outside = np.asarray((over > EDGE_TOLERANCE).any(axis=1))
    nothing_left = np.asarray((inside <= 0).any(axis=1)) & ~outside
    empty = np.asarray((boxes[:, 2:] <= 0).any(axis=1)) | nothing_left
    for row in np.flatnonzero(~finite | empty | outside).tolist():
        if not finite[row]:
            yield row, "is not finite"
        elif empty[row]:
            yield row, "has no area (width and height must be above 0)"
        else:
            yield row, f"reaches {over[row].max():g} pixels outside the {width[row]} × {height[row]} picture"


def corner_hint(boxes: np.ndarray, sizes: np.ndarray) -> str:
    """Return a sentence when the boxes make sense as corners and not as [left, top, width, height]."""
    as_corners = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] <= sizes[:, ::-1] + EDGE_TOLERANCE).all(1)
    too_large = ((boxes[:, :2] + boxes[:, 2:]) > sizes[:, ::-1] + EDGE_TOLERANCE).any(1)
    if as_corners.all() and too_large.mean() > 0.3:
        return "All of them fit as corners [left, top, right, bottom]: COCO wants [left, top, width, height]. "
    return ""
