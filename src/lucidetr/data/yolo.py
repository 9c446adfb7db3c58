"""YOLO data sets: a data.yaml, pictures in folders or lists, and one text file of boxes for each picture."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.data.decoding import SUFFIXES, upright_size
from lucidetr.data.faults import (
    BadBoxes,
    check_boxes,
    hidden,
    is_file,
    is_within,
    listing,
    refuse_outside,
    refuse_twice,
    repeats,
)
from lucidetr.data.splits import NAME_LISTS, SPLIT_WORDS, split_of
from lucidetr.errors import InputError, unreadable

DEEPEST = 20  # lists in lists of a data.yaml


def find_yolo(file: Path, faults: dict[str, str] | None = None) -> dict[str, list[Path]]:
    """Return the pictures of each split that a data.yaml names.

    `train`, `val` and `test` are folders, text files with a path on each line, or lists of either; relative ones
    start from `path`, from the yaml's own folder, or, as Roboflow writes ../train/images, from inside it. Absolute
    or not, and links followed, all of them must lie in the yaml's own folder or in `path`. A split that cannot be
    found is an InputError, or, where a dictionary is given, left out and its fault noted there.
    """
    content = _load(file)
    given = {split: next((content[w] for w in words if content.get(w)), None) for split, words in SPLIT_WORDS.items()}
    if not any(given.values()):
        raise InputError(f"{file}: it names no split; give train, and val or test, a folder of pictures each")
    found = {}
    for split, places in given.items():
        try:
            if places:
                found[split] = _split(file, content, split, places)
        except InputError as error:
            if faults is None:
                raise
            faults[split] = str(error)
    return found


def _split(file: Path, content: dict[Any, Any], split: str, given: Any) -> list[Path]:
    """Return the pictures of one split, at least one."""
    places = given if isinstance(given, list) else [given]
    pictures = [path for each in places for path in _pictures(file, content, _text(file, split, each))]
    if not pictures:
        raise InputError(f"{file}: {split}: no picture in {given}; put some there, or take the line out")
    return pictures


def read_yolo(file: Path, pictures: list[Path], bad_boxes: BadBoxes = "refuse") -> Annotations:
    """Read one split: class, centre and size of each box as shares of the picture, or class and a polygon.

    The box of a polygon is what it spans. A picture without a label file holds no object; that no picture of a split
    has one is an InputError. Category ids are the yaml's own numbers; image and annotation ids count from 1.
    """
    names, keypoints = read_names(file), read_keypoints(file)
    listed = [str(path) for path in pictures]
    refuse_twice(file, listed, listed, "list it once")
    categories = Categories(ids=tuple(names), names=tuple(names.values()))
    label_of = {number: label for label, number in enumerate(names)}
    sizes = np.array([upright_size(path) for path in pictures], dtype=np.int64)
    rows, places, labels, boxes = [], [], [], []
    labelled = 0
    for row, picture in enumerate(pictures):
        text = label_file(picture)
        if not text.is_file():
            continue
        labelled += 1
        for number, line in enumerate(read_lines(text), start=1):
            if not line.strip():
                continue
            where = f"{text}, line {number}"
            kind, box = read_box(where, line, keypoints)
            if kind not in label_of:
                raise InputError(f"{where}: class {kind} is not among the names in {file}: {listing(_pairs(names))}")
            rows.append(row)
            places.append(where)
            labels.append(label_of[kind])
            boxes.append(box)
    if not labelled:
        raise InputError(
            f"{file}: none of {len(pictures)} pictures has a label file; that of {pictures[0]} "
            f"would be {label_file(pictures[0])}"
        )
    image = np.array(rows, dtype=np.int64)
    scale = sizes[image][:, [1, 0, 1, 0]]
    with np.errstate(over="ignore"):  # what becomes infinite is named as such
        given = np.array(boxes, dtype=np.float64).reshape(-1, 4) * scale

    def place(row: int) -> str:
        return f"{places[row]}: as [left, top, width, height] in pixels"

    kept, keep, cut = check_boxes(file, given, sizes[image], place, bad_boxes)
    if len({path.is_absolute() for path in pictures}) > 1:  # which have no folder in common
        pictures = [path.absolute() for path in pictures]
    folder = Path(os.path.commonpath([path.parent for path in pictures]))
    names_below = np.array([path.relative_to(folder).as_posix() for path in pictures])
    return gather(
        categories,
        folder,
        Pictures(np.arange(1, len(pictures) + 1), names_below, sizes),
        Objects.numbered(image, kept, labels),
        keep,
        cut,
    )


def label_file(picture: Path) -> Path:
    """Return where a picture's boxes stand: the last folder named images becomes labels, else beside the picture.

    >>> label_file(Path("cells/images/train/a.jpg")).as_posix(), label_file(Path("cells/a.jpg")).as_posix()
    ('cells/labels/train/a.txt', 'cells/a.txt')
    """
    parts = list(picture.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts)


def _load(file: Path) -> dict[Any, Any]:
    """Return the content of a data.yaml, or what one would say of a folder that has a list of names instead."""
    import yaml

    if file.name in NAME_LISTS:
        folder = file.absolute().parent
        if folder.name == "labels" and (folder.parent / "images").is_dir():
            folder = folder.parent
        return {"path": str(folder), "names": _listed_names(file), **_split_folders(folder)}
    try:
        text = file.read_text(encoding="utf-8-sig")
        _refuse_bombs(file, text)
        content = yaml.safe_load(text)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date such as 2026-99-99
        raise InputError(f"{file}: not a readable YAML text ({' '.join(str(error).split())[:200]})") from None
    except OSError as error:
        raise InputError(unreadable(file, error)) from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected lines such as 'train: images/train' and 'names: [cat, dog]'")
    return content


def _listed_names(file: Path) -> list[str]:
    """Return the class names of a list, one on each line; their numbers count from 0."""
    names = [line.strip() for line in "\n".join(read_lines(file)).rstrip().splitlines()]
    if not names:
        raise InputError(f"{file}: no class name in it; write one on each line")
    if blank := [number for number, name in enumerate(names, start=1) if not name]:
        raise InputError(f"{file}, line {blank[0]}: empty, with names behind it; classes are numbered by their lines")
    return names


def _split_folders(folder: Path) -> dict[str, list[str]]:
    """Return the folders of each split, or the whole folder as training pictures where none is named after a split.

    Known layouts: train/images, images/train, Darknet's obj_train_data, and pictures without splits.
    """
    inside = [each for place in (folder, folder / "images") if place.is_dir() for each in sorted(place.iterdir())]
    found: dict[str, list[str]] = {}
    for each in inside:
        if each.is_dir() and (split := split_of(each.name)):
            found.setdefault(split, []).append(each.relative_to(folder).as_posix())
    return found or {"train": ["."]}


def _refuse_bombs(file: Path, text: str) -> None:
    """Refuse what makes a small YAML text cost much memory or time: aliases, and lists in lists in lists."""
    import yaml

    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise InputError(f"{file}: it uses aliases (*name), which can make a small file huge; write them out")
        opens = isinstance(
            token, (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockMappingStartToken)
        )
        depth += opens or isinstance(token, yaml.BlockSequenceStartToken)
        depth -= isinstance(token, (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken))
        if depth > DEEPEST:
            raise InputError(f"{file}: lists in lists, {depth} deep; a data.yaml needs no more than two or three")


def read_names(file: Path) -> dict[int, str]:
    """Return the class names of a data.yaml by their numbers."""
    content = _load(file)
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(type(number) is int for number in names):
        raise InputError(f"{file}: names is {names!r}; expected a list such as [cat, dog], or numbers with names")
    if words := [number for number, name in names.items() if isinstance(name, bool)]:
        raise InputError(
            f"{file}: class {words[0]} is called {names[words[0]]}: YAML takes on, off, yes and no for true and false; "
            "put quotes around the name"
        )
    if wrong := [number for number, name in names.items() if not isinstance(name, str | int | float)]:
        raise InputError(f"{file}: class {wrong[0]} has no name; give each number one text")
    if again := repeats([str(name) for name in names.values()]):
        first, second = (list(names)[place] for place in again[0])
        raise InputError(
            f"{file}: classes {first} and {second} are both called {names[second]}; give each its own name"
        )
    stated = content.get("nc", len(names))
    if stated != len(names):
        raise InputError(f"{file}: nc is {stated} but there are {len(names)} names; correct one of them")
    return {number: str(names[number]) for number in sorted(names)}


def _pairs(names: dict[int, str]) -> list[str]:
    return [f"{number} {name}" for number, name in names.items()]


def _pictures(file: Path, content: dict[Any, Any], given: str) -> list[Path]:
    """Return the pictures of a folder, or those that a text file lists."""
    root = file.parent / _text(file, "path", content.get("path") or "")
    folders = list(dict.fromkeys([file.parent, root]))
    inner = given.removeprefix("../")  # Roboflow's paths start one folder too high
    places = list(dict.fromkeys([root / given, file.parent / given, file.parent / inner]))
    there = [each for each in places if _exists(each)]
    place = next((each for each in there if is_within(each, folders)), None)
    if there and place is None:
        raise InputError(
            f"{file}: {given} leads out of {' and '.join(map(str, folders))}; where the data set lies elsewhere, "
            "give its folder as path: in the yaml"
        )
    if place is None:
        raise InputError(f"{file}: {given} is neither of {', '.join(map(str, places))}; correct the line")
    if place.is_dir():
        found = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and not hidden(path, place))
        refuse_outside(file, given, found, folders)
        return found
    listed = [line.strip() for line in read_lines(place) if line.strip()]
    found = [_listed(place, line, root) for line in listed]
    missing = [line for line, path in zip(listed, found, strict=True) if path is None]
    if missing:
        raise InputError(f"{place}: {len(missing)} of {len(listed)} pictures are missing: {listing(missing)}")
    pictures = [path for path in found if path]
    refuse_outside(place, "a line", pictures, folders)
    return pictures


def _text(file: Path, field: str, value: Any) -> str:
    """Return the text of a field that names a place."""
    if not isinstance(value, str | int | float):
        raise InputError(f"{file}: {field} holds a {type(value).__name__}; expected a folder's or a list's name")
    return str(value)


def _exists(place: Path) -> bool:
    """Say whether a folder or a plain file is there."""
    try:
        return place.is_dir() or place.is_file()
    except (OSError, ValueError):  # a name that no disk can hold
        return False


def _listed(place: Path, line: str, root: Path) -> Path | None:
    """Return the picture that a line of a list names, from the data set's root or from beside the list."""
    candidates = (root / line, place.parent / line)
    return next((path for path in candidates if is_file(path)), None)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; a link out of its own folder is refused."""
    refuse_outside(path, "the file itself", [path], [path.parent])
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    except OSError as error:
        raise InputError(unreadable(path, error)) from None


def read_keypoints(file: Path) -> int:
    """Return how many numbers of key points follow each box: 0 but for data sets of poses, which state kpt_shape."""
    shape = _load(file).get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"{file}: kpt_shape is {shape!r}; expected [points, 2 or 3 numbers of each], or no such line")
    return shape[0] * shape[1]


def read_box(where: str, line: str, keypoints: int = 0) -> tuple[int, list[float]]:
    """Return class and box [left, top, width, height] in shares of the picture, key points passed over."""
    words = line.split()
    try:
        kind, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise InputError(f"{where}: {line.strip()!r}; expected a class number and shares of the picture") from None
    if keypoints and len(values) not in (4, 4 + keypoints):
        expected = f"expected x y width height and {keypoints} of key points, as kpt_shape says"
        raise InputError(f"{where}: {len(values)} numbers after the class; {expected}")
    if keypoints or len(values) == 4:
        x, y, width, height = values[:4]
        return kind, [x - width / 2, y - height / 2, width, height]
    if len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[::2], values[1::2]
        return kind, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    raise InputError(f"{where}: {len(values)} numbers after the class; expected x y width height, or a polygon's x y …")
