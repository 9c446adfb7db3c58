"""Where the splits of a data set lie, whatever its format: COCO, YOLO or Pascal VOC, found from a path."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lucidetr.data.annotations import Annotations
from lucidetr.data.faults import BadBoxes
from lucidetr.errors import InputError

YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_LISTS = ("classes.txt", "obj.names")  # of LabelImg and Label Studio, and of Darknet
ANNOTATIONS = ("annotations", "Annotations")  # folders of COCO and of VOC
SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}


def split_of(name: str) -> str | None:
    """Return the split that a name speaks of.

    >>> split_of("instances_train2017"), split_of("valid"), split_of("test-dev2017"), split_of("retrain")
    ('train', 'val', 'test', None)
    """
    parts = re.split(r"[^a-z]+", name.lower())
    return next((split for split in ("train", "test", "val") if not {*SPLIT_WORDS[split]}.isdisjoint(parts)), None)


def find_yaml(source: Path) -> Path | None:
    """Return the description of a YOLO data set: the file itself, or the one in a folder; None where there is none."""
    if source.suffix in (".yaml", ".yml"):
        return source
    return next((source / name for name in YAMLS if (source / name).is_file()), None)


def _describes(yaml: Path) -> bool:
    """Say whether a YAML text has lines that begin with train and names."""
    try:
        text = yaml.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return False
    return all(re.search(rf"^{word}\s*:", text, re.MULTILINE) for word in ("train", "names"))


def find_names(source: Path) -> Path | None:
    """Return what says the names of a YOLO folder that has no yaml of a usual name; None where nothing does.

    The only YAML text of another name that says train and names, or a list of names as labelling tools export it.
    """
    others = [path for path in sorted(source.glob("*.y*ml")) if path.is_file() and _describes(path)]
    if len(others) == 1:
        return others[0]
    places = [folder / name for folder in (source, source / "labels") for name in NAME_LISTS]
    return next((place for place in places if place.is_file()), None)


@dataclass(frozen=True)
class Found:
    """Hold the format of a data set and, for each of its splits, what reads it."""

    format: str
    splits: dict[str, Callable[[BadBoxes], Annotations]]


def find_splits(source: Path) -> Found:
    """Find the splits of a folder, a data.yaml or a single COCO file, which counts as train.

    What describes most comes first: a data.yaml, COCO's JSON, VOC's XML, and last a bare list of class names.
    What holds no data set of a known format is an InputError.
    """
    from lucidetr.data.coco import find_coco, read_coco
    from lucidetr.data.voc import find_voc, read_voc
    from lucidetr.data.yolo import find_yolo, read_yolo

    def yolo(file: Path) -> Found:
        faults: dict[str, str] = {}
        splits = {split: partial(read_yolo, file, files) for split, files in find_yolo(file, faults).items()}
        return Found("YOLO", splits | {split: _refusing(said) for split, said in faults.items()})

    if yaml := find_yaml(source):
        return yolo(yaml)
    if source.suffix == ".json":
        return Found("COCO", {"train": partial(read_coco, source, None)})
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give --data the folder that holds your images and their boxes")
    coco = find_coco(source)
    if coco:
        return Found("COCO", {split: partial(read_coco, path, None) for split, path in coco.items()})
    voc = find_voc(source)
    if voc:
        every = sorted({path for files in voc.values() for path in files})
        return Found("VOC", {split: partial(read_voc, source, files, every) for split, files in voc.items()})
    if names := find_names(source):
        return yolo(names)
    raise nothing_found(source)


def nothing_found(source: Path) -> InputError:
    """Return the error for a folder that holds no data set of a known format."""
    fix = "give COCO files with --train-json and --train-images"
    inside = [each for each in sorted(source.iterdir()) if each.is_dir()]
    if holds := [each for each in inside if _looks_like_a_set(each)]:
        fix = f"{holds[0]} looks like one: give that"
    elif any((source / "labels").rglob("*.txt")):
        fix = f"for the boxes in {source / 'labels'} write {source / NAME_LISTS[0]}, one class name on each line"
    return InputError(
        f"{source}: no data set that can be read: no COCO json in {source}/annotations, {source} or its sub-folders, "
        f"no data.yaml or {NAME_LISTS[0]} (YOLO), no XML files (Pascal VOC); {fix}"
    )


def _looks_like_a_set(folder: Path) -> bool:
    """Say whether a folder has what a data set's folder has at its top; one that may not be looked into has not."""
    try:
        return bool(find_yaml(folder) or find_names(folder) or any((folder / a).is_dir() for a in ANNOTATIONS))
    except OSError:
        return False


def _refusing(said: str) -> Callable[[BadBoxes], Annotations]:
    """Return the reader of a split that cannot be found: who does not ask for it need not mind."""

    def refuse(bad_boxes: BadBoxes) -> Annotations:
        raise InputError(said)

    return refuse
