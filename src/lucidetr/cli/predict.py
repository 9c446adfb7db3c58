"""lucidetr predict: pictures in, drawn pictures and a COCO file out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Find objects in pictures; write drawn pictures and detections.json."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, or a model file."""
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Picture files and folders."""
    out: str = "drawn"
    """Folder of the drawn pictures and of detections.json."""
    threshold: float = 0.5
    """Least score that is drawn and written."""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def run(arguments: list[str]) -> None:
    """Predict, draw, write."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr predict")

    from lucidetr.deployment.detector import load
    from lucidetr.deployment.pictures import predict_pictures

    detector = load(options.model, options.device, options.precision)
    pictures, boxes = predict_pictures(detector, options.pictures, Path(options.out), options.threshold)
    print(f"{boxes} objects in {pictures} pictures; drawn in {options.out}, boxes in {options.out}/detections.json")
