"""Reading a data set as a doctor does: every fault is written down, and reading goes on behind it.

The strict readers (`coco.py`, `voc.py`, `yolo.py`) stop at what cannot be trained on; this one says all of it at once.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lucidetr.data import voc, yolo
from lucidetr.data.coco import LISTS, find_coco, image_folder_of, is_number
from lucidetr.data.decoding import upright_size
from lucidetr.data.faults import inside, listing, repeats
from lucidetr.data.splits import find_names, find_yaml, nothing_found
from lucidetr.errors import InputError, unreadable

Severity = Literal["error", "warning"]


class Finding(NamedTuple):
    """Hold one thing that is wrong or odd: its kind, whether training would refuse it, and the words for it."""

    kind: str
    severity: Severity
    text: str


@dataclass
class Picture:
    """Hold an image as its data set describes it."""

    place: str
    """Where it is described, for messages."""
    path: Path
    width: int | None = None
    height: int | None = None


@dataclass
class Box:
    """Hold an object as its data set describes it: [left, top, width, height] in pixels."""

    place: str
    picture: int
    name: str
    box_xywh: list[float]
    crowd: bool = False


@dataclass
class Raw:
    """Hold what could be read of one split, and what was found wrong on the way."""

    split: str
    pictures: list[Picture] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """Of the categories, in the order of their names."""
    findings: list[Finding] = field(default_factory=list)

    def error(self, kind: str, text: str) -> None:
        """Write down what training would refuse."""
        self.findings.append(Finding(kind, "error", text))

    def warn(self, kind: str, text: str) -> None:
        """Write down what is odd."""
        self.findings.append(Finding(kind, "warning", text))


def read_raw(source: Path) -> tuple[str, list[Raw]]:
    """Return the format of a data set and each of its splits as far as it can be read.

    A path that holds no data set at all is an InputError.
    """
    if yaml := find_yaml(source):
        return "YOLO", raw_yolo(yaml)
    if source.suffix == ".json" and source.is_file():
        return "COCO", [raw_coco("train", source)]
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give the folder that holds your images and their boxes")
    if coco := find_coco(source):
        return "COCO", [raw_coco(split, path) for split, path in coco.items()]
    if read := raw_voc(source):
        return "VOC", read
    if names := find_names(source):
        return "YOLO", raw_yolo(names)
    raise nothing_found(source)


def raw_coco(split: str, path: Path) -> Raw:
    """Read one COCO file."""
    raw = Raw(split)
    content = _json(raw, path)
    if content is None:
        return raw
    categories = _categories(raw, path, content["categories"])
    rows = _pictures(raw, path, content)
    seen: set[int] = set()
    for index, entry in enumerate(content["annotations"]):
        place = f"{path}: annotations[{index}]"
        if not isinstance(entry, dict):
            raw.error("annotation-no-object", f"{place} is {entry!r}; expected an object with fields")
            continue
        number = entry.get("id")
        if type(number) is not int:
            raw.error("annotation-id", f"{place} has the id {number!r}; give it an integer of its own")
        else:
            place = f"{path}: annotation {number}"
            if number in seen:
                raw.error("annotation-id-twice", f"{place}: its id is used more than once; give each its own")
            if number == 0:
                raw.warn(
                    "annotation-id-zero",
                    f"{place}: pycocotools takes the id 0 for 'not matched'; number annotations from 1",
                )
            seen.add(number)
        _annotation(raw, place, entry, rows, categories)
    return raw


def _json(raw: Raw, path: Path) -> dict[str, Any] | None:
    """Return the content of a COCO file, or write down why there is none."""

    def no_number(word: str) -> float:
        raw.error("json-constant", f"{path}: holds {word}, which JSON does not know; replace it by a number")
        return math.nan

    inner: list[tuple[str, str]] = []  # keys that stand twice in an object, and what else stands there
    outer: list[tuple[str, str]] = []  # those of the object that was read last, in the end the whole file

    def entry(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        inner.extend(outer)
        outer.clear()
        if len(found := dict(pairs)) < len(pairs):
            told = listing([f"{key} {value!r}" for key, value in pairs if not isinstance(value, list | dict)])
            outer.extend((key, told) for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return found

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=no_number, object_pairs_hook=entry)
    except json.JSONDecodeError as error:
        raw.error("json", f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg}); export it again")
        return None
    except (ValueError, RecursionError) as error:
        raw.error("json-text", f"{path}: not a readable JSON text ({type(error).__name__}); export it again as UTF-8")
        return None
    except OSError as error:
        raw.error("json-unreadable", unreadable(path, error))
        return None
    if not isinstance(content, dict):
        raw.error("coco-lists", f"{path}: holds no lists images, annotations, categories; is it a COCO file?")
        return None
    for key, told in [*inner, *outer]:
        text = f"{path}: {key!r} stands twice in an object, and only the last of both counts; join or correct them"
        if (key, told) in outer and key in LISTS:
            raw.error("json-list-twice", text)
        else:
            raw.warn("json-key-twice", f"{text} ({told})" if told else text)
    missing = [key for key in LISTS if not isinstance(content.get(key), list)]
    if missing:
        raw.error("coco-lists", f"{path}: has no list {', '.join(missing)}; is it a COCO file?")
        return None
    return content


def _categories(raw: Raw, path: Path, entries: list[Any]) -> dict[int, str]:
    """Return the category names by id."""
    names: dict[int, str] = {}
    if not entries:
        raw.error("no-categories", f"{path}: the list of categories is empty; name at least one")
    for index, entry in enumerate(entries):
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        place = f"{path}: categories[{index}]"
        if type(number) is not int:
            raw.error("category-id", f"{place} has the id {number!r}; give it an integer of its own")
        elif number in names:
            raw.error("category-id-twice", f"{path}: category id {number} stands for {names[number]} and {name}")
        elif not isinstance(name, str) or not name.strip():
            raw.error("category-name", f"{path}: category {number} has the name {name!r}; give it a text")
        else:
            names[number] = name
    raw.names, raw.ids = list(names.values()), list(names)
    return names


def _pictures(raw: Raw, path: Path, content: dict[str, Any]) -> dict[int, int]:
    """Add the images of a COCO file; return where each id stands."""
    rows: dict[int, int] = {}
    listed: dict[str, int] = {}
    entries = [entry for entry in content["images"] if isinstance(entry, dict)]
    if not entries:
        raw.error("no-images", f"{path}: the list of images is empty")
        return rows
    try:
        folder = image_folder_of(path, {"images": entries})
    except InputError:  # then every one of them is named as missing
        folder = path.parent
    for index, entry in enumerate(content["images"]):
        place = f"{path}: images[{index}]"
        if not isinstance(entry, dict):
            raw.error("image-no-object", f"{place} is {entry!r}; expected an object with fields")
            continue
        number, name = entry.get("id"), entry.get("file_name")
        if type(number) is not int:
            raw.error("image-id", f"{place} has the id {number!r}; give it an integer of its own")
            continue
        place = f"{path}: image {number}"
        if number in rows:
            raw.error("image-id-twice", f"{place}: its id is used more than once; give each image its own")
            continue
        if not isinstance(name, str) or not name or "\0" in name:
            raw.error("image-name", f"{place} has the file_name {name!r}; expected a path")
            continue
        try:
            inside(path, f"image {number}", name, folder)
        except InputError as error:
            raw.error("path-leaves", str(error))
            continue
        if name in listed:
            raw.error("image-listed-twice", f"{place} and image {listed[name]} are the same file {name}; keep one")
        listed[name] = number
        rows[number] = len(raw.pictures)
        stated = (entry.get("width"), entry.get("height"))
        sides = [side if type(side) is int and 0 < side < 2**63 else None for side in stated]
        if None in sides:
            if any(stated):  # else they are the picture's own
                said = f"{place} ({name}): width {stated[0]!r} and height {stated[1]!r}"
                raw.error("image-size", f"{said}; write the picture's own pixels")
            sides = [None, None]
        raw.pictures.append(Picture(f"{place} ({name})", folder / name, *sides))
    return rows


def _annotation(raw: Raw, place: str, entry: dict[str, Any], rows: dict[int, int], categories: dict[int, str]) -> None:
    """Add one annotation of a COCO file."""
    owner, kind, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
    if type(owner) is not int or owner not in rows:
        raw.error("annotation-image", f"{place}: image_id {owner!r} is no image of the file; correct it")
        return
    if type(kind) is not int or kind not in categories:
        raw.error("annotation-category", f"{place}: category_id {kind!r} is no category of the file; correct it")
        return
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raw.error("box-numbers", f"{place}: bbox {box!r}; expected [left, top, width, height] in pixels")
        return
    area = 1.0 if entry.get("area") is None else entry["area"]
    if not is_number(area) or not 0 <= area < math.inf:
        raw.error("area", f"{place}: area {area!r}; expected a number of 0 or more")
    if entry.get("iscrowd", 0) not in (0, 1):
        raw.error("crowd", f"{place}: iscrowd {entry['iscrowd']!r}; expected 0 or 1")
    crowd = entry.get("iscrowd") == 1
    raw.boxes.append(Box(place, rows[owner], categories[kind], [float(value) for value in box], crowd))


def raw_yolo(file: Path) -> list[Raw]:
    """Read every split of a data.yaml, or of a folder with a list of names."""
    whole, faults = Raw("all"), {}
    try:
        names, keypoints = yolo.read_names(file), yolo.read_keypoints(file)
        splits = yolo.find_yolo(file, faults)
    except InputError as error:
        whole.error("yaml", str(error))
        return [whole]
    read = [
        _yolo_split(Raw(split, names=list(names.values())), pictures, names, keypoints)
        for split, pictures in splits.items()
    ]
    for split, fault in faults.items():
        read.append(Raw(split, names=list(names.values()), findings=[Finding("yaml", "error", fault)]))
    return read


def _yolo_split(raw: Raw, pictures: list[Path], names: dict[int, str], keypoints: int) -> Raw:
    """Add pictures and label files of one split."""
    expected, without = {}, []
    for _, again in repeats([str(picture) for picture in pictures]):
        raw.error("image-listed-twice", f"{pictures[again]} is listed twice in {raw.split}; list it once")
    for picture in pictures:
        row = len(raw.pictures)
        raw.pictures.append(Picture(str(picture), picture))
        labels = yolo.label_file(picture)
        expected[labels] = picture
        if not labels.is_file():
            without.append(picture)
            continue
        try:
            size = upright_size(picture)
        except InputError as error:
            raw.error("picture", str(error))
            continue
        try:
            lines = yolo.read_lines(labels)
        except InputError as error:
            raw.error("label-text", str(error))
            continue
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _yolo_line(raw, f"{labels}, line {number}", line, row, size, names, keypoints)
    if without and len(without) == len(pictures):
        raw.error(
            "no-labels", f"none of {len(pictures)} pictures has a label file; {yolo.label_file(pictures[0])} is one"
        )
    elif without:
        raw.warn(
            "label-missing", f"{len(without)} pictures have no label file, for example {without[0]}: taken as empty"
        )
    for folder in {labels.parent for labels in expected}:
        orphans = sorted(path for path in folder.glob("*.txt") if path not in expected and _looks_like_labels(path))
        if orphans:
            raw.warn(
                "label-orphan", f"{len(orphans)} label files in {folder} have no picture, for example {orphans[0].name}"
            )
    return raw


def _looks_like_labels(path: Path) -> bool:
    return path.name != "classes.txt" and "labels" in path.parts


def _yolo_line(
    raw: Raw, place: str, line: str, row: int, size: tuple[int, int], names: dict[int, str], keypoints: int
) -> None:
    """Add the box of one line."""
    try:
        kind, shares = yolo.read_box(place, line, keypoints)
    except InputError as error:
        raw.error("label-line", str(error))
        return
    if kind not in names:
        raw.error("label-class", f"{place}: class {kind} is not among the names 0 … {max(names)}; correct it")
        return
    height, width = size
    if max(shares) > 2 and all(math.isfinite(share) for share in shares):
        raw.error("label-pixels", f"{place}: {line.strip()!r} looks like pixels; divide by width and height")
        return
    box = [share * side for share, side in zip(shares, (width, height, width, height), strict=True)]
    raw.boxes.append(Box(place, row, names[kind], box))


def raw_voc(folder: Path) -> list[Raw]:
    """Read every split of a VOC folder; one without XML files has none."""
    whole = Raw("all")
    try:
        splits = voc.find_voc(folder)
    except InputError as error:
        whole.error("voc-list", str(error))
        splits = {"train": sorted(folder.glob("Annotations/*.xml"))}
    if not any(splits.values()):
        return [whole] if whole.findings else []
    read = [_voc_split(Raw(split), folder, files) for split, files in splits.items()]
    every = sorted({box.name for raw in read for box in raw.boxes})
    for raw in read:
        raw.names = every
    return [whole, *read] if whole.findings else read


def _voc_split(raw: Raw, folder: Path, files: list[Path]) -> Raw:
    """Add the XML files of one split."""
    owner: dict[Path, Path] = {}
    for path in files:
        try:
            tree = voc.parse(path)
            picture = folder / voc.picture_of(folder, path, tree)
        except InputError as error:
            raw.error("voc-file", str(error))
            continue
        if (other := owner.setdefault(picture, path)) != path:
            raw.error(
                "image-listed-twice", f"{path}: its picture {picture} is that of {other.name}, too; correct <filename>"
            )
        elif picture.stem != path.stem and (own := picture.with_name(path.stem + picture.suffix)).is_file():
            raw.warn(
                "filename-other", f"{path}: <filename> says {picture.name}, though {own.name} is there; is it right?"
            )
        try:
            height, width = voc.stated_size(path, tree) or (None, None)
        except InputError as error:
            raw.error("image-size", str(error))
            height = width = None
        row = len(raw.pictures)
        raw.pictures.append(Picture(str(path), picture, width, height))
        for number, element in enumerate(tree.iter("object"), start=1):
            place = f"{path}, object {number}"
            try:
                name, (xmin, ymin, xmax, ymax) = voc.read_object(path, element)
            except InputError as error:
                raw.error("voc-object", f"object {number}: {error}")
                continue
            if xmax < xmin or ymax < ymin:
                raw.error("box-reversed", f"{place}: corners {xmin:g} {ymin:g} {xmax:g} {ymax:g} are exchanged")
                continue
            raw.boxes.append(Box(place, row, name, [xmin, ymin, xmax - xmin, ymax - ymin]))
    return raw
