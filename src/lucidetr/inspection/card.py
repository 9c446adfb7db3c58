"""The model card: what was trained, on what, how large it is and how well it does."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure as Chart

from lucidetr.config import TrainConfig
from lucidetr.data.annotations import Annotations
from lucidetr.evaluation.coco import MEANING
from lucidetr.fields import difference
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, Section, chart, written
from lucidetr.models.size import PARTS, count_operations, measure, parameters_by_part, part_of
from lucidetr.recipes import RECIPES
from lucidetr.training.run_log import last_start

PAPER = "detr-r50"
# what belongs to this run or machine, not to the recipe
NOT_THE_RECIPE = {"recipe", "out", "resume", "epochs", "steps", "minutes", "clock", "device", "workers", "cache_gb"}
NOT_THE_RECIPE |= {
    "data",
    "train_json",
    "train_images",
    "val_json",
    "val_images",
    "save_minutes",
    "evaluations",
    "statistics",
    "preflight",
    "weights",
    "timeout_minutes",
    "overfit",
    "seed",
}
NAMED = 30  # classes drawn by name; of more only the most and least frequent are


@dataclass(frozen=True, eq=False)
class DataSummary:
    """Hold what a split is made of; crowds are left out."""

    images: int
    names: tuple[str, ...]
    class_counts: Int[np.ndarray, " category"]
    objects_per_image: Int[np.ndarray, " image"]
    sides: Float[np.ndarray, " object"]  # √(box area / picture area)


def summarise_data(annotations: Annotations) -> DataSummary:
    """Count a split's objects by class and image, and measure their boxes against their pictures."""
    real = ~annotations.crowd
    areas = annotations.boxes_xywh[:, 2:].prod(1)
    of_picture = np.repeat(annotations.sizes.prod(1), np.diff(annotations.starts))
    return DataSummary(
        images=len(annotations),
        names=tuple(annotations.categories.names),
        class_counts=np.bincount(annotations.labels[real], minlength=len(annotations.categories)).astype(np.int64),
        objects_per_image=annotations.objects_per_image().astype(np.int64),
        sides=np.sqrt(areas / of_picture)[real],
    )


@torch.no_grad()
def operations_by_part(config: TrainConfig) -> dict[str, float]:
    """Return the GFLOPs of each part for one picture at the recipe's largest size, counted as `measure` does."""
    counter, _ = count_operations(config)
    parts: Counter[str] = Counter()
    whole: list[str] = []  # the largest modules that are of one part: none of them is called inside another
    for name, each in sorted(counter.get_flop_counts().items(), key=lambda item: len(item[0])):
        name = name.removeprefix("DETR.") + "."
        if not name.startswith(tuple(whole)) and any(re.fullmatch(pattern, name) for pattern, _ in PARTS):
            whole.append(name)
            parts[part_of(name)[1]] += sum(each.values())
    return {part: number / 1e9 for part, number in parts.items()}


def recipe_table(config: TrainConfig) -> list[list[str]]:
    """Return the config as a list of changes to the paper's DETR."""
    changes = difference(config, RECIPES[PAPER])
    rows = [[name, show(there), show(here)] for name, (here, there) in changes.items() if name not in NOT_THE_RECIPE]
    return [["setting", f"{PAPER} (the paper)", config.recipe], *rows]


