"""The start: where do weights, gradients and loss go in the first batches?

Two models of the paper's design from random weights, the small `detr-xs` and the large `detr-222m`, on squares of
128 pixels. Eight charts each: how four ways to draw the first weights differ in the backbone and in the first layer of
the box head; how strong the gradient of each layer is over the batches; what becomes of one layer of the backbone and
of the queries, keys and values of the first encoder layer; and the loss.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lucidetr.config import ImageConfig, TrainConfig
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import DETR_XS, from_scratch, recipe
from lucidetr.studies.engines import choose_engine, listening
from lucidetr.studies.experiment import Contender, Extra, Plan, Result, run_grid, run_one
from lucidetr.studies.outset import is_matrix, of_each_look
from lucidetr.studies.page import Page, beginnings, markdown_table, save, write_page
from lucidetr.training.statistics import read_statistics

DATA = "generated:digits?train=480&val=8"  # what is found after so few batches is of no interest
USUAL = Plan(minutes=0.0, seeds=1, steps=30, looks=30, data=DATA)
QUICK = replace(USUAL, quick=True)
SCHEMES = ("default", "uniform", "xavier", "he_in")
ATTENTION = "encoder.layers.0.attention"
BOX_HEAD = "heads.box.layers.0.weight"
BARS = 80


def study(folder: Path, plan: Plan) -> Path:
    """Train, draw and write the page."""
    if plan.seeds > 1:
        raise InputError(f"--seeds {plan.seeds}: start shows one run of each model: leave --seeds out")
    plan = replace(plan, looks=plan.steps)
    trained = run_grid(folder / "start.jsonl", contenders(plan), plan, run_heard)
    figures, rows, answer, used = [], [], [], []
    for kind, name, config in contenders(plan):
        histograms = starting_weights(config)
        rows += [[name, *row] for row in start_rows(histograms)]
        if not (runs := trained[kind, name]):
            continue
        used += runs[:1]
        picture = save(
            folder / f"start-{name}.png", (11, 12), lambda f, h=histograms, r=runs[0]: draw_start(f, h, r.series)
        )
        figures.append((picture, f"{name}: the first {plan.steps} batches."))
        answer += sentences(name, runs[0].series)
    table = markdown_table(["model", "scheme", "deviation in the backbone", "in the box head's first layer"], rows)
    page = Page(f"The first {plan.steps} batches", __doc__ or "", tuple(figures), (table,), tuple(answer))
    return write_page(folder, "start", page, plan, used)


def contenders(plan: Plan) -> Iterator[Contender]:
    """Yield the models: detr-xs, and where there is time detr-222m on small squares, two of them at once."""
    square = ImageConfig(resize="square", size=128)
    yield "start", "detr-xs", replace(DETR_XS, images=square)
    if not plan.quick:
        large = recipe("detr-222m")
        yield (
            "start",
            "detr-222m",
            replace(large, images=square, augmentation=DETR_XS.augmentation, batch=2, micro_batch=2),
        )


def run_heard(kind: str, name: str, config: TrainConfig) -> Result:
    """Train once and keep the loss of every batch, and what was written down of weights and gradients."""
    losses: list[float] = []
    engine = listening(choose_engine(config)[1], losses)

    def read(run: Path) -> Extra:
        return {}, read_series(run) | {"loss": tuple(losses)}

    return run_one(kind, name, replace(config, micro_batch=config.batch), read, engine)


def read_series(run: Path) -> dict[str, tuple[float, ...]]:
    """Return the looks' steps, each matrix's gradient, and mean, deviation, least and largest of four weights."""
    lines = read_statistics(run)
    matrices = [name for name in lines[0]["tensors"] if is_matrix(name)] if lines else []
    series = {"step": tuple(float(line["step"]) for line in lines)}
    series |= {f"gradient {name}": of_each_look(run, name, "gradient", 1) for name in matrices}
    for name in followed(matrices):
        series |= {
            f"{what} {name}": of_each_look(run, name, "weight", number)
            for number, what in enumerate(("mean", "std", "min", "max"))
        }
    return series


def followed(matrices: list[str]) -> list[str]:
    """Return the four to be drawn: the backbone's last, and key, query and value of the first encoder layer.

    >>> followed(["backbone.a.weight", "backbone.b.weight", "encoder.layers.0.attention.key.weight"])
    ['backbone.b.weight', 'encoder.layers.0.attention.key.weight']
    """
    backbone = [name for name in matrices if name.startswith("backbone.")]
    ours = [f"{ATTENTION}.{part}.weight" for part in ("key", "query", "value")]
    return backbone[-1:] + [name for name in ours if name in matrices]


Bars = tuple[float, Tensor, float]  # largest distance from 0, counts from −it to +it, deviation


def starting_weights(config: TrainConfig) -> dict[str, tuple[Bars, Bars]]:
    """Return for each scheme how the weights of the backbone and of the box head's first layer lie at the start."""
    config, _ = from_scratch(config)
    found = {}
    for scheme in SCHEMES:
        torch.manual_seed(config.seed)
        model = DETR(replace(config.model, initialisation=scheme))
        backbone = [p.detach() for p in model.backbone.parameters() if p.ndim > 1]
        found[scheme] = (bars(backbone), bars([dict(model.named_parameters())[BOX_HEAD].detach()]))
    return found


