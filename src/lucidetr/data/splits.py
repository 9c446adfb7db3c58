"""Where the splits of a data set lie, whatever its format: COCO, YOLO or Pascal VOC, found from a path."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lucidetr.data.annotations import Annotations
from lucidetr.data.faults import BadBoxes
from lucidetr.errors import InputError

YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
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


@dataclass(frozen=True)
class Found:
    """Hold the format of a data set and, for each of its splits, what reads it."""

    format: str
    splits: dict[str, Callable[[BadBoxes], Annotations]]


def find_splits(source: Path) -> Found:
    """Find the splits of a folder, a data.yaml or a single COCO file, which counts as train.

    What holds no data set of a known format is an InputError.
    """
    from lucidetr.data.coco import find_coco, read_coco
    from lucidetr.data.voc import find_voc, read_voc
    from lucidetr.data.yolo import find_yolo, read_yolo

    if yaml := find_yaml(source):
        return Found("YOLO", {split: _reader(read_yolo, yaml, files) for split, files in find_yolo(yaml).items()})
    if source.suffix == ".json":
        return Found("COCO", {"train": _reader(read_coco, source, None)})
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give --data the folder that holds your images and their boxes")
    coco = find_coco(source)
    if coco:
        return Found("COCO", {split: _reader(read_coco, path, None) for split, path in coco.items()})
    voc = find_voc(source)
    if voc:
        every = sorted({path for files in voc.values() for path in files})
        return Found("VOC", {split: _reader(read_voc, source, files, every) for split, files in voc.items()})
    raise InputError(
        f"{source}: no data set that can be read: no COCO json in {source}/annotations, {source} or its sub-folders, "
        "no data.yaml (YOLO), no XML files (Pascal VOC); give COCO files with --train-json and --train-images"
    )


def _reader(read: Callable[..., Annotations], *given: object) -> Callable[[BadBoxes], Annotations]:
    return lambda bad_boxes: read(*given, bad_boxes)
