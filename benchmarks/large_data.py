"""A data set of COCO's size: how long and how much memory its boxes take, and whether reading processes grow.

The annotations are as many as COCO's and carry outlines as COCO's do; the pictures are one tiny JPEG under many names.
"""

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from benchmarks.measure import note
from lucidetr.config import TrainConfig
from lucidetr.data.batching import build_augmentation, training_steps
from lucidetr.data.dataset import Dataset, open_dataset, open_training_data
from lucidetr.errors import InputError
from lucidetr.recipes import recipe
from lucidetr.structures import Batch

BATCH, SIDE = 64, 64  # of the run
LOOKS = 40  # at the memory of the reading processes
HEIGHT, WIDTH = 48, 64  # of every picture
LINKS = 10_000  # names for one file; file systems allow some ten thousand
CATEGORIES = 80
CORNERS = 12  # of an outline, about as many as COCO has on average


@dataclass(frozen=True)
class Options:
    """Write a COCO folder, read it in a process of its own, and watch the memory of reading processes for an epoch.

    Everything is done once and on the CPU.
    """

    images: int = 120_000
    boxes: int = 1_000_000
    workers: int = 2
    """Reading processes whose memory is watched; 0: none."""
    folder: str = ""
    """Keep the written data set here and use it again; empty: a temporary folder."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and append one line to results.jsonl."""
    options = tyro.cli(Options, args=arguments or [], prog="python -m benchmarks large_data")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        path = folder / "train.json"
        if not path.is_file():
            write_folder(folder, options.images, options.boxes)
        measured = {
            "file_mb": path.stat().st_size / 1e6,
            "libraries": in_own_process(load_libraries),
            "reading": in_own_process(read_boxes, path),
        }
        images, boxes = measured["reading"].pop("images"), measured["reading"]["objects"]
        if (images, boxes) != (options.images, options.boxes):
            raise InputError(
                f"--folder {folder}: its train.json has {images} images and {boxes} boxes, not {options.images} and "
                f"{options.boxes}: give --images {images} --boxes {boxes}, or another folder"
            )
        measured["start"] = in_own_process(first_batch, folder)
        if options.workers:
            measured["workers"] = in_own_process(watch_workers, folder, options.workers)
    settings = {name: getattr(options, name) for name in ("images", "boxes", "workers")}
    print(f"large_data: {options.boxes:,} boxes of {options.images:,} pictures, a file of {measured['file_mb']:.0f} MB")
    for name in ("libraries", "reading", "start", "workers")[: 4 if options.workers else 3]:
        print(f"  {name:10} { ({key: value for key, value in measured[name].items() if key != 'workers'}) }")
    note("large_data", settings, measured)


def write_folder(folder: Path, images: int, boxes: int) -> None:
    """Write train.json and a picture file under as many names as there are images."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        name = folder / f"{number:012}.jpg"
        if number % LINKS == 0:
            Image.fromarray(random.integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)).save(name)
            source = name
        else:
            os.link(source, name)
    size = random.uniform(2, HEIGHT / 2, (boxes, 2))
    left_top = random.uniform(0, 1, (boxes, 2)) * ((WIDTH, HEIGHT) - size)
    owners, kinds = random.integers(images, size=boxes).tolist(), random.integers(CATEGORIES, size=boxes).tolist()
    with open(folder / "train.json", "w", encoding="utf-8") as file:
        pictures = [
            {"id": i, "file_name": f"{i:012}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1}
            for i in range(images)
        ]
        kept = [{"id": i, "name": f"category {i}"} for i in range(CATEGORIES)]
        file.write(f'{{"images": {json.dumps(pictures)}, "categories": {json.dumps(kept)}, "annotations": [')
        for i, box in enumerate(np.concatenate([left_top, size], axis=1).round(2).tolist()):
            outline = [[round(box[k % 2] + 0.37 * k % 2, 2) for k in range(2 * CORNERS)]]
            entry = {"segmentation": outline, "area": round(box[2] * box[3], 2), "iscrowd": 0, "image_id": owners[i]}
            entry |= {"bbox": box, "category_id": kinds[i], "id": i + 1}
            file.write(("," if i else "") + json.dumps(entry))
        file.write("]}")


def in_own_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what the work measures in a fresh process, with its seconds and the most memory it ever had.

    `with_start` are the seconds from the start of the process on, its imports included.
    """
    started = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        said = pool.submit(measured, work, arguments).result()
        return said | {"with_start": time.perf_counter() - started}


