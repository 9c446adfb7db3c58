"""lucidetr predict: pictures in, drawn pictures and a COCO file out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lucidetr.errors import InputError
from lucidetr.fields import check_ranges


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
    check_ranges(options, "--", {"threshold": (0, 1)})

    from lucidetr.deployment.detector import load
    from lucidetr.deployment.pictures import predict_pictures

    detector = load(options.model, options.device, options.precision)
    done = predict_pictures(detector, options.pictures, Path(options.out), options.threshold)
    print(f"{done.boxes} objects in {done.pictures} pictures, drawn in {options.out}")
    print(f"boxes: {Path(options.out) / 'detections.json'}")
    if done.refused:
        raise InputError(f"{len(done.refused)} pictures could not be used: {'; '.join(done.refused)}")
