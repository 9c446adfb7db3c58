"""COCO annotation files: a strict reader, a writer, and the search for them in a folder."""

import json
import os
import re
import stat
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.data.decoding import upright_size
from lucidetr.data.faults import BadBoxes, check_boxes, inside, is_file, listing, refuse_duplicates
from lucidetr.data.long_json import read_in_blocks
from lucidetr.data.splits import SPLIT_WORDS, find_names, split_of
from lucidetr.errors import InputError

NOTES = "notes.json"  # of Label Studio in its YOLO folders
LISTS = ("images", "annotations", "categories")  # that a file must have
SIDES = ("height", "width")


def read_coco(path: Path, images: Path | None = None, bad_boxes: BadBoxes = "refuse") -> Annotations:
    """Read one COCO file whose pictures lie in the folder `images`, or where data sets keep theirs when it is None.

    Everything that cannot be trained on is an InputError that names the file, the id, the value and what to do.
    With `bad_boxes="drop"`, boxes without area are left out and boxes over the edge are cut.
    """
    content = _load_json(path)
    images = images or image_folder_of(path, content)
    image_ids, names, sizes = _images(path, images, content["images"])
    rows = Rows(*map(np.concatenate, zip(*content.pop("annotations"), strict=True)))
    named, root = _without_root(content["categories"], rows.category_ids)
    categories = _categories(path, named)
    refuse_duplicates(path, "annotation", rows.ids)
    image_rows = _positions(path, rows.image_ids, image_ids, rows.ids, "image_id")
    labels = _positions(path, rows.category_ids, np.array(categories.ids, dtype=np.int64), rows.ids, "category_id")

    def place(row: int) -> str:
        return f"annotation {rows.ids[row]} in {names[image_rows[row]]}: bbox"

    boxes, keep, cut = check_boxes(path, rows.boxes_xywh, sizes[image_rows], place, bad_boxes)
    areas = np.where(cut, np.minimum(rows.areas, boxes[:, 2] * boxes[:, 3]), rows.areas)
    read = gather(
        categories,
        images,
        Pictures(image_ids, names, sizes),
        Objects(image_rows, rows.ids, boxes, labels, areas, rows.crowd),
        keep,
        cut,
    )
    return replace(read, mended="; ".join(filter(None, (root, read.mended))))


class Rows(NamedTuple):
    """Hold what a block of the file's annotations says, as arrays: a few bytes where JSON's objects take a thousand."""

    ids: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


def write_coco(annotations: Annotations, path: Path) -> None:
    """Write a COCO annotation file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(annotations.to_coco()))


def find_coco(folder: Path) -> dict[str, Path]:
    """Find the annotation file of each split below `folder`: {"train": path, "val": path, …}; {} where there is none.

    Known layouts: annotations/NAME.json beside image folders (COCO itself, with instances_ before the name),
    NAME.json in the folder, and SPLIT/_annotations.coco.json beside that split's images. A lone file without a
    split's name counts as the training split, but not the notes that Label Studio leaves beside a list of names.
    """
    places = ("annotations/*.json", "*.json", "*/_annotations*.json")
    candidates = sorted({path for place in places for path in folder.glob(place)})
    if any(path.stem.startswith("instances") for path in candidates):  # COCO also ships captions and key points
        candidates = [path for path in candidates if path.stem.startswith("instances")]
    lone = len(candidates) == 1
    if not candidates or (lone and candidates[0].name == NOTES and find_names(folder)):
        return {}
    found: dict[str, list[Path]] = {}
    for path in candidates:
        split = _split_of(path) or ("train" if lone else None)
        if split:
            found.setdefault(split, []).append(path)
    if not found:
        listed = ", ".join(path.name for path in candidates)
        raise InputError(f"{folder}: none of {listed} has train, val or test in its name; choose with --train-json")
    for split, paths in found.items():
        if len(paths) > 1:
            listed = ", ".join(str(path) for path in paths)
            raise InputError(f"{folder}: more than one file for the split {split}: {listed}; keep one, or name it")
    return {split: paths[0] for split, paths in found.items()}


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name speaks of; a Roboflow file is named by its folder."""
    return split_of(path.parent.name if path.stem.startswith("_annotations") else path.stem)


