"""Files from strangers: how they are read, what a reading may cost, and which files it opened."""

import json
import os
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

from lucidetr.data.dataset import open_dataset
from lucidetr.data.doctor import diagnose
from lucidetr.errors import InputError

LONGEST = 2.0  # seconds of computing that any one file may cost
MOST = 512 * 2**20  # bytes of memory that it may, beyond those that the process has already
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MEASURES_MEMORY = RESET.exists()  # on Linux; no other system begins the peak anew, and there time alone is checked


def reset_peak() -> int:
    """Begin the peak of this process's memory anew; return what it holds now, in bytes."""
    if MEASURES_MEMORY:
        RESET.write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Return the most memory that this process has held since the reset, in bytes; 0 where that is not known."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if MEASURES_MEMORY else None
    return int(found[1]) * 1024 if found else 0


@contextmanager
def limited(what: object) -> Iterator[None]:
    """See that something costs little computing and, on Linux, little memory."""
    before, started = reset_peak(), time.process_time()
    yield
    seconds, memory = time.process_time() - started, peak_memory() - before
    assert seconds < LONGEST, f"{what}: {seconds:.1f} seconds of computing"
    assert memory <= MOST, f"{what}: {memory / 2**20:.0f} MiB of memory"


OPENED: list[str] | None = None  # what was opened, while a test listens


def _listen(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        OPENED.append(os.fsdecode(arguments[0]))


@contextmanager
def listening() -> Iterator[list[str]]:
    """Return the names of all files that Python opens meanwhile, its own and those of its packages aside."""
    global OPENED
    if not getattr(_listen, "hooked", False):
        sys.addaudithook(_listen)  # it cannot be taken away again
        _listen.hooked = True
    OPENED = found = []
    try:
        yield found
    finally:
        OPENED = None
        own = (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(Path(__file__).parents[1] / "src"))
        found[:] = [name for name in found if not os.path.realpath(name).startswith(own)]


def outside(opened: list[str], folder: Path) -> list[str]:
    return [name for name in opened if not Path(os.path.realpath(name)).is_relative_to(folder.resolve())]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(path)


def pixels(source: Path) -> None:
    dataset = open_dataset(str(source), "train")
    for index in range(len(dataset)):
        dataset.image(index)


def train(source: Path) -> str:
    """Read all of a set as training does; return why it was refused, if it was."""
    try:
        pixels(source)
    except InputError as error:
        return str(error)
    return ""


def examine(source: Path) -> str:
    """Read all of a set as the doctor does; return what it says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's remarks on infinite numbers
            return "; ".join(finding.text for finding in diagnose(source).findings)
    except InputError as error:
        return str(error)


def look(source: Path) -> str:
    """Read all of a set both ways; return why training refused it, if it did."""
    examine(source)
    return train(source)


COCO = {"width": 40, "height": 30}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}


def coco_set(folder: Path, name: str) -> Path:
    images = [{"id": 2, "file_name": name} | COCO, {"id": 1, "file_name": "good.png"} | COCO]
    (folder / "train.json").write_text(
        json.dumps({"images": images, "annotations": [BOX], "categories": [{"id": 1, "name": "a"}]})
    )
    return folder


def voc_set(folder: Path, name: str) -> Path:
    (folder / "Annotations").mkdir(exist_ok=True)
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>6</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height></size>"
    (folder / "Annotations" / "x.xml").write_text(
        f"<annotation><filename>{escape(name)}</filename>{size}<object><name>a</name>{box}</object></annotation>"
    )
    return folder


def yolo_set(folder: Path, name: str) -> Path:
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels" / "good.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / "data.yaml").write_text(f"train: {json.dumps(name)}\nnames: [a]\n")
    return folder


def yolo_list(folder: Path, name: str) -> Path:
    lines = dict.fromkeys(["images/good.png", name])  # one line where it is the same picture
    (folder / "list.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return yolo_set(folder, "list.txt")
