"""What becomes of predictions: drawn pictures and videos, COCO, lines of JSON, a table, cut-out objects."""

import csv
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from lucidetr.categories import Categories
from lucidetr.deployment.inputs import Frame, Source, safe_names
from lucidetr.deployment.video import DrawnVideo
from lucidetr.drawing import draw_detections
from lucidetr.errors import InputError
from lucidetr.structures import Detections

MADE = ".made-by-predict"  # lists, one JSON text a line, what was written to a folder: nothing else is written over


def made(out: Path) -> set[str]:
    """Return the names below `out` that earlier predictions wrote; one that leads elsewhere is an InputError."""
    try:
        names = [json.loads(line) for line in (out / MADE).read_text(encoding="utf-8").splitlines()]
        for name in names:
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} is no name below this folder")
        return set(names)
    except FileNotFoundError:
        return set()
    except ValueError as error:
        raise InputError(f"{out / MADE}: damaged ({error}); delete it, or choose another --out") from None


class Writer(AbstractContextManager):
    """Take frames and what was found in them, one after the other; where that ends in an error, `close` is told so."""

    name = ""  # of a file or folder below `out`; none: all of it

    def __init__(self, out: Path, categories: Categories):
        self.out, self.categories = out, categories
        self.made = made(out)

    def note(self, name: str | Path) -> None:
        """Write down, before it is written, a file or folder below `out` as one that a later run may replace."""
        text = Path(name).as_posix()
        if text not in self.made:
            if not self.made:
                self.out.mkdir(parents=True, exist_ok=True)
            self.made.add(text)
            with open(self.out / MADE, "a", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")

    def add(self, frame: Frame, found: Detections) -> None:
        """Write what was found in a frame."""
        raise NotImplementedError

    def close(self, finished: bool) -> None:
        """Write what is left."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kind is None)


class Drawn(Writer):
    """Draw pictures, and each video as a video; they bear the names of their sources."""

    def __init__(self, out: Path, categories: Categories):
        super().__init__(out, categories)
        self.source: Source | None = None
        self.video: DrawnVideo | None = None

    def add(self, frame: Frame, found: Detections) -> None:
        """Draw a picture, or append to the video."""
        if frame.source is not self.source:
            self.close(finished=True)
            self.source = frame.source
            self.note(frame.source.place)
        place = self.out / frame.source.place
        picture = draw_detections(frame.image, found)
        if frame.rate is None:
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
            return
        if not self.video:
            self.video = DrawnVideo(place, picture, frame.rate, frame.aspect)
        self.video.add(picture)

    def close(self, finished: bool) -> None:
        """End the video that is being drawn, if one is."""
        video, self.video = self.video, None
        if video:
            video.close(finished)


class Lines(Writer):
    """Append to a text file, which is NAME.partial until it is whole: of a stop, it keeps all lines before it."""

    def __init__(self, out: Path, categories: Categories):
        super().__init__(out, categories)
        out.mkdir(parents=True, exist_ok=True)
        self.note(self.name)
        self.partial = out / f"{self.name}.partial"
        # every line reaches the disk at once; a file's name may hold bytes that are no letters
        options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "", "buffering": 1}
        self.file = open(self.partial, "w", **options)  # noqa: SIM115, closed by `close`

    def close(self, finished: bool) -> None:
        """Bring the file to the disk; give it its name if it is whole."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        if finished:
            os.replace(self.partial, self.out / self.name)


class JsonLines(Lines):
    """Write one line for each picture or frame, with all that was found in it."""

    name = "detections.jsonl"

    def add(self, frame: Frame, found: Detections) -> None:
        """Append a line."""
        _, height, width = frame.image.shape
        about = {"file": str(frame.source.file), "frame": frame.number, "seconds": frame.seconds}
        rows = [
            {"box_xyxy": box, "score": score, "category_id": category_id, "name": name}
            for box, score, category_id, name in _rows(found)
        ]
        self.file.write(json.dumps(about | {"width": width, "height": height, "detections": rows}) + "\n")


class Csv(Lines):
    """Write one row for each detection."""

    name = "detections.csv"

    def __init__(self, out: Path, categories: Categories):
        super().__init__(out, categories)
        self.table = csv.writer(self.file)
        self.table.writerow(["file", "frame", "name", "category_id", "score", "x0", "y0", "x1", "y1"])

    def add(self, frame: Frame, found: Detections) -> None:
        """Append the rows of a frame."""
        for box, score, category_id, name in _rows(found):
            self.table.writerow([frame.source.file, frame.number, name, category_id, score, *box])


class Coco(Lines):
    """Write a COCO file: boxes as they come, pictures at the end. A frame's file name is VIDEO-NUMBER."""

    name = "detections.json"

    def __init__(self, out: Path, categories: Categories):
        super().__init__(out, categories)
        self.images: list[str] = []
        self.boxes = 0
        both = zip(categories.ids, categories.names, strict=True)
        named = json.dumps([{"id": category_id, "name": name} for category_id, name in both])
        self.file.write(f'{{"categories": {named},\n"annotations": [')

    def add(self, frame: Frame, found: Detections) -> None:
        """Append the boxes, and remember the picture as text, the smallest form of it."""
        _, height, width = frame.image.shape
        number = len(self.images) + 1
        image: dict[str, Any] = {"id": number, "file_name": str(frame.source.file), "width": width, "height": height}
        if frame.number is not None:
            image["file_name"] += f"-{frame.number:06}"
            image |= {"frame": frame.number, "seconds": frame.seconds}
        self.images.append(json.dumps(image))
        for row in found.to_coco(number):
            self.file.write(",\n" if self.boxes else "\n")
            self.boxes += 1
            area = row["bbox"][2] * row["bbox"][3]
            self.file.write(json.dumps({"id": self.boxes, "area": area, "iscrowd": 0} | row))

    def close(self, finished: bool) -> None:
        """Write the pictures, which make it JSON also where not all have been looked at."""
        self.file.write('],\n"images": [\n' + ",\n".join(self.images) + "]}\n")
        super().close(finished)


class Crops(Writer):
    """Cut every detection out of its picture: crops/NAME/STEM-NUMBER.png, crops/NAME/VIDEO/FRAME-NUMBER.png.

    What lies there of this and earlier calls is listed in the folder itself, so that a later one takes away that alone.
    """

    name = "crops"

    def __init__(self, out: Path, categories: Categories):
        super().__init__(out, categories)
        self.note(self.name)
        self.out = out / self.name
        self.made = {name for name in made(self.out) if (self.out / name).is_file()}
        self.folders = safe_names(categories.names)
        self.earlier: dict[str, list[str]] = {}  # of each picture and video
        for name in self.made:
            _, _, stem = name.rpartition("-")[0].partition("/")
            video = stem.rpartition("/")[0]
            self.earlier.setdefault(video if video.endswith(".mp4") else stem, []).append(name)

    def add(self, frame: Frame, found: Detections) -> None:
        """Cut out what was found, in the place of what was found in the picture or video before.

        A box outside the picture gives nothing, and its number is left out.
        """
        _, height, width = frame.image.shape
        place = frame.source.place
        stem = place.with_suffix("") if frame.number is None else place / f"{frame.number:06}"
        for name in self.earlier.pop((stem if frame.number is None else place).as_posix(), []):
            (self.out / name).unlink(missing_ok=True)
            self.made.discard(name)
        corners = zip(found.labels.tolist(), found.boxes_xyxy.round().long().tolist(), strict=True)
        for number, (label, (left, top, right, bottom)) in enumerate(corners):
            part = frame.image[:, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
            if part.numel():
                name = f"{self.folders[label]}/{stem.as_posix()}-{number:03}.png"
                file = self.out / name
                if name not in self.made and file.exists():
                    raise not_ours(file)
                self.note(name)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(part.permute(1, 2, 0).numpy()).save(file)

    def close(self, finished: bool) -> None:
        """List what is there now, without what was taken away."""
        if self.out.is_dir():
            lines = "".join(json.dumps(name) + "\n" for name in sorted(self.made))
            partial = self.out / f"{MADE}.partial"
            partial.write_text(lines, encoding="utf-8")
            partial.replace(self.out / MADE)


WRITERS: dict[str, type[Writer]] = {"drawn": Drawn, "coco": Coco, "jsonl": JsonLines, "csv": Csv, "crops": Crops}


def places(kinds: Sequence[str], out: Path) -> dict[str, Path]:
    """Return where each kind of output goes: a file or a folder."""
    return {kind: out / WRITERS[kind].name for kind in kinds}


def check_places(kinds: Sequence[str], out: Path, sources: Sequence[Source]) -> None:
    """Refuse what would write over one of the pictures or videos, or over anything that predict did not write."""
    crops = (out / Crops.name).resolve()
    for source in sources if "crops" in kinds else ():
        if crops in source.file.resolve().parents:
            raise InputError(f"{source.file}: lies where objects that are cut out are written; choose another --out")
    files, own = {source.file.resolve() for source in sources}, made(out)
    if "crops" in kinds and "crops" in own and crops.is_dir() and not (crops / MADE).is_file():
        raise InputError(f"{crops}: kept no list of what was cut out; move it away or choose another --out")
    names = [source.place for source in sources] if "drawn" in kinds else []
    names += [Path(WRITERS[kind].name) for kind in kinds if WRITERS[kind].name]
    for name in names:
        place = out / name
        if place.resolve() in files:
            raise InputError(f"{place}: drawing would overwrite the picture itself; choose another --out")
        if name.as_posix() not in own and place.exists():
            raise not_ours(place)


def not_ours(place: Path) -> InputError:
    """Return what to say of a file or folder that would be written over."""
    return InputError(f"{place}: is there, and no earlier predict wrote it; move it away or choose another --out")


def _rows(found: Detections) -> zip:
    return zip(found.boxes_xyxy.tolist(), found.scores.tolist(), found.category_ids, found.names, strict=True)