def show(value: Any) -> str:
    """Return a setting as a person would write it.

    >>> show((480, 512)), show(()), show(0.0001), show(True)
    ('480, 512', 'none', '0.0001', 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(show, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def data_warnings(summary: DataSummary, num_queries: int) -> tuple[str, ...]:
    """Return a sentence when an image has more objects than there are queries, or a class has no object."""
    said = []
    fullest = int(summary.objects_per_image.max(initial=0))
    if fullest > num_queries:
        said.append(
            f"An image of the training split has {fullest} objects, but there are {num_queries} queries: "
            "some objects can never be found. Raise --model.num-queries."
        )
    if missing := [name for name, count in zip(summary.names, summary.class_counts, strict=True) if not count]:
        listed = ", ".join(missing[:10]) + (" …" if len(missing) > 10 else "")
        said.append(f"Classes without any object in the training split ({len(missing)}): {listed}.")
    return tuple(said)


def draw_parts(made: Chart, parameters: dict[str, int], gflops: dict[str, float]) -> None:
    """Draw parameters and operations of each part as bars, the pixels on top."""
    left, right = made.subplots(1, 2, sharey=True)
    rows = range(len(parameters))
    left.barh(rows, [number / 1e6 for number in parameters.values()], color="tab:blue")
    left.set(title="Parameters, millions")
    right.barh(rows, [gflops.get(part, 0.0) for part in parameters], color="tab:orange")
    right.set(title="GFLOPs for one picture")
    left.set_yticks(rows, list(parameters), fontsize=8)
    left.invert_yaxis()
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)
        axes.grid(visible=False, axis="y")


def draw_data(made: Chart, train: DataSummary, val: DataSummary) -> None:
    """Draw objects by class, objects of an image and sizes of boxes, in shares of the two splits."""
    classes, number, size = made.subplots(1, 3)
    order = np.argsort(-train.class_counts, kind="stable")
    if len(order) > NAMED:
        order = np.concatenate([order[: NAMED // 2], order[-NAMED // 2 :]])
    places = np.arange(len(order))
    for each, colour, shift in ((train, "tab:blue", -0.2), (val, "tab:orange", 0.2)):
        shares = 100 * each.class_counts[order] / max(each.class_counts.sum(), 1)
        classes.barh(places + shift, shares, height=0.4, color=colour)
    classes.set_yticks(places, [written(train.names[i]) for i in order], fontsize=7)
    classes.invert_yaxis()
    some = f", the {len(order)} with most and fewest of {len(train.names)}" if len(order) < len(train.names) else ""
    classes.set(title=f"Classes{some}", xlabel="% of the objects")
    most = int(max(train.objects_per_image.max(initial=0), val.objects_per_image.max(initial=0)))
    width = max(1, most // 30)
    edges = np.arange(-0.5, most + 0.5 + width, width)
    for axes, name, bins in (
        (number, "objects_per_image", edges),
        (size, "sides", np.linspace(0, 1, 26)),
    ):
        for each, label, colour in ((train, "training", "tab:blue"), (val, "validation", "tab:orange")):
            values = getattr(each, name).clip(max=bins[-1])  # a box may lie over the edge by a little
            counts, _ = np.histogram(values, bins)
            axes.stairs(100 * counts / max(len(values), 1), bins, color=colour, label=label, linewidth=1.5)
    number.set(title="Objects of an image", ylabel="% of the images")
    size.set(title="Side of a box, share of the picture's", ylabel="% of the objects")
    size.legend(fontsize=8)


def facts(material: Material) -> list[list[str]]:
    """Return how the model was made: data, machine, code."""
    config, card = material.config, material.card
    start = last_start(material.run)
    seconds = max((line["seconds"] for line in material.metrics if "seconds" in line), default=0.0)
    versions = ", ".join(f"{name} {number}" for name, number in start["versions"].items())
    return [
        ["", ""],
        ["recipe", card.recipe],
        ["data", config.data or config.train_json],
        ["validation", material.dataset.name],
        ["weights at the start", config.weights or "random"],
        ["steps of this model", f"{card.step:,}"],
        ["time of training", f"{seconds / 60:.1f} minutes"],
        ["batch", f"{config.batch} images"],
        ["seed", str(config.seed)],
        ["started", start["started"]],
        ["command", " ".join(start["command"])],
        ["commit", start["commit"] or "unknown"],
        ["machine", f"{start['device']}, {start['machine']}, {start['threads']} threads, {start['precision']}"],
        ["versions", versions],
    ]


def number_tables(material: Material) -> list[tuple[str, list[list[str]]]]:
    """Return COCO's twelve numbers, and those by class."""
    metrics = material.evaluation

    def said(value: float | int | None) -> str:
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"

    numbers = [[name, said(value), MEANING[name]] for name, value in metrics.numbers.items()]
    by_class = [[name, *map(said, each.values())] for name, each in metrics.per_class.items()]
    head = ["class", *next(iter(metrics.per_class.values()), {})]
    return [
        (f"COCO's numbers, {metrics.images:,} images, {metrics.objects:,} objects", [["", "", "meaning"], *numbers]),
        ("By class", [head, *by_class]),
    ]


def part_rows(config: TrainConfig, gflops: dict[str, float], parameters: dict[str, int]) -> list[list[str]]:
    """Return parameters and operations of each part as rows, with the sum."""
    size = measure(config)
    rows = [[part, f"{number:,}", f"{gflops.get(part, 0.0):.3f}"] for part, number in parameters.items()]
    return [["part", "parameters", "GFLOPs"], *rows, ["together", f"{size.parameters:,}", f"{size.gflops:.3f}"]]


def section(material: Material) -> Section:
    """Return the model card."""
    config = material.config
    parameters = {part: number for (_, part), number in parameters_by_part(config.model).items()}
    gflops = operations_by_part(config)
    train, val = summarise_data(material.training), summarise_data(material.dataset.annotations)
    figures = (
        Figure(
            "card-parts",
            "Where the parameters are, and where the work is done",
            chart(9, 1 + 0.22 * len(parameters), lambda made: draw_parts(made, parameters, gflops)),
            "Most of the work is where the maps are large, most of the parameters where the layers are wide; a part "
            "that costs much and learns little (see weights and gradients) is the first to make smaller.",
        ),
        Figure(
            "card-data",
            "What the data are made of",
            chart(10, max(3.0, 0.6 + 0.17 * min(len(train.names), NAMED)), lambda made: draw_data(made, train, val)),
            "The two splits agree; a class below one per cent of the objects, or boxes below a fiftieth of the "
            "picture, will be found late.",
            data_warnings(train, config.model.num_queries),
        ),
    )
    tables = [("How it was made", facts(material)), (f"The recipe, as changes to {PAPER}", recipe_table(config))]
    tables += number_tables(material)
    tables.append(("Size by part", part_rows(config, gflops, parameters)))
    objects = _counted(train), _counted(val)
    says = f"Trained on {objects[0]}, measured on {objects[1]}, {len(train.names)} classes."
    return Section("Model card", says, figures, tuple(tables))


def _counted(summary: DataSummary) -> str:
    return f"{summary.images:,} images with {int(summary.class_counts.sum()):,} objects"