def image_folder_of(path: Path, content: dict[str, Any]) -> Path:
    """Find the folder that the file's first image lies in, looking where data sets keep their images."""
    first = next((item.get("file_name") for item in content["images"]), None)
    if not isinstance(first, str):
        return path.parent  # what is wrong with the list of images is said when it is read
    word, split = re.sub(r"^instances_", "", path.stem), _split_of(path) or ""
    names = [".", word, split, *SPLIT_WORDS.get(split, ()), "images", f"images/{word}", f"images/{split}"]
    roots = (path.parent, path.parent.parent)
    places = list(dict.fromkeys(root / name for root in roots for name in names if name))
    for place in places:
        if is_file(place / first):
            return place
    tried = ", ".join(str(place) for place in places)
    fix = "put it there, or give its folder too"
    if "\\" in first:
        fix = "write / for Windows' \\ in file_name"
    elif first.startswith("/"):
        fix = "leave the folders of another machine out of file_name"
    raise InputError(f"{path}: its first image {first} is in none of {tried}; {fix}")


def _load_json(path: Path) -> dict[str, Any]:
    """Read a file and check that it has the three lists of a COCO file; the annotations come as `Rows` of blocks."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        rows = {"annotations": lambda first, block: _rows(path, first, block)}
        content = read_in_blocks(path, rows, _refuse_constant, once=LISTS)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, numbers of thousands of digits, brackets without end
        raise InputError(f"{path}: not a readable JSON text ({type(error).__name__})") from None
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(
                f"{path}: not a COCO file: it has no list {key!r}; "
                "COCO files hold the lists images, annotations and categories"
            )
    for key in ("images", "categories"):
        _refuse_values(path, key, content[key])
    return content


def _refuse_values(path: Path, key: str, items: list[Any], first: int = 0) -> None:
    """Refuse items of a list that are no objects; the first of them is number `first` of its list."""
    for index, item in enumerate(items, first):
        if not isinstance(item, dict):
            raise InputError(f"{path}: {key}[{index}] is {item!r}; expected an object with fields")


def _rows(path: Path, first: int, block: list[Any]) -> Rows:
    """Return the annotations of a block, the first of them being number `first` of the file."""
    _refuse_values(path, "annotations", block, first)
    ids, images, categories = (_integers(path, block, key, first) for key in ("id", "image_id", "category_id"))
    return Rows(ids, images, categories, _boxes(path, block), _areas(path, block), _crowd(path, block))


def _refuse_constant(word: str) -> None:
    raise InputError(f"the file holds the value {word}, which JSON does not know; replace it by a number")


def _integers(path: Path, items: list[dict], key: str, first: int = 0) -> np.ndarray:
    """Return one integer field of all items; the first of them is number `first` of its list."""
    try:
        values = [item[key] for item in items]
    except KeyError:
        index = next(i for i, item in enumerate(items) if key not in item)
        raise InputError(f"{path}: entry {first + index} ({_short(items[index])}) has no field {key!r}") from None
    if not set(map(type, values)) <= {int} or max(map(abs, values), default=0) >= 2**63:
        index, value = next((i, v) for i, v in enumerate(values) if type(v) is not int or abs(v) >= 2**63)
        place = f"{path}: entry {first + index} ({_short(items[index])})"
        raise InputError(f"{place}: {key} = {value!r}; expected an integer")
    return np.array(values, dtype=np.int64)


def _short(item: dict) -> str:
    text = json.dumps(item)
    return text if len(text) <= 120 else text[:117] + "…"


def _without_root(items: list[dict], used: np.ndarray) -> tuple[list[dict], str]:
    """Return the categories, without Roboflow's root of them if it has the name of another; and a word on it.

    The root is the project itself: it has the number 0 and no box, and all others state it as their supercategory.
    """
    others = [item for item in items if item.get("id") != 0]
    roots = [item for item in items if item.get("id") == 0]
    if len(roots) != 1 or not others or (used == 0).any():
        return items, ""
    name = roots[0].get("name")
    if roots[0].get("supercategory") != "none" or any(other.get("supercategory") != name for other in others):
        return items, ""
    if name in [other.get("name") for other in others]:
        return others, f"category 0, {name}, left out: it stands for the project, and has no box"
    return items, f"category 0, {name}, has no box: if it only names the project, take it out of every split's file"


def _categories(path: Path, items: list[dict]) -> Categories:
    """Return the categories in the file's order of ids."""
    ids = _integers(path, items, "id")
    names = []
    for item in items:
        if not isinstance(item.get("name"), str) or not item["name"]:
            raise InputError(f"{path}: category {item['id']} has no name; give each category a text as name")
        names.append(item["name"])
    if not names:
        raise InputError(f"{path}: the list of categories is empty; name at least one")
    order = np.argsort(ids, kind="stable")
    try:
        return Categories(ids=tuple(ids[order].tolist()), names=tuple(names[i] for i in order))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _images(path: Path, folder: Path, items: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, file names and sizes (height, width) of the images; each file must be there.

    Where the file states no size, or 0 × 0, it is the picture's own.
    """
    if not items:
        raise InputError(f"{path}: the list of images is empty")
    ids = _integers(path, items, "id")
    refuse_duplicates(path, "image", ids)
    for item in items:
        name = item.get("file_name")
        if not isinstance(name, str) or not name or "\0" in name:
            raise InputError(f"{path}: image {item['id']} has the file_name {name!r}; expected a path")
    names: dict[str, int] = {}
    for item in items:
        first = names.setdefault(item["file_name"], item["id"])
        if first != item["id"]:
            raise InputError(
                f"{path}: images {first} and {item['id']} are the same file {item['file_name']}; "
                "keep one entry, and give it the annotations of both"
            )
    if missing := _missing(path, folder, items):
        raise InputError(
            f"{path}: {len(missing)} of {len(items)} image files are missing in {folder}: "
            f"{listing(missing)}; put them there, or take their entries out of the file"
        )
    for item in items:
        if not any(map(item.get, SIDES)):
            item |= zip(SIDES, upright_size(folder / item["file_name"]), strict=True)
    sizes = np.stack([_integers(path, items, side) for side in SIDES], axis=1)
    if (sizes < 1).any():
        row = int(np.flatnonzero((sizes < 1).any(1))[0])
        raise InputError(
            f"{path}: image {ids[row]} has height × width {sizes[row, 0]} × {sizes[row, 1]}; expected at least 1"
        )
    return ids, np.array([item["file_name"] for item in items]), sizes


def _missing(path: Path, folder: Path, items: list[dict]) -> list[str]:
    """Return the names of the image files that are not there; a name that leads out of the folder is an InputError.

    The places of links are found out once for each folder below, not for each of a hundred thousand files in it.
    """
    missing, sound = [], set()
    for item in items:
        name = item["file_name"]
        parent, _, last = name.rpartition("/")
        regular = _is_regular(f"{folder}/{name}")
        if not regular or parent not in sound or "\\" in last or ":" in last:
            inside(path, f"image {item['id']}", name, folder)
        if regular:
            sound.add(parent)
        elif not is_file(folder / name):
            missing.append(name)
    return missing


def _is_regular(place: str) -> bool:
    """Say whether a file is there that is neither a link nor anything else that leads on."""
    try:
        return stat.S_ISREG(os.lstat(place).st_mode)
    except (OSError, ValueError):  # not there, or a name that no disk can hold
        return False


def _positions(path: Path, values: np.ndarray, known: np.ndarray, ids: np.ndarray, field: str) -> np.ndarray:
    """Return where each value stands in `known`; an unknown one is an InputError naming the annotation."""
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known[order], values).clip(max=len(known) - 1)
    positions = order[place]
    wrong = np.flatnonzero(known[positions] != values)
    if len(wrong):
        bad = listing([f"annotation {ids[i]} has {field} {values[i]}" for i in wrong])
        raise InputError(f"{path}: {bad}, which the file does not define; correct the id or add the entry")
    return positions


def _boxes(path: Path, annotations: list[dict]) -> np.ndarray:
    """Return all boxes as float64 [object, 4]; anything but four numbers is an InputError."""
    boxes: list[Any] = [annotation.get("bbox") for annotation in annotations]
    for annotation, box in zip(annotations, boxes, strict=True):
        if type(box) is not list or len(box) != 4 or not (set(map(type, box)) == {float} or all(map(is_number, box))):
            raise InputError(
                f"{path}: annotation {annotation['id']} has bbox {box!r}; expected [left, top, width, height] in pixels"
            )
    return np.fromiter(chain.from_iterable(boxes), dtype=np.float64).reshape(-1, 4)


def _crowd(path: Path, annotations: list[dict]) -> np.ndarray:
    """Return which objects are regions to be ignored."""
    flags = [annotation.get("iscrowd", 0) for annotation in annotations]
    for annotation, flag in zip(annotations, flags, strict=True):
        if flag not in (0, 1):
            raise InputError(f"{path}: annotation {annotation['id']} has iscrowd {flag!r}; expected 0 or 1")
    return np.array(flags, dtype=bool)


def is_number(value: Any) -> bool:
    """Say whether a value is a number that a float can hold; JSON's integers have no end."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _areas(path: Path, annotations: list[dict]) -> np.ndarray:
    """Return the area of each object as the file states it, else that of its box."""
    stated = [a.get("area") for a in annotations]
    areas = [b["bbox"][2] * b["bbox"][3] if a is None else a for a, b in zip(stated, annotations, strict=True)]
    for annotation, area in zip(annotations, areas, strict=True):
        if not is_number(area) or not 0 <= area < float("inf"):
            if annotation.get("area") is None:
                continue  # a faulty box, which is named on its own account
            raise InputError(f"{path}: annotation {annotation['id']} has area {area!r}; expected a number of 0 or more")
    return np.array(areas, dtype=np.float64)
