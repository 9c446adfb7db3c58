"""How good every decoder layer is, and whether duplicates are left that NMS would remove (DETR, figure 4)."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torchvision.ops import batched_nms

from lucidetr.categories import Categories
from lucidetr.config import ImageConfig
from lucidetr.data.annotations import Annotations
from lucidetr.data.batching import evaluation_batches
from lucidetr.data.dataset import Dataset
from lucidetr.evaluation.coco import evaluate
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, Section, chart
from lucidetr.models.postprocess import postprocess
from lucidetr.structures import Detections, Predictions

NUMBERS = ("AP", "AP50")
OVERLAP = 0.7  # IoU from which on NMS takes the weaker of two boxes of one category for a duplicate
DUPLICATES = 0.01  # AP that NMS may bring the last layer
WORSE = 0.02  # AP that a layer may lie below an earlier one


@dataclass(frozen=True, eq=False)
class LayerPrecision:
    """Hold AP and AP50 after every row of the predictions, as they are and after non-maximum suppression."""

    names: tuple[str, ...]
    plain: Float[np.ndarray, "layer 2"]  # AP, AP50
    suppressed: Float[np.ndarray, "layer 2"]
    overlap: float  # of the suppression


@torch.no_grad()
def layer_precision(
    model: nn.Module,
    dataset: Dataset,
    images: ImageConfig,
    categories: Categories,
    *,
    proposals: bool = False,
    overlap: float = OVERLAP,
    batch: int = 8,
) -> LayerPrecision:
    """Return AP and AP50 after every row of the model's predictions, without and with NMS, from one pass over a split.

    The model is in evaluation mode. `proposals` says that the first row is not a decoder layer but what the queries
    started from. NMS drops a box that overlaps a better one of its category by an IoU above `overlap`.
    """
    some = next(model.parameters())
    found: list[list[Detections]] = []
    for part in evaluation_batches(dataset, images, batch):
        moved = part.to(some.device, some.dtype)
        rows = by_row(model(moved.images, moved.padding), part.sizes, categories)
        found = [earlier + row for earlier, row in zip(found, rows, strict=True)] if found else rows
    suppressed = [[suppress(each, overlap) for each in row] for row in found]
    values = [_precisions(dataset.annotations, rows) for rows in (found, suppressed)]
    return LayerPrecision(layer_names(len(found), proposals), values[0], values[1], overlap)


def by_row(
    predictions: Predictions, sizes: tuple[tuple[int, int], ...], categories: Categories
) -> list[list[Detections]]:
    """Return the detections of every row of the predictions as if it were the last; `sizes` are (height, width)."""
    rows = zip(predictions.logits.split(1), predictions.boxes_cxcywh.split(1), strict=True)
    return [postprocess(Predictions(logits, boxes), sizes, categories) for logits, boxes in rows]


def suppress(found: Detections, overlap: float = OVERLAP) -> Detections:
    """Return the detections without those that overlap a better one of their category by an IoU above `overlap`.

    >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 0.0, 30.0, 9.0]])
    >>> cells = Categories(ids=(1,), names=("cell",))
    >>> found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.long), cells)
    >>> suppress(found).scores.tolist() == found.scores[[0, 2]].tolist()
    True
    """
    keep = batched_nms(found.boxes_xyxy, found.scores, found.labels, overlap)
    return replace(found, boxes_xyxy=found.boxes_xyxy[keep], scores=found.scores[keep], labels=found.labels[keep])


def layer_names(rows: int, proposals: bool) -> tuple[str, ...]:
    """Return what the rows of predictions are called.

    >>> layer_names(3, proposals=True)
    ('proposals', 'layer 1', 'layer 2')
    """
    first = ("proposals",) if proposals else ()
    return first + tuple(f"layer {number}" for number in range(1, rows - len(first) + 1))


def draw_layers(figure: Any, precision: LayerPrecision) -> None:
    """Draw AP and AP50 over the layers, dashed with NMS."""
    places = range(len(precision.names))
    panels = figure.subplots(1, len(NUMBERS))
    for axes, name, plain, suppressed in zip(panels, NUMBERS, precision.plain.T, precision.suppressed.T, strict=True):
        axes.plot(places, plain, "o-", color="tab:blue", label="as it is")
        axes.plot(places, suppressed, "s--", color="tab:orange", label=f"after NMS at IoU {precision.overlap:g}")
        axes.set_title(name)
        axes.set_xticks(places, precision.names, rotation=30 if len(places) > 4 else 0)
        axes.margins(y=0.15)
    panels[0].legend()


def warn_of_layers(precision: LayerPrecision) -> tuple[str, ...]:
    """Return sentences on duplicates left at the end, and on the layer that falls furthest below an earlier one."""
    ap, warnings = precision.plain[:, 0], []
    gain = precision.suppressed[-1, 0] - ap[-1]
    if gain > DUPLICATES:
        warnings.append(
            f"NMS improves the last layer by {gain:.3f} AP: duplicates are left that a decoder which has learned long "
            "enough suppresses by itself."
        )
    best = np.maximum.accumulate(ap)
    worst = int((best - ap).argmax())
    if best[worst] - ap[worst] > WORSE:
        earlier = precision.names[int(ap[:worst].argmax())]
        warnings.append(
            f"{precision.names[worst].capitalize()} is worse than {earlier} by {best[worst] - ap[worst]:.3f} AP: it "
            "unlearns what was known before it."
        )
    return tuple(warnings)


def layer_table(precision: LayerPrecision) -> list[list[str]]:
    """Return the numbers as rows of text."""
    head = ["after", *(f"{name}{way}" for name in NUMBERS for way in ("", " with NMS"))]
    values = np.stack([precision.plain, precision.suppressed], axis=2).reshape(len(precision.names), -1)
    return [head, *([name, *(f"{x:.3f}" for x in row)] for name, row in zip(precision.names, values, strict=True))]


def _precisions(annotations: Annotations, rows: list[list[Detections]]) -> Float[np.ndarray, "layer 2"]:
    numbers = [evaluate(annotations, row).numbers for row in rows]
    return np.array([[each[name] or 0.0 for name in NUMBERS] for each in numbers])


def section(material: Material) -> Section:
    """Return the section "Layer by layer"."""
    if not material.evaluation.objects:
        return Section("Layer by layer", f"{material.dataset.name} has no objects, so no layer can be judged.")
    measured = layer_precision(
        material.model,
        material.dataset,
        material.card.images,
        material.card.categories,
        proposals=material.card.model.selects,
    )
    return Section(
        "Layer by layer",
        "Every decoder layer is read by the heads and could be the answer. This is how good each would be, and what "
        f"non-maximum suppression (IoU {measured.overlap:g}) would change.",
        figures=(
            Figure(
                "layers",
                "Average precision after each layer",
                chart(9, 3.2, lambda figure: draw_layers(figure, measured)),
                "Each layer is at least as good as the one before. NMS helps the first layer, where queries do not "
                "know of each other yet, and later ones not at all: self-attention has settled who takes which object.",
                warn_of_layers(measured),
            ),
        ),
        tables=(("Average precision after each layer.", layer_table(measured)),),
    )
