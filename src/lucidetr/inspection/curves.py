"""The course of a run as one picture: loss, its terms by decoder layer, average precision, rate and gradient."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lucidetr.errors import InputError
from lucidetr.training.run_log import read_metrics, trained_as

Line = dict[str, Any]  # of metrics.jsonl
TERMS = {"classification": "tab:blue", "l1": "tab:orange", "giou": "tab:green"}
PRECISIONS = {"AP": "tab:blue", "AP50": "tab:orange", "AP75": "tab:green"}


def steps_and_looks(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """Return the lines about training steps, and those about evaluations."""
    return [line for line in lines if "loss" in line], [line for line in lines if "val/AP" in line]


def draw_curves(run: Path, out: Path) -> Path:
    """Draw four charts of a run's metrics.jsonl over optimiser steps into one picture file; return it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    training, looks = steps_and_looks(read_metrics(run))
    if not training:
        raise InputError(f"{run}: no metrics.jsonl with training steps in it")
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        (total, terms), (precision, rate) = figure.subplots(2, 2)
        draw_loss(total, training)
        draw_terms(terms, training, trained_as(run).model.query_groups)
        draw_precision(precision, looks, "step")
        if trained_as(run).overfit:
            precision.set(title="Average precision, training images learned by heart")
        draw_gradient_norm(rate, training)
        draw_rate(rate, training)
        rate.set(title="Gradient norm and learning rate")
        rate.legend(frameon=False)
        for axes in (total, terms, precision, rate):
            axes.set_xlabel("optimiser step")
        figure.savefig(out, dpi=120)
    return out


def draw_loss(axes: Any, training: Sequence[Line]) -> None:
    """Draw the loss of all layers together, and what of it taught tokens add, if they do."""
    axes.plot(_steps(training), [line["loss"] for line in training], color="tab:blue", label="all")
    if taught := [line for line in training if line.get("tokens")]:
        axes.plot(_steps(taught), [line["tokens"] for line in taught], color="tab:gray", label="of it by taught tokens")
        axes.legend(frameon=False)
    axes.set(title="Set loss, all of it", yscale="log")


def draw_terms(axes: Any, training: Sequence[Line], groups: int) -> None:
    """Draw each loss term of the last layer, of the first group of queries, boldly, all others faintly."""
    for name, colour in TERMS.items():
        layers = len(training[0][name])
        for layer in range(layers):
            last = layer == layers - groups
            values = [line[name][layer] for line in training]
            axes.plot(_steps(training), values, color=colour, alpha=1.0 if last else 0.25, label=name if last else None)
    axes.set(title="Loss terms, last decoder layer bold", yscale="log")
    axes.legend(frameon=False)


def draw_precision(axes: Any, looks: Sequence[Line], over: str) -> None:
    """Draw average precision on the validation split over one of the log's own numbers: step or seconds."""
    for name, colour in PRECISIONS.items():
        there = [line for line in looks if f"val/{name}" in line]
        where, values = [line[over] for line in there], [line[f"val/{name}"] for line in there]
        axes.plot(where, values, marker="o", markersize=3, color=colour, label=name)
    axes.set(title="Average precision, validation split", ylim=(-0.02, 1.02))
    if looks:
        axes.legend(frameon=False)


def draw_gradient_norm(axes: Any, training: Sequence[Line]) -> None:
    """Draw the norm of all gradients together, before the clip."""
    norms = [line["gradient_norm"] for line in training]
    axes.plot(_steps(training), norms, color="tab:gray", label="gradient norm before clip")
    axes.set(yscale="log")


def draw_rate(axes: Any, training: Sequence[Line]) -> None:
    """Draw the learning rate of all but the backbone."""
    axes.plot(_steps(training), [line["lr"] for line in training], color="tab:red", label="learning rate")
    axes.set_yscale("log", nonpositive="mask")  # --optimiser.final 0 ends at zero


def _steps(training: Sequence[Line]) -> list[int]:
    return [line["step"] for line in training]
