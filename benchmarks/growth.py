"""How time grows with the side of the picture, the objects in it, the queries and the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from benchmarks.measure import Common, note, read_options, seconds_of
from benchmarks.pair import random_batch
from benchmarks.steps import Timed, inference, square, training
from lucidetr.config import TrainConfig
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.structures import Predictions
from lucidetr.training.precision import choose_device, choose_precision


@dataclass(frozen=True)
class Options(Common):
    """Time one picture's prediction and a training step for each value, all else as in the recipe."""

    recipe: str = "lucid-s"
    sides: tuple[int, ...] = (160, 224, 320, 448, 640)
    objects: tuple[int, ...] = (10, 30, 100, 300)
    queries: tuple[int, ...] = (100, 300, 900)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    quick: bool = False
    """A model of a few thousand parameters, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every axis, print, and append a line for each to results.jsonl."""
    options = read_options(Options, arguments, "growth")
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    for axis in ("side", "objects", "queries", "batch"):
        rows = {value: point(axis, value, options, precision, device) for value in values_of(axis, options)}
        for value, row in rows.items():
            shown = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in row.items())
            print(f"{options.recipe}, {axis} {value}: {shown}", flush=True)
        note("growth", {"recipe": options.recipe, "axis": axis, "precision": precision}, {"rows": rows}, device)


def values_of(axis: str, options: Options) -> tuple[int, ...]:
    """Return the values of an axis."""
    return {"side": options.sides, "objects": options.objects, "queries": options.queries, "batch": options.batches}[
        axis
    ]


def point(axis: str, value: int, options: Options, precision: str, device: torch.device) -> dict[str, float]:
    """Return the median seconds of prediction, training step, and matching with losses at one value of an axis."""
    config = square(options.recipe, value if axis == "side" else 64 if options.quick else 0, options.quick)
    if axis == "queries":
        config = square(options.recipe, config.images.size, options.quick, num_queries=value)
    objects = value if axis == "objects" else 7
    size = value if axis == "batch" else 1
    batch = random_batch(size, config.images.size, objects, config.model.num_classes, device)
    work = {
        "prediction": inference(config, batch, precision),
        "training step": training(config, batch, precision),
        "matching and losses, 6 layers": matching_and_losses(config, size, objects, device),
    }
    taken = {}
    for name, once in work.items():
        once()
        taken[name] = median(seconds_of(once, device) for _ in range(options.runs))
    return taken


def matching_and_losses(config: TrainConfig, size: int, objects: int, device: torch.device) -> Timed:
    """Return the set loss of random predictions of six layers, with 300 queries where the recipe has fewer."""
    loss, queries = config.loss, max(config.model.num_queries, 300)
    batch = random_batch(size, 32, objects, config.model.num_classes, device)
    slots = config.model.num_classes + (loss.classification == "cross_entropy")
    predictions = Predictions(
        logits=torch.randn(6, size, queries, slots, device=device),
        boxes_cxcywh=0.3 + 0.3 * torch.rand(6, size, queries, 4, device=device),
    )
    norm = normalisers([objects] * size, queries, loss)
    return lambda: set_loss(predictions, batch, norm, loss)
