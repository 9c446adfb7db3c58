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
from lucidetr.inspection.material import open_run
from lucidetr.inspection.report import write_report
from lucidetr.recipes import recipe
from lucidetr.training.clock import check_length
from lucidetr.training.loop import train

DRAWN = 8
LARGE = 512  # pixels: smaller scenes are enlarged by whole numbers up to it, so that captions do not cover them
MARK = "a demo of lucidetr: the next one replaces this folder\n"


@dataclass(frozen=True)
class Options:
    """Train lucid-xs on generated scenes from random weights, evaluate it on scenes it has not seen, and draw."""

    out: str = "runs/demo"
    """Folder of the run; an earlier demo in it is replaced, or gone on with by --resume."""
    minutes: float = 3.0
    """Of training; the evaluations come on top."""
    data: str = "generated:digits"
    resume: bool = False
    """Go on with the demo that was stopped."""


def run(arguments: list[str]) -> None:
    """Train, evaluate, draw, and say where it all lies."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr demo")
    demo(Path(options.out), options.minutes, options.data, options.resume)


def is_demo(folder: Path) -> bool:
    """Say whether a folder is that of an earlier demo, by a file that nobody else writes."""
    mark = folder / "demo"
    return mark.is_file() and mark.read_bytes() == MARK.encode()


def demo(out: Path, minutes: float, source: str, resume: bool = False) -> None:
    """Train for some minutes; what it finds in new scenes is drawn beside the truth."""
    config = replace(recipe("lucid-xs"), data=source, out=str(out), minutes=minutes, evaluations=6, resume=resume)
    check_length(config)
    _, scenes, _ = open_training_data(config)
    if out.exists() and any(out.iterdir()):
        if not is_demo(out):
            raise InputError(f"{out}: not empty and not an earlier demo; choose another --out")
        if not resume:
            shutil.rmtree(out)  # nothing else is ever removed, and nothing before the new demo can start
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo").write_text(MARK, encoding="utf-8")
    run = train(config)

    detector = load(run)
    found = detect(
        detector.quick,
        scenes,
        detector.card.images,
        detector.card.categories,
        batch=config.batch,
        precision=detector.autocast,
    )
    print_metrics(evaluate(scenes.annotations, found), "scenes that it has not seen")
    drawn = out / "predictions"
    drawn.mkdir(exist_ok=True)
    for index, detections in enumerate(found[:DRAWN]):
        image, truth = scenes.image(index), scenes.annotations.target(index)
        times = max(LARGE // max(image.shape[1:]), 1)
        image = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
        names = [detector.names[label] for label in truth.labels.tolist()]
        labelled = draw_boxes(image, truth.boxes_xyxy * times, names, truth.labels.tolist())
        labelled.save(drawn / f"{index + 1}-truth.png")
        kept = detections.above(0.5)
        draw_detections(image, replace(kept, boxes_xyxy=kept.boxes_xyxy * times)).save(drawn / f"{index + 1}-found.png")
    print(f"curves: {draw_curves(run, run / 'curves.png')}")
    page, _ = write_report(open_run(run), run / "report.html")
    print(f"what happened inside: {page}")
    print(f"predictions beside the truth: {drawn}")
    print(f"model: {run / 'best.safetensors'}; numbers: {run / 'metrics-val.json'}; log: {run / 'metrics.jsonl'}")
