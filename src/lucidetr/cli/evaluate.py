"""lucidetr eval: COCO's twelve numbers of a saved model on a split, as tables and as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lucidetr.errors import InputError


@dataclass(frozen=True)
class Options:
    """Evaluate a trained model on a split."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, or a model file."""
    data: str = ""
    """Folder or generated set; left out: the one that the run was trained on."""
    split: str = "val"
    json: str = ""
    """Explicit COCO file instead of --data."""
    images: str = ""
    """Folder of its images."""
    bad_boxes: Literal["refuse", "drop"] = "refuse"
    batch: int = 4
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def run(arguments: list[str]) -> None:
    """Evaluate, print the tables, and write RUN/metrics-SPLIT.json and RUN/detections-SPLIT.json."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr eval")

    from lucidetr.deployment.detector import load
    from lucidetr.evaluation.coco import evaluate
    from lucidetr.evaluation.detect import detect, speak
    from lucidetr.evaluation.table import print_metrics
    from lucidetr.training.checkpoint import write_atomically
    from lucidetr.training.progress import ProgressLine

    detector = load(options.model, options.device, options.precision)
    folder = Path(options.model) if Path(options.model).is_dir() else Path(options.model).parent
    dataset = open_split(options, folder)
    annotations, images = dataset.annotations, len(dataset)
    line = ProgressLine()
    try:
        found = detect(
            detector.model,
            dataset,
            detector.card.images,
            detector.card.categories,
            batch=options.batch,
            precision=detector.autocast,
            progress=lambda done: line.show(done / images, f"{done} of {images} images"),
        )
    finally:
        line.close()
    found = speak(found, detector.card.categories, annotations.categories)
    metrics = evaluate(annotations, found)
    print_metrics(metrics, dataset.name)
    rows = [row for i, each in zip(annotations.image_ids.tolist(), found, strict=True) for row in each.to_coco(i)]
    for name, content in (("metrics", metrics.to_dict()), ("detections", rows)):
        path = folder / f"{name}-{options.split}.json"
        write_atomically(path, json.dumps(content, indent=1).encode())
        print(f"written: {path}")


def open_split(options: Options, folder: Path):
    """Return the split that was asked for."""
    from lucidetr.data.coco import image_folder_of
    from lucidetr.data.dataset import open_coco, open_dataset

    if options.json:
        file = Path(options.json)
        images = Path(options.images) if options.images else image_folder_of(file, file.parent)
        return open_coco(file, images, options.bad_boxes)
    config = folder / "config.json"
    data = options.data or (json.loads(config.read_text())["data"] if config.is_file() else "")
    if not data:
        raise InputError("evaluate on what? Give --data FOLDER, or --json FILE and --images FOLDER")
    return open_dataset(data, options.split, options.bad_boxes)
