"""lucidetr demo: everything once, from nothing: train on generated scenes, evaluate, draw."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from lucidetr.data.dataset import open_training_data
from lucidetr.deployment.detector import load
from lucidetr.drawing import draw_boxes, draw_detections
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import evaluate
from lucidetr.evaluation.detect import detect
from lucidetr.evaluation.table import print_metrics
from lucidetr.inspection.curves import draw_curves
from lucidetr.recipes import recipe
from lucidetr.training.loop import train


@dataclass(frozen=True)
class Options:
    """Train on a few generated scenes until the model knows them by heart: the proof that all parts work."""

    out: str = "runs/demo"
    """Folder of the run; an earlier demo in it is replaced."""
    steps: int = 700
    images: int = 8


def run(arguments: list[str]) -> None:
    """Train, evaluate, draw, and say where it all lies."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr demo")
    demo(Path(options.out), options.steps, options.images)


def demo(out: Path, steps: int, images: int) -> None:
    """Let detr-xs learn a few digit scenes by heart: AP near 1 says that all parts work together."""
    if (out / "demo").is_file():
        shutil.rmtree(out)  # an earlier demo; nothing else is ever removed
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not empty and not an earlier demo; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo").touch()
    source = f"generated:digits?train={images}&val=1"
    config = replace(recipe("detr-xs"), data=source, out=str(out), overfit=images, steps=steps, evaluations=5)
    run = train(replace(config, batch=images, model=replace(config.model, dropout=0.0)))

    detector = load(run)
    scenes, _, _ = open_training_data(config)
    found = detect(detector.model, scenes, detector.card.images, detector.card.categories, batch=images)
    print_metrics(evaluate(scenes.annotations, found), "the same scenes that it was trained on")
    drawn = out / "predictions"
    drawn.mkdir(exist_ok=True)
    for index, detections in enumerate(found):
        image, truth = scenes.image(index), scenes.annotations.target(index)
        names = [detector.names[label] for label in truth.labels.tolist()]
        draw_boxes(image, truth.boxes_xyxy, names, truth.labels.tolist()).save(drawn / f"{index + 1}-truth.png")
        draw_detections(image, detections.above(0.5)).save(drawn / f"{index + 1}-found.png")
    print(f"curves: {draw_curves(run, run / 'curves.png')}")
    print(f"predictions beside the truth: {drawn}")
    print(f"model: {run / 'best.safetensors'}; numbers: {run / 'metrics-val.json'}; log: {run / 'metrics.jsonl'}")
