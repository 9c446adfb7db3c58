"""Where the time goes: reading, augmentation, every part of the network, matching, losses, backward, optimiser.

Pictures are read as a run reads them: detr-r50 decodes each, for COCO fits into few memories; lucid-xs, made for small
data sets, keeps them. One process does everything, so no reading is hidden behind computing.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from PIL import Image

from benchmarks.measure import Common, note, read_options
from benchmarks.pair import random_batch
from benchmarks.steps import BOTH, MATCHING, Stopwatch, inference, square, training
from lucidetr.config import TrainConfig
from lucidetr.data.batching import build_augmentation, training_steps
from lucidetr.data.dataset import open_coco
from lucidetr.structures import Batch
from lucidetr.training.precision import choose_device, choose_precision

PICTURES, OBJECTS = 16, 7
READING, AUGMENTING = "reading and decoding", "augmentation, batching"
# name, recipe, objects in a picture, fields of the model that are changed, the share that matching and losses may take
CASES = (
    ("detr-r50", "detr-r50", OBJECTS, {}, 0.02),
    ("detr-r50, crowded", "detr-r50", 100, {"num_queries": 300}, 0.10),
    ("lucid-xs", "lucid-xs", OBJECTS, {}, 0.05),
)


@dataclass(frozen=True)
class Options(Common):
    """Time the parts of an optimiser step of the recipe's micro batch, and of the prediction of one picture."""

    side: int = 640
    """Of the pictures of detr-r50; lucid-xs has its own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    quick: bool = False
    """Models of a few thousand parameters on small pictures, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, print, and append a line for each to results.jsonl."""
    options = read_options(Options, arguments, "parts")
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    for name, recipe, objects, changes, target in CASES:
        side = 64 if options.quick else options.side if recipe == "detr-r50" else 0
        config = square(recipe, side, options.quick, **changes)
        step, whole = watch_training(config, objects, precision, options.runs, device)
        found = watch_inference(config, precision, options.runs, device)
        share = step[BOTH] / whole
        print(f"{name}: a step takes {whole:.3f} s, matching and losses {share:.1%} of it (at most {target:.0%})")
        for part, seconds in step.items():
            print(f"  {part:28} {1000 * seconds:9.1f} ms {seconds / whole:6.1%}", flush=True)
        settings = {"case": name, "recipe": recipe, "side": config.images.size, "batch": config.micro_batch}
        settings |= {"objects": objects, "queries": config.model.num_queries, "precision": precision}
        measured = {"training": step, "step": whole, "inference": found, "share": share, "target": target}
        note("parts", settings, measured, device)


def watch_training(
    config: TrainConfig, objects: int, precision: str, runs: int, device: torch.device
) -> tuple[dict[str, float], float]:
    """Return the median seconds of each part of an optimiser step, reading included, and those of the whole step.

    The step with its matching is timed as it is; the matching alone is one more, which does not count for the whole.
    """
    watch = Stopwatch(device)
    batch = random_batch(config.micro_batch, config.images.size, objects, config.model.num_classes, device)
    step = training(config, batch, precision, watch)
    taken = []
    with tempfile.TemporaryDirectory() as folder, closing(batches(config, Path(folder), watch)) as reading:
        for _ in range(runs + 2):  # an epoch of the few pictures is over then, or they are small
            with watch.part(AUGMENTING):
                next(reading)
            step()
            taken.append({READING: 0.0} | watch.take())
    parts = {part: median(each[part] for each in taken[2:]) for part in taken[-1]}
    return parts, median(sum(each.values()) - each[MATCHING] for each in taken[2:])


def batches(config: TrainConfig, folder: Path, watch: Stopwatch) -> Iterator[list[Batch]]:
    """Yield batches of photographs as a run makes them, while reading a file counts for itself."""
    dataset = open_coco(write_photographs(folder))
    read = dataset.read

    def reading(index: int) -> torch.Tensor:
        with watch.part(READING):
            return read(index)

    keeps = config.recipe.startswith("lucid")
    dataset = replace(dataset, read=reading).keep(1.0 if keeps else 0.0)
    if keeps:
        for index in range(len(dataset)):
            dataset.square(index, config.images.size)
        watch.take()
    augmentation = build_augmentation(replace(config.augmentation, scales=()), config.images)
    size = config.micro_batch
    yield from training_steps(dataset, config.images, augmentation, seed=0, batch=size, micro_batch=size)


def write_photographs(folder: Path) -> Path:
    """Write a COCO folder of scikit-learn's two photographs, 640 × 427 as JPEG, again and again."""
    from sklearn.datasets import load_sample_images

    images, annotations = [], []
    photographs = load_sample_images().images
    for number in range(PICTURES):
        photograph = Image.fromarray(photographs[number % len(photographs)])
        photograph.save(folder / f"{number}.jpg", quality=90)
        width, height = photograph.size
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        for each in range(OBJECTS):
            box = [60 * each, 40 * each, 120, 100]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder / "train.json"


def watch_inference(config: TrainConfig, precision: str, runs: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each part of predicting one picture."""
    watch = Stopwatch(device)
    batch = random_batch(1, config.images.size, OBJECTS, config.model.num_classes, device)
    infer = inference(config, batch, precision, watch)
    taken = []
    for _ in range(runs + 1):
        infer()
        taken.append(watch.take())
    return {part: median(each[part] for each in taken[1:]) for part in taken[-1]}
