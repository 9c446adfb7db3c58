"""What precision, layout and fused operations are worth: a recipe's step as users take it, and one without them.

The plain one computes in float32, its tensors lie as torch lays them out by itself (not channels last), and its clip
and AdamW take one tensor after the other. Muon and the moving average are the same in both, as are model and loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks.measure import Common, alternate, read_options, report
from benchmarks.pair import random_batch
from benchmarks.steps import square, training
from lucidetr.training.precision import choose_device, choose_precision

OBJECTS = 7


@dataclass(frozen=True)
class Options(Common):
    """Time optimiser steps of each recipe both ways."""

    recipes: str = "lucid-xs,lucid-s"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the fast way."""
    quick: bool = False
    """Models of a few thousand parameters on small pictures, only to see that this works."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both, print, and append a line for each recipe to results.jsonl."""
    options = read_options(Options, arguments, "plain")
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    for name in options.recipes.split(","):
        config = square(name, 64 if options.quick else 0, options.quick)
        batch = random_batch(config.micro_batch, config.images.size, OBJECTS, config.model.num_classes, device)
        step = partial(training, config, batch)
        seconds = alternate({"fast": step(precision), "plain": step("fp32", plain=True)}, options.runs, device=device)
        settings = {"recipe": name, "side": config.images.size, "batch": config.micro_batch, "precision": precision}
        report("plain", seconds, "fast", settings, device)