def bars(weights: list[Tensor]) -> Bars:
    """Return a histogram of several tensors' values together, symmetrical about 0, and their deviation.

    >>> limit, counts, deviation = bars([torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0])])
    >>> limit, int(counts.sum()), deviation
    (1.0, 4, 1.0)
    """
    limit = max(float(w.abs().max()) for w in weights)
    counts = torch.stack([torch.histc(w.float(), BARS, -limit, limit) for w in weights]).sum(0)
    total = sum(w.numel() for w in weights)
    mean = sum(float(w.double().sum()) for w in weights) / total
    square = sum(float((w.double() ** 2).sum()) for w in weights) / total
    return limit, counts, max(square - mean**2, 0.0) ** 0.5


def start_rows(histograms: dict[str, tuple[Bars, Bars]]) -> Iterator[list[str]]:
    """Yield a row of the table for each scheme."""
    for scheme, (backbone, box) in histograms.items():
        yield [scheme, f"{backbone[2]:.4f}", f"{box[2]:.4f}"]


def sentences(name: str, series: dict[str, tuple[float, ...]]) -> list[str]:
    """Return what the charts of one model show."""
    loss, said = series["loss"], []
    tenth = max(len(loss) // 10, 1)
    first, last = sum(loss[:tenth]) / tenth, sum(loss[-tenth:]) / tenth
    falls = "falls" if last < first else "does not fall"
    said.append(f"{name}: the loss {falls} over {len(loss)} batches, from {first:.1f} to {last:.1f}.")
    gradients = {n.removeprefix("gradient "): v for n, v in series.items() if n.startswith("gradient ") and any(v)}
    means = {n: sum(v) / len(v) for n, v in gradients.items()}
    if means:
        weakest, strongest = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        said.append(
            f"{name}: the gradient's deviation lies between {means[weakest]:.1e} ({weakest}) and "
            f"{means[strongest]:.1e} ({strongest}) on average over the batches."
        )
    silent = [n.removeprefix("gradient ") for n, v in series.items() if n.startswith("gradient ") and not any(v)]
    if silent:
        said.append(f"{name}: no gradient at all reaches {', '.join(silent)}.")
    for weight in [n.removeprefix("std ") for n in series if n.startswith("std ")]:
        std = series[f"std {weight}"]
        said.append(f"{name}: the deviation of {weight} goes from {std[0]:.4g} to {std[-1]:.4g}.")
    return said


def draw_start(figure: Any, histograms: dict[str, tuple[Bars, Bars]], series: dict[str, tuple[float, ...]]) -> None:
    """Draw the eight charts of one model."""
    axes = figure.subplots(4, 2).ravel()
    for place, title in enumerate(("Backbone at the start", "Box head's first layer at the start")):
        draw_schemes(axes[place], {scheme: both[place] for scheme, both in histograms.items()}, title)
    draw_gradients(figure, axes[2], series)
    weights = [name.removeprefix("std ") for name in series if name.startswith("std ")]
    for place, name in zip(range(3, 7), weights, strict=False):
        draw_weights(axes[place], series, name)
    axes[7].plot(range(1, len(series["loss"]) + 1), series["loss"], color="tab:blue")
    axes[7].set(title="Set loss of each batch", xlabel="batch")


def draw_schemes(axes: Any, histograms: dict[str, Bars], title: str) -> None:
    """Draw the density of the weights for each scheme."""
    widest = max(3 * deviation for _, _, deviation in histograms.values())
    for scheme, (limit, counts, deviation) in histograms.items():
        width = 2 * limit / BARS
        density = (counts / (counts.sum() * width)).tolist()
        edges = [-limit + i * width for i in range(BARS + 1)]
        axes.stairs(density, edges, label=f"{scheme}: ± {deviation:.3f}")
    axes.set(title=title, xlabel="weight", ylabel="density", xlim=(-widest, widest), yscale="log")
    axes.legend()


def draw_gradients(figure: Any, axes: Any, series: dict[str, tuple[float, ...]]) -> None:
    """Draw the gradient's deviation of every matrix over the batches, a row for each, input at the top."""
    names = [name for name in series if name.startswith("gradient ")]
    if not names:  # the run came apart in its first step: nothing was written down
        return
    values = np.array([series[name] for name in names])
    shown = np.log10(np.where(values > 0, values, np.nan))
    image = axes.imshow(
        shown, aspect="auto", interpolation="nearest", extent=(0.5, len(values[0]) + 0.5, len(names), 0)
    )
    parts = [name.removeprefix("gradient ") for name in names]
    begins = beginnings(parts)
    axes.set(title="Deviation of each layer's gradient, log10", xlabel="batch", yticks=begins)
    axes.set_yticklabels([parts[i].split(".")[0] for i in begins])
    axes.grid(False)
    figure.colorbar(image, ax=axes)


def draw_weights(axes: Any, series: dict[str, tuple[float, ...]], name: str) -> None:
    """Draw how far mean, deviation, least and largest of a weight have moved, in deviations of the first batch."""
    unit = series[f"std {name}"][0] or 1.0
    words = {"mean": "mean", "std": "deviation", "min": "least", "max": "largest"}
    for what, label in words.items():
        values = series[f"{what} {name}"]
        moved = [(value - values[0]) / unit for value in values]
        axes.plot(series["step"], moved, label=f"{label}, from {values[0]:.3g}")
    axes.set(title=f"{name}: change", xlabel="batch", ylabel="deviations at the start")
    axes.legend()
