"""Any data set written as a new folder in COCO's, YOLO's or Pascal VOC's form; the source is only read."""

import hashlib
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from PIL import Image

from lucidetr.data import digits
from lucidetr.data.coco import write_coco
from lucidetr.data.dataset import Dataset, held_out, open_dataset, refuse_other_categories
from lucidetr.data.places import Links, View, find_pairs, small_copy
from lucidetr.data.raw import Raw
from lucidetr.data.splits import find_splits
from lucidetr.data.yolo import label_file
from lucidetr.errors import InputError

Format = Literal["coco", "yolo", "voc"]


def open_splits(source: str, bad_boxes: Literal["refuse", "drop"] = "refuse") -> dict[str, Dataset]:
    """Open every split of a folder or of a generated set."""
    names = digits.SPLITS if source.startswith("generated:") else find_splits(Path(source)).splits
    return {split: open_dataset(source, split, bad_boxes) for split in names}


def divide(
    dataset: Dataset, val: float, test: float, seed: int, places: Int[np.ndarray, " image"] | None = None
) -> dict[str, Dataset]:
    """Return one split as two or three, at random; the same seed divides the same way.

    Pictures with the same number in `places` stay together.
    """
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise InputError(f"--val {val:g} --test {test:g}: give shares above 0 that leave something for training")
    if len(dataset) < (needed := 3 if test else 2):
        raise InputError(f"{dataset.name}: {len(dataset)} pictures cannot be split into {needed}; give more")
    held = held_out(len(dataset), val + test, seed, places)
    parts = {"train": np.setdiff1d(np.arange(len(dataset)), held), "val": held}
    if test:
        first = held_out(len(held), test / (val + test), seed, None if places is None else places[held])
        parts |= {"val": np.delete(held, first), "test": held[first]}
    if empty := [split for split, indices in parts.items() if not len(indices)]:
        number = len(dataset) if places is None else len(np.unique(places))
        raise InputError(
            f"{dataset.name}: {len(dataset)} pictures of {number} place{'s' * (number != 1)} leave none for "
            f"{' and '.join(empty)}; give larger shares, another --seed or more pictures"
            + (", or --places off" if number < len(dataset) else "")
        )
    return {split: dataset.subset(indices, f"{dataset.name}, {split}") for split, indices in parts.items()}


def places_of(dataset: Dataset) -> Int[np.ndarray, " image"]:
    """Return a number for each picture, the same for those that show one place, and for copies.

    Every two of one size are compared. A picture that cannot be decoded is an InputError.
    """
    whole, views, links = Raw("train"), [], Links(len(dataset))
    copy_of: dict[tuple, int] = {}
    for number in range(len(dataset)):
        image = Image.fromarray(dataset.decoded(number).permute(1, 2, 0).numpy())
        views.append(View(whole, number, image.size, small_copy(image)))
        # a copy of a picture without details, which pairs leave out
        links.join(number, copy_of.setdefault((image.size, hashlib.sha256(image.tobytes()).digest()), number))
    for pair in find_pairs(views):
        links.join(pair.first.number, pair.second.number)
    return np.array([links.root(number) for number in range(len(views))])