def measured(work: Callable[..., dict[str, Any]], arguments: tuple) -> dict[str, Any]:
    """Return what the work says, its seconds of wall and processor, and this process's peak in megabytes."""
    started, busy = time.perf_counter(), time.process_time()
    said = work(*arguments)
    seconds = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - busy}
    return said | seconds | {"peak_mb": peak_mb()}


def peak_mb() -> float:
    """Return the most memory that this process has held, in megabytes.

    Linux lets a process inherit what getrusage calls its peak from the one that started it; its status does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def load_libraries() -> dict[str, Any]:
    """Import what reading needs, and no more."""
    import lucidetr.data.coco  # noqa: F401

    return {}


def read_boxes(path: Path) -> dict[str, Any]:
    """Read the annotations; the libraries are there already, so their seconds do not count."""
    from lucidetr.data.coco import read_coco

    started = time.perf_counter()
    annotations = read_coco(path)
    seconds = time.perf_counter() - started
    return {"reading_seconds": seconds, "objects": len(annotations.labels), "images": len(annotations)}


def run_config(folder: Path) -> TrainConfig:
    """Return a run on the data that keeps no picture in memory, as no run on COCO can."""
    config = replace(recipe("lucid-xs"), data=str(folder), cache_gb=0.0, batch=BATCH, micro_batch=BATCH)
    return replace(config, images=replace(config.images, size=SIDE))


def first_batch(folder: Path) -> dict[str, Any]:
    """Open the data as a run does and make its first batch."""
    config = run_config(folder)
    train, _, _ = open_training_data(config)
    with closing(steps_of(config, train, 0)) as steps:
        (batch,) = next(steps)
    return {"first_batch": len(batch)}


def steps_of(config: TrainConfig, dataset: Dataset, workers: int) -> Generator[list[Batch], None, None]:
    """Return the batches of a run."""
    augmentation = build_augmentation(config.augmentation, config.images)
    cut = {"seed": 0, "batch": BATCH, "micro_batch": BATCH}
    return training_steps(dataset, config.images, augmentation, **cut, workers=workers)


def watch_workers(folder: Path, workers: int) -> dict[str, Any]:
    """Return how the memory of each reading process grows over an epoch: the last quarter of it against the first.

    What a process has for itself (USS), and with its part of what is shared (PSS), in megabytes. Medians of many
    looks, because malloc holds a few batches back now and then and gives them up again.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        return {"left_out": "only Linux says how much memory a process shares"}
    multiprocessing.set_start_method("fork", force=True)  # as a run has it; this process itself was spawned
    config = run_config(folder)
    dataset = open_dataset(config.data, "train")
    count = len(dataset) // BATCH
    looks: list[list[dict[str, float]]] = []
    with closing(steps_of(config, dataset, workers)) as steps:
        for step, _ in enumerate(islice(steps, count), 1):
            if step * LOOKS // count > len(looks):
                looks.append([memory_of(child.pid) for child in multiprocessing.active_children()])
    quarter = max(len(looks) // 4, 1)
    growth = {}
    for kind in ("uss_mb", "pss_mb"):
        values = np.array([[each[kind] for each in look] for look in looks])
        early, late = np.median(values[:quarter], axis=0), np.median(values[-quarter:], axis=0)
        growth[kind] = float((late / early - 1).max())
    return {"growth": growth, "steps": count, "workers": looks}


def memory_of(process: int | None) -> dict[str, float]:
    """Return the megabytes that a process has for itself, and with its part of what it shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return {"uss_mb": private / 1024, "pss_mb": kilobytes["Pss"] / 1024}
