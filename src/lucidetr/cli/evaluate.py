"""lucidetr eval: COCO's twelve numbers of a saved model on a split, as tables and as JSON."""

import json
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lucidetr.errors import InputError
from lucidetr.fields import HUGE, check_ranges

if TYPE_CHECKING:
    from lucidetr.data.dataset import Dataset
    from lucidetr.structures import Detections
    from lucidetr.training.distributed import Ranks


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
    engine: Literal["torch", "compile"] = "torch"
    """compile: slow to start, then faster."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others that torchrun started."""


def run(arguments: list[str]) -> None:
    """Evaluate, print the tables, and write RUN/metrics-SPLIT.json and RUN/detections-SPLIT.json.

    Of several ranks that torchrun started each looks at its share of the images; the first does all else.
    """
    options = tyro.cli(Options, args=arguments, prog="lucidetr eval")
    check_ranges(options, "--", {"batch": (1, HUGE), "timeout_minutes": (0.01, HUGE)})

    from lucidetr.data.splits import split_of
    from lucidetr.training.distributed import joined

    options = replace(options, split=split_of(options.split) or options.split)  # valid and dev are val
    folder = Path(options.model) if Path(options.model).is_dir() else Path(options.model).parent
    with joined(options.timeout_minutes) as ranks:
        dataset, found, precision = look(options, folder, ranks)
    if ranks.first:
        report(options, folder, dataset, found, precision)


def look(options: Options, folder: Path, ranks: "Ranks") -> tuple["Dataset", list["Detections"], str]:
    """Return the split, what the model finds in it (on the first rank), in its categories, and in which precision."""
    from lucidetr.deployment.detector import load
    from lucidetr.evaluation.detect import detect, speak, strangers
    from lucidetr.training.distributed import place
    from lucidetr.training.progress import ProgressLine

    device = options.device if ranks.size == 1 else str(place(options.device, ranks))
    detector = load(options.model, device, options.precision, options.engine)
    dataset, notes = open_split(options, folder)
    images, categories = len(dataset), detector.card.categories
    with closing(ProgressLine(quiet=not ranks.first)) as line:
        for note in notes + strangers(categories, dataset.annotations):
            line.say(note)
        found = detect(
            detector.quick,
            dataset,
            detector.card.images,
            categories,
            batch=options.batch,
            precision=detector.autocast,
            progress=lambda done: line.show(done / images, f"{done} of {images} images"),
            share=ranks.share,
            gather=ranks.interleave,
        )
    return dataset, speak(found, categories, dataset.annotations.categories), detector.precision


def report(options: Options, folder: Path, dataset: "Dataset", found: Sequence["Detections"], precision: str) -> None:
    """Compare what was found with the truth, print the tables and write the files."""
    from lucidetr.evaluation.coco import evaluate
    from lucidetr.evaluation.crowds import by_crowd
    from lucidetr.evaluation.errors import best_threshold
    from lucidetr.evaluation.table import print_crowds, print_metrics
    from lucidetr.evaluation.thresholds import say, thresholds_file, to_json
    from lucidetr.training.checkpoint import write_atomically

    annotations = dataset.annotations
    metrics = evaluate(annotations, found)
    print_metrics(metrics, f"{dataset.name}, {precision}")
    best = best_threshold(annotations, found)
    if best.overall:  # something right was found
        print_crowds(by_crowd(annotations, found, best.overall.score), best.overall.score)
    rows = [row for i, each in zip(annotations.image_ids.tolist(), found, strict=True) for row in each.to_coco(i)]
    name = options.split if own_data(options, folder) else slug(options.json or options.data, options.split)
    other = other_model(Path(options.model))
    for kind, content in (("metrics", metrics.to_dict(precision)), ("detections", rows)):
        path = folder / f"{kind}-{other}{name}.json"
        write_atomically(path, json.dumps(content, indent=1).encode())
        print(f"written: {path}")
    print(say(best))
    known = own_data(options, folder) or not (folder / "config.json").is_file()
    if options.split == "val" and known and not options.json:
        path = thresholds_file(Path(options.model))  # by validation pictures alone: nothing is chosen by a test set
        if text := to_json(best, dataset.name):
            write_atomically(path, text.encode())
            print(f"written: {path}, for `predict --threshold best`")
        else:
            path.unlink(missing_ok=True)  # what an earlier model was best at


def other_model(model: Path) -> str:
    """Return how the files of results begin that are of a model file and not of a run's best model; "" for that one.

    >>> other_model(Path("runs/scenes"))
    ''
    """
    from lucidetr.evaluation.thresholds import BEST

    return f"{model.stem}-" if model.is_file() and model.name != BEST else ""


def own_data(options: Options, folder: Path) -> bool:
    """Say whether the data are those that the run was trained on, however their folder is written."""
    given, trained = options.data, trained_on(folder)
    same = not given or (trained != "" and Path(given).resolve() == Path(trained).resolve())
    return same and not options.json


def trained_on(folder: Path) -> str:
    """Return what --data was when the run was trained, nothing when that is not known."""
    from lucidetr.conversion.read import read_json

    config = folder / "config.json"
    return read_json(config).get("data", "") if config.is_file() else ""


def slug(data: str, split: str) -> str:
    """Return a name for the files of another data set, so that they do not take the place of the run's own.

    >>> slug("/data/cells", "test")
    'cells-test'
    """
    return re.sub(r"[^\w.-]+", "-", Path(data).name) + f"-{split}"


def open_split(options: Options, folder: Path) -> tuple["Dataset", list[str]]:
    """Return the split that was asked for, of the run's own data as the run had it, and what to know of it."""
    from lucidetr.data.dataset import mended, open_coco, open_dataset, open_training_data
    from lucidetr.training.run_log import asked_of

    if options.images and not options.json:
        raise InputError(f"--images {options.images} belongs to --json, which is not given")
    if options.json and options.data:
        raise InputError(f"--json {options.json} and --data {options.data}: give one of them")
    if options.json:
        dataset = open_coco(Path(options.json), Path(options.images) if options.images else None, options.bad_boxes)
        return dataset, mended(dataset)
    own = own_data(options, folder) and options.split in ("train", "val")
    if own and (trained := asked_of(folder)):
        if options.bad_boxes == "drop":
            trained = replace(trained, bad_boxes="drop")
        train, val, notes = open_training_data(trained)
        return train if options.split == "train" else val, notes
    data = options.data or trained_on(folder)
    if not data:
        raise InputError("evaluate on what? Give --data FOLDER, or --json FILE and --images FOLDER")
    dataset = open_dataset(data, options.split, options.bad_boxes)
    return dataset, mended(dataset)