def write_splits(splits: Mapping[str, Dataset], folder: Path, form: Format) -> dict[str, int]:
    """Write pictures and boxes of every split into a new folder; return the number of images of each.

    Picture files are copied as they are, generated scenes written as PNG without loss.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; choose a new folder")
    write = {"coco": _write_coco, "yolo": _write_yolo, "voc": _write_voc}[form]
    for dataset in splits.values():
        _refuse_crowds(dataset, form)
        _refuse_clashes(dataset, form)
        if form == "yolo":  # one list of names for all
            refuse_other_categories(next(iter(splits.values())), dataset)
    for split, dataset in splits.items():
        write(dataset, folder, split)
    if form == "yolo":
        _write_yaml(splits, folder)
    return {split: len(dataset) for split, dataset in splits.items()}


def _refuse_crowds(dataset: Dataset, form: Format) -> None:
    """Refuse to turn regions to be ignored into objects."""
    crowds = int(dataset.annotations.crowd.sum())
    if crowds and form != "coco":
        raise InputError(f"{dataset.name}: {crowds} crowd boxes cannot be said in {form}; take them out, or --to coco")


def _refuse_clashes(dataset: Dataset, form: Format) -> None:
    """Refuse pictures whose boxes would be written into one file: names that differ in their suffix alone."""
    owner: dict[str, str] = {}
    for name in map(str, dataset.annotations.file_names):
        path = Path(name).with_suffix("")
        key = {"coco": name, "yolo": str(path), "voc": path.name}[form]
        if key in owner:
            raise InputError(f"{dataset.name}: {owner[key]} and {name} would share one file of boxes; rename one")
        owner[key] = name


def _write_picture(dataset: Dataset, index: int, path: Path) -> None:
    """Copy a picture's file, or write the pixels of one that has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if source := dataset.file(index):
        shutil.copyfile(source, path)
    else:
        Image.fromarray(np.ascontiguousarray(dataset.image(index).permute(1, 2, 0).numpy())).save(path)


def _write_coco(dataset: Dataset, folder: Path, split: str) -> None:
    """Write annotations/SPLIT.json and SPLIT/NAME, the user's own ids kept."""
    annotations = dataset.annotations
    for index, name in enumerate(annotations.file_names):
        _write_picture(dataset, index, folder / split / str(name))
    write_coco(annotations, folder / "annotations" / f"{split}.json")


def _write_yolo(dataset: Dataset, folder: Path, split: str) -> None:
    """Write images/SPLIT/NAME and labels/SPLIT/NAME.txt, classes numbered from 0."""
    annotations = dataset.annotations
    for index, name in enumerate(annotations.file_names):
        _write_picture(dataset, index, folder / "images" / split / str(name))
        rows = annotations.rows(index)
        height, width = annotations.sizes[index]
        shares = annotations.boxes_xywh[rows] / (width, height, width, height)
        centred = np.concatenate([shares[:, :2] + shares[:, 2:] / 2, shares[:, 2:]], axis=1)
        lines = [
            " ".join([str(label), *(repr(float(value)) for value in box)]) + "\n"
            for label, box in zip(annotations.labels[rows].tolist(), centred, strict=True)
        ]
        path = label_file(folder / "images" / split / str(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")


def _write_yaml(splits: Mapping[str, Dataset], folder: Path) -> None:
    import yaml

    names = next(iter(splits.values())).annotations.categories.names
    content = {split: f"images/{split}" for split in splits} | {"nc": len(names), "names": list(names)}
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _write_voc(dataset: Dataset, folder: Path, split: str) -> None:
    """Write SPLIT/NAME and SPLIT/NAME.xml beside it."""
    annotations, names = dataset.annotations, dataset.annotations.categories.names
    for index, name in enumerate(annotations.file_names):
        picture = folder / split / Path(str(name)).name
        _write_picture(dataset, index, picture)
        rows = annotations.rows(index)
        height, width = annotations.sizes[index].tolist()
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = picture.name
        _children(ET.SubElement(root, "size"), {"width": width, "height": height, "depth": 3})
        for label, (left, top, wide, high) in zip(
            annotations.labels[rows].tolist(), annotations.boxes_xywh[rows].tolist(), strict=True
        ):
            each = ET.SubElement(root, "object")
            ET.SubElement(each, "name").text = names[label]
            corners = {"xmin": left, "ymin": top, "xmax": left + wide, "ymax": top + high}
            _children(ET.SubElement(each, "bndbox"), corners)
        ET.indent(root)
        ET.ElementTree(root).write(picture.with_suffix(".xml"), encoding="utf-8")


def _children(element: ET.Element, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        ET.SubElement(element, name).text = repr(value)
