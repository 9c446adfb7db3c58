"""COCO annotation files: a strict reader, a writer, and the search for them in a folder."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from lucidetr.categories import Categories
from lucidetr.data.annotations import Annotations, Objects, Pictures, gather
from lucidetr.data.faults import BadBoxes, check_boxes, inside, is_file, listing, refuse_duplicates
from lucidetr.data.splits import SPLIT_WORDS, split_of
from lucidetr.errors import InputError


def read_coco(path: Path, images: Path | None = None, bad_boxes: BadBoxes = "refuse") -> Annotations:
    """Read one COCO file whose pictures lie in the folder `images`, or where data sets keep theirs when it is None.

    Everything that cannot be trained on is an InputError that names the file, the id, the value and what to do.
    With `bad_boxes="drop"`, boxes without area are left out and boxes over the edge are cut.
    """
    content = _load_json(path)
    images = images or image_folder_of(path, content)
    categories = _categories(path, content["categories"])
    image_ids, names, sizes = _images(path, images, content["images"])
    annotations = content["annotations"]
    ids, owners, kinds = (_integers(path, annotations, key) for key in ("id", "image_id", "category_id"))
    refuse_duplicates(path, "annotation", ids)
    image_rows = _positions(path, owners, image_ids, ids, "image_id")
    labels = _positions(path, kinds, np.array(categories.ids, dtype=np.int64), ids, "category_id")
    boxes = _boxes(path, annotations)
    areas = _areas(path, annotations)
    crowd = np.array([a.get("iscrowd", 0) == 1 for a in annotations], dtype=bool)

    def place(row: int) -> str:
        return f"annotation {ids[row]} in {names[image_rows[row]]}: bbox"

    boxes, keep = check_boxes(path, boxes, sizes[image_rows], place, bad_boxes)
    return gather(
        categories,
        images,
        Pictures(image_ids, names, sizes),
        Objects(image_rows, ids, boxes, labels, areas, crowd),
        keep,
    )


def write_coco(annotations: Annotations, path: Path) -> None:
    """Write a COCO annotation file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(annotations.to_coco()))


def find_coco(folder: Path) -> dict[str, Path]:
    """Find the annotation file of each split below `folder`: {"train": path, "val": path, …}; {} where there is none.

    Known layouts: annotations/NAME.json beside image folders (COCO itself, with instances_ before the name),
    NAME.json in the folder, and SPLIT/_annotations.coco.json beside that split's images. A lone file without a
    split's name counts as the training split.
    """
    places = ("annotations/*.json", "*.json", "*/_annotations*.json")
    candidates = sorted({path for place in places for path in folder.glob(place)})
    if any(path.stem.startswith("instances") for path in candidates):  # COCO also ships captions and key points
        candidates = [path for path in candidates if path.stem.startswith("instances")]
    if not candidates:
        return {}
    found: dict[str, list[Path]] = {}
    for path in candidates:
        split = _split_of(path) or ("train" if len(candidates) == 1 else None)
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
    raise InputError(f"{path}: its first image {first} is in none of {tried}; put it there, or give its folder too")


def _load_json(path: Path) -> dict[str, Any]:
    """Read a file and check that it has the three lists of a COCO file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, numbers of thousands of digits, brackets without end
        raise InputError(f"{path}: not a readable JSON text ({type(error).__name__})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(
                f"{path}: not a COCO file: it has no list {key!r}; "
                "COCO files hold the lists images, annotations and categories"
            )
        for index, item in enumerate(content[key]):
            if not isinstance(item, dict):
                raise InputError(f"{path}: {key}[{index}] is {item!r}; expected an object with fields")
    return content


def _refuse_constant(word: str) -> None:
    raise InputError(f"the file holds the value {word}, which JSON does not know; replace it by a number")


def _integers(path: Path, items: list[dict], key: str) -> np.ndarray:
    """Return one integer field of all items."""
    try:
        values = [item[key] for item in items]
    except KeyError:
        index = next(i for i, item in enumerate(items) if key not in item)
        raise InputError(f"{path}: entry {index} ({_short(items[index])}) has no field {key!r}") from None
    for index, value in enumerate(values):
        if type(value) is not int or abs(value) >= 2**63:
            raise InputError(f"{path}: entry {index} ({_short(items[index])}): {key} = {value!r}; expected an integer")
    return np.array(values, dtype=np.int64)


def _short(item: dict) -> str:
    text = json.dumps(item)
    return text if len(text) <= 120 else text[:117] + "…"


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
    """Return ids, file names and sizes (height, width) of the images; each file must be there."""
    if not items:
        raise InputError(f"{path}: the list of images is empty")
    ids = _integers(path, items, "id")
    refuse_duplicates(path, "image", ids)
    sizes = np.stack([_integers(path, items, "height"), _integers(path, items, "width")], axis=1)
    for item in items:
        name = item.get("file_name")
        if not isinstance(name, str) or not name or "\0" in name:
            raise InputError(f"{path}: image {item['id']} has the file_name {name!r}; expected a path")
        inside(path, f"image {item['id']}", name, folder)
    if (sizes < 1).any():
        row = int(np.flatnonzero((sizes < 1).any(1))[0])
        raise InputError(
            f"{path}: image {ids[row]} has height × width {sizes[row, 0]} × {sizes[row, 1]}; expected at least 1"
        )
    missing = [item["file_name"] for item in items if not is_file(folder / item["file_name"])]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(items)} image files are missing in {folder}: "
            f"{listing(missing)}; put them there, or take their entries out of the file"
        )
    return ids, np.array([item["file_name"] for item in items]), sizes


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
    for annotation in annotations:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            raise InputError(
                f"{path}: annotation {annotation['id']} has bbox {box!r}; expected [left, top, width, height] in pixels"
            )
    return np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)


def is_number(value: Any) -> bool:
    """Say whether a value is a number that a float can hold; JSON's integers have no end."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _areas(path: Path, annotations: list[dict]) -> np.ndarray:
    """Return the area of each object as the file states it, else that of its box."""
    areas = [a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations]
    for annotation, area in zip(annotations, areas, strict=True):
        if not is_number(area) or not 0 <= area < float("inf"):
            if "area" not in annotation:
                continue  # a faulty box, which is named on its own account
            raise InputError(f"{path}: annotation {annotation['id']} has area {area!r}; expected a number of 0 or more")
    return np.array(areas, dtype=np.float64)
