"""The course of a run as one picture: loss, its terms by decoder layer, average precision, rate and gradient."""

from pathlib import Path
from typing import Any

from lucidetr.errors import InputError
from lucidetr.training.run_log import read_metrics


def draw_curves(run: Path, out: Path) -> Path:
    """Draw four charts of a run's metrics.jsonl over optimiser steps into one picture file; return it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lines = read_metrics(run)
    training = [line for line in lines if "loss" in line]
    looks = [line for line in lines if "val/AP" in line]
    if not training:
        raise InputError(f"{run}: no metrics.jsonl with training steps in it")
    steps = [line["step"] for line in training]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        (total, terms), (precision, rate) = figure.subplots(2, 2)
        total.plot(steps, [line["loss"] for line in training], color="tab:blue")
        total.set(title="Set loss, all decoder layers", yscale="log", ylim=(None, None))
        _draw_terms(terms, steps, training)
        for name, colour in (("AP", "tab:blue"), ("AP50", "tab:orange"), ("AP75", "tab:green")):
            there = [line for line in looks if f"val/{name}" in line]
            precision.plot(
                [line["step"] for line in there],
                [line[f"val/{name}"] for line in there],
                marker="o",
                markersize=3,
                color=colour,
                label=name,
            )
        precision.set(title="Average precision, validation split", ylim=(-0.02, 1.02))
        if looks:
            precision.legend(frameon=False)
        rate.plot(
            steps, [line["gradient_norm"] for line in training], color="tab:gray", label="gradient norm before clip"
        )
        rate.plot(steps, [line["lr"] for line in training], color="tab:red", label="learning rate")
        rate.set(title="Gradient norm and learning rate", yscale="log")
        rate.legend(frameon=False)
        for axes in (total, terms, precision, rate):
            axes.set_xlabel("optimiser step")
        figure.savefig(out, dpi=120)
    return out


def _draw_terms(axes: Any, steps: list[int], training: list[dict[str, Any]]) -> None:
    """Draw each loss term of the last layer boldly, of the earlier layers faintly."""
    for name, colour in (("classification", "tab:blue"), ("l1", "tab:orange"), ("giou", "tab:green")):
        layers = len(training[0][name])
        for layer in range(layers):
            last = layer == layers - 1
            values = [line[name][layer] for line in training]
            axes.plot(steps, values, color=colour, alpha=1.0 if last else 0.25, label=name if last else None)
    axes.set(title="Loss terms, last decoder layer bold", yscale="log")
    axes.legend(frameon=False)
