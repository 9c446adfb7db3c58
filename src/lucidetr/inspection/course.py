"""The course of a run: loss by layer, average precision, rate, gradient norm and pace, from metrics.jsonl."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Chart

from lucidetr.config import TrainConfig
from lucidetr.inspection.curves import (
    TERMS,
    Line,
    draw_gradient_norm,
    draw_loss,
    draw_precision,
    draw_rate,
    steps_and_looks,
)
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, Section, chart
from lucidetr.training.guards import NOTHING_FOUND, loss_course
from lucidetr.training.run_log import row_names

ABOVE_CLIP = 1e4  # a gradient norm so many times the clip, throughout, is no longer a matter of taste
FALLEN = 0.02  # of AP
LAYER_COLOURS = ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink")


def loss_warnings(training: Sequence[Line]) -> tuple[str, ...]:
    """Return a sentence when the loss is not finite, has risen over the run, or is far above its lowest."""
    losses = np.array([line["loss"] for line in training], dtype=float)
    if not np.isfinite(losses).all():
        step = training[int(np.flatnonzero(~np.isfinite(losses))[0])]["step"]
        return (f"The loss is not finite at step {step}: lower the rate, or look at the images of that step.",)
    course = loss_course(training)
    if not course:
        return ()
    first, last = course
    fifth = len(losses) // 5
    lowest = min(float(np.median(losses[i : i + fifth])) for i in range(0, len(losses) - fifth + 1, fifth))
    if last > first:
        return (
            f"The loss rose over the run, from {first:.3g} to {last:.3g}: the rate is too high, or the data wrong.",
        )
    if last > 1.5 * lowest:
        return (f"The loss ends at {last:.3g}, far above the {lowest:.3g} that it had reached: the run came apart.",)
    return ()


def precision_warnings(looks: Sequence[Line]) -> tuple[str, ...]:
    """Return a sentence when validation AP is next to zero at the end, or falls over the last third of the looks."""
    values = [line["val/AP"] for line in looks]
    if values and values[-1] <= NOTHING_FOUND:
        return ("AP is 0 at the end: the run was too short, or the model has learned nothing.",)
    third = values[-max(len(values) // 3, 1) - 1 :]
    if len(values) >= 3 and third[-1] < third[0] - FALLEN and third[-1] < max(values) - FALLEN:
        return (
            f"Validation AP falls over the last third of the run, from {third[0]:.3f} to {third[-1]:.3f}: "
            "it learns the training images by heart; fewer epochs, more augmentation or more images would help. "
            f"best.safetensors is from the best evaluation, {max(values):.3f}.",
        )
    return ()


def gradient_warnings(training: Sequence[Line], clip: float) -> tuple[str, ...]:
    """Return a sentence when the gradient norm is far above the clip throughout."""
    norms = np.array([line["gradient_norm"] for line in training], dtype=float)
    if clip and len(norms) and (low := float(np.nanpercentile(norms, 10))) > ABOVE_CLIP * clip:
        return (
            f"The gradient norm is above {low:.3g} at nine steps of ten, {low / clip:,.0f} times the clip of {clip:g}: "
            "single bad batches can no longer be told from good ones.",
        )
    return ()


def length_warnings(lines: Sequence[Line], config: TrainConfig) -> tuple[str, ...]:
    """Return a sentence when the run has not come to the end that it was given; its last line may be of any kind."""
    step, seconds = (lines[-1]["step"], lines[-1]["seconds"]) if lines else (0, 0.0)
    if config.steps and step < config.steps:
        return (f"The run stands at step {step} of {config.steps}: lucidetr train … --resume goes on.",)
    if config.minutes and seconds < 60 * config.minutes:
        return (f"The run stands at {seconds / 60:.1f} of {config.minutes:g} minutes: --resume goes on.",)
    epochs = [line["epoch"] * step / line["step"] for line in lines if "epoch" in line]  # skipped steps name none
    if config.epochs and epochs and epochs[-1] < config.epochs - 1e-6:
        return (f"The run stands at epoch {epochs[-1]:.1f} of {config.epochs:g}: --resume goes on.",)
    return ()


def draw_losses(made: Chart, training: Sequence[Line], names: Sequence[str], groups: int) -> None:
    """Draw the whole loss, and each term with a line for each layer; bold is the last of the first group of queries."""
    (whole, classes), (l1, giou) = made.subplots(2, 2, sharex=True)
    draw_loss(whole, training)
    steps = [line["step"] for line in training]
    for axes, term in zip((classes, l1, giou), TERMS, strict=True):
        for row, name in enumerate(names):
            last = row == len(names) - groups
            colour = LAYER_COLOURS[row % len(LAYER_COLOURS)]
            values = [line[term][row] for line in training]
            axes.plot(steps, values, color=colour, label=name, linewidth=1.8 if last else 1)
        axes.set(title=term, yscale="log")
    classes.legend(fontsize=7, ncols=2)
    made.supxlabel("optimiser step", fontsize=9)


def draw_looks(made: Chart, looks: Sequence[Line]) -> None:
    """Draw average precision over the minutes of training."""
    axes = made.subplots()
    draw_precision(axes, [line | {"minutes": line["seconds"] / 60} for line in looks], "minutes")
    axes.set(title="", xlabel="minutes of training")


def draw_pace(made: Chart, training: Sequence[Line], clip: float) -> None:
    """Draw rate, gradient norm and images a second."""
    rate, norm, pace = made.subplots(1, 3)
    draw_rate(rate, training)
    rate.set(title="Learning rate")
    draw_gradient_norm(norm, training)
    if clip:
        norm.axhline(clip, color="tab:red", linestyle="--", linewidth=1)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        norm.annotate(f"clip {clip:g}", (0.99, clip), fontsize=8, **where)
    norm.set(title="Gradient norm before the clip")
    steps = [line["step"] for line in training]
    pace.plot(steps, [line["images_per_second"] for line in training], color="tab:green")
    pace.set(title="Images a second", ylim=(0, None))
    made.supxlabel("optimiser step", fontsize=9)


def section(material: Material) -> Section:
    """Return the section on the course of the run."""
    training, looks = steps_and_looks(material.metrics)
    config = material.config
    if not training:
        return Section("The course of the run", "This run holds no metrics.jsonl with training steps in it.")
    clip = config.optimiser.clip
    names = row_names(config.model)
    norms = [line["gradient_norm"] for line in training if math.isfinite(line["gradient_norm"])]
    cut = sum(norm > clip for norm in norms) / max(len(norms), 1) if clip else 0.0
    figures: list[Any] = [
        Figure(
            "course-loss",
            "The set loss and its three terms by layer",
            chart(9, 5.2, lambda made: draw_losses(made, training, names, config.model.query_groups)),
            "Box terms fall, steeply at first, and those of later layers are no higher. A class term falls, too; one "
            "whose target is the overlap may rise again while boxes improve. Terms are shown before their weights.",
            loss_warnings(training),
        ),
        Figure(
            "course-pace",
            "Rate, gradient norm and pace",
            chart(10, 2.9, lambda made: draw_pace(made, training, clip)),
            "A gradient norm without spikes and a level pace; that the norm stands above the clip "
            f"(here at {cut:.0%} of the steps) is usual: neither AdamW nor Muon sees a constant factor.",
            gradient_warnings(training, clip),
        ),
    ]
    if looks:
        figure = Figure(
            "course-precision",
            f"Average precision on the {material.split}",
            chart(7, 3.2, lambda made: draw_looks(made, looks)),
            "It rises and levels off; AP50 comes first, AP75 follows once boxes are tight.",
            precision_warnings(looks),
        )
        figures.insert(1, figure)
    last = material.metrics[-1]
    says = f"{last['step']:,} optimiser steps in {last['seconds'] / 60:.1f} minutes of training."
    return Section("The course of the run", says, tuple(figures), warnings=length_warnings(material.metrics, config))
