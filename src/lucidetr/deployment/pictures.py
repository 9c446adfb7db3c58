"""Predictions on files and folders: drawn pictures and a COCO file out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lucidetr.data.decoding import SUFFIXES, read_image
from lucidetr.deployment.detector import Detector
from lucidetr.drawing import draw_detections
from lucidetr.errors import InputError
from lucidetr.training.checkpoint import write_atomically


@dataclass(frozen=True)
class Done:
    """Count what was predicted, and name each picture that could not be used."""

    pictures: int
    boxes: int
    refused: list[str]


def find_pictures(inputs: Sequence[str], out: Path) -> list[tuple[Path, Path]]:
    """Return (file, name relative to what was given) of every picture among files and folders, in order.

    What lies under `out` inside a given folder was drawn earlier and does not count.
    """
    found = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
            if out.resolve() != path.resolve():
                files = [f for f in files if out.resolve() not in f.resolve().parents]
            if not files:
                raise InputError(f"{path}: no pictures in this folder ({', '.join(SUFFIXES)})")
            found += [(file, file.relative_to(path)) for file in files]
        elif path.is_file():
            found.append((path, Path(path.name)))
        else:
            raise InputError(f"{path}: no such picture or folder")
    return found


def plan_outputs(pictures: Sequence[tuple[Path, Path]], out: Path) -> list[Path]:
    """Return where each drawn picture goes: its own name under `out`, numbered where two would collide.

    A place that would overwrite one of the pictures themselves is an InputError.
    """
    sources = {file.resolve() for file, _ in pictures}
    taken: set[Path] = set()
    places = []
    for _, name in pictures:
        suffix = ".jpg" if name.suffix.lower() in (".jpg", ".jpeg") else ".png"
        place, number = (out / name).with_suffix(suffix), 1
        while place in taken:
            number += 1
            place = (out / name).with_name(f"{name.stem}-{number}{suffix}")
        if place.resolve() in sources:
            raise InputError(f"{place}: drawing would overwrite the picture itself; choose another --out")
        taken.add(place)
        places.append(place)
    return places


def predict_pictures(detector: Detector, inputs: Sequence[str], out: Path, threshold: float) -> Done:
    """Draw every picture's detections under `out` and write out/detections.json.

    A picture that cannot be read is named in the result and does not stop the others.
    """
    pictures = find_pictures(inputs, out)
    images, annotations, refused = [], [], []
    for (file, _), place in zip(pictures, plan_outputs(pictures, out), strict=True):
        try:
            image = read_image(file)
        except InputError as error:
            refused.append(str(error))
            continue
        detections = detector.predict(image, threshold)
        place.parent.mkdir(parents=True, exist_ok=True)
        draw_detections(image, detections).save(place)
        _, height, width = image.shape
        number = len(images) + 1
        images.append({"id": number, "file_name": str(file), "width": width, "height": height})
        for row in detections.to_coco(number):
            area = row["bbox"][2] * row["bbox"][3]
            annotations.append({"id": len(annotations) + 1, "area": area, "iscrowd": 0} | row)
    names = zip(detector.card.categories.ids, detector.names, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in names]
    content = {"images": images, "categories": categories, "annotations": annotations}
    write_atomically(out / "detections.json", json.dumps(content, indent=1).encode())
    return Done(len(images), len(annotations), refused)
