"""The report's section on errors: which are made, what each kind costs, and how far scores can be believed."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lucidetr.boxes import xyxy_to_cxcywh
from lucidetr.data.dataset import Dataset
from lucidetr.evaluation.coco import Metrics
from lucidetr.evaluation.errors import (
    KINDS,
    Calibration,
    ErrorKinds,
    Hard,
    PrecisionRecall,
    Threshold,
    Thresholds,
    best_threshold,
    calibration,
    confusion,
    error_kinds,
    hardest,
    precision_recall,
)
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, Section, chart, fewer_colours, ink_of, lay_out, outline, sized, written
from lucidetr.structures import Detections

NAMED = 12  # categories with a curve of their own
WRITTEN = 15  # categories up to which each cell of the confusion matrix has its number
LABELLED = 40  # categories up to which the confusion matrix names its rows
SIDE = 384  # pixels of the longer side of a picture in the report; its boxes are drawn as lines
WORST = 4
MISCALIBRATED = 0.1
COSTLY_DUPLICATES = 0.02  # AP50


def section(material: Material) -> Section:
    """Return the section "Errors": curves, kinds, confusion, calibration and the worst pictures."""
    annotations, detections = material.dataset.annotations, material.detections
    if not material.evaluation.objects:
        return Section("Errors", f"{material.dataset.name} has no objects, so nothing can be found or missed.")
    thresholds = best_threshold(annotations, detections)
    score = thresholds.overall.score if thresholds.overall else 0.5
    kept = [found.above(score) for found in detections]
    kinds, counts = error_kinds(annotations, detections), error_kinds(annotations, kept).counts
    matrix = confusion(annotations, detections, score)
    names = annotations.categories.names
    says = (
        f"What the model gets wrong in the pictures of {material.dataset.name}. Where detections have to "
        f"be kept or dropped, those with a score of at least {score:.2f} are kept"
    )
    best = ": the threshold with the best F1 on these images." if thresholds.overall else "; no detection is right."
    return Section(
        "Errors",
        says + best,
        figures=(
            _curves_figure(material.evaluation),
            _kinds_figure(kinds, counts, score),
            _confusion_figure(matrix, names),
            _calibration_figure(calibration(annotations, detections)),
            *_worst_figure(material.dataset, detections, hardest(annotations, detections, score), score),
        ),
        tables=(
            (f"Kinds of errors, and what mending each would add to an AP50 of {kinds.ap50:.3f}.", kinds_table(kinds)),
            ("The score threshold with the best F1 for each category (IoU 0.5).", threshold_table(thresholds)),
            ("The most frequent confusions of two categories.", confusion_table(matrix, names)),
        ),
    )


def draw_precision_recall(figure: Any, curves: PrecisionRecall, objects: list[int]) -> None:
    """Draw precision over recall at both overlaps, a curve for each of the 12 categories with the most `objects`.

    All other categories are one curve, their mean.
    """
    there = [k for k, number in enumerate(objects) if number]
    named = sorted(sorted(there, key=lambda k: -objects[k])[:NAMED])
    rest = [k for k in there if k not in named]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, overlap, values in zip(panels, ("0.50", "0.75"), (curves.at_50, curves.at_75), strict=True):
        for place, k in enumerate(named):
            style = "-" if place < 10 else "--"  # there are ten colours
            axes.plot(curves.recalls, values[k], style, color=f"C{place % 10}", lw=1.3, label=written(curves.names[k]))
        if rest:
            axes.plot(curves.recalls, values[rest].mean(0), color="tab:gray", lw=3, label=f"mean of {len(rest)} others")
        axes.set(title=f"IoU {overlap}", xlabel="recall", xlim=(0, 1.01), ylim=(0, 1.03))
    panels[0].set_ylabel("precision")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")


def draw_kinds(figure: Any, counts: dict[str, int], gains: dict[str, float], counted: str) -> None:
    """Draw how often each kind of error is made, and what AP50 would gain without it."""
    places, names = np.arange(len(KINDS)), list(KINDS)
    left, right = figure.subplots(1, 2, sharey=True)
    bars = left.barh(places, [counts[kind] for kind in names], color="tab:blue")
    left.bar_label(bars, padding=2)
    left.set(title="how many", xlabel=counted, yticks=places, yticklabels=names)
    left.invert_yaxis()
    bars = right.barh(places, [gains[kind] for kind in names], color="tab:orange")
    right.bar_label(bars, fmt="{:.3f}", padding=2)
    right.set(title="what mending it would bring", xlabel="AP50 gained", xlim=(min(0, *gains.values()), None))
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=4)  # long numbers would run together
        axes.grid(visible=False, axis="y")


def draw_confusion(axes: Any, matrix: Int[np.ndarray, "category category"], names: tuple[str, ...]) -> None:
    """Draw the confusion matrix, each row coloured by its shares; numbers are written in up to 15 categories."""
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    drawn = axes.imshow(np.ma.masked_equal(shares, 0), cmap="viridis", vmin=0, vmax=1)
    axes.set(xlabel="said", ylabel="true")
    axes.grid(visible=False)
    if len(names) <= WRITTEN:
        for true, said in zip(*np.nonzero(matrix), strict=True):
            ink = "black" if shares[true, said] > 0.6 else "white"  # on the cell's own colour, not the page's
            axes.text(said, true, matrix[true, said], ha="center", va="center", color=ink, fontsize=8)
    else:
        axes.figure.colorbar(drawn, ax=axes, label="share of the row", fraction=0.04, pad=0.02)
    if len(names) <= LABELLED:
        places, labels = range(len(names) + 1), [*map(written, names), "background"]
        axes.set_xticks(places, labels, rotation=90)
        axes.set_yticks(places, labels)
    else:
        axes.set(xticks=[], yticks=[], xlabel="said, by id; background last", ylabel="true, by id; background last")


def draw_calibration(figure: Any, measured: Calibration) -> None:
    """Draw the share of right detections over their score, and below it how many there are."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middles, width = (measured.edges[1:] + measured.edges[:-1]) / 2, np.diff(measured.edges)
    upper.bar(middles, measured.right, width * 0.94, color="tab:blue", alpha=0.7, label="right")
    upper.plot(measured.scores, measured.scores, "o", color="tab:orange", label="mean score: where it should be")
    upper.plot((0, 1), (0, 1), color="tab:gray", lw=1, ls="--")
    upper.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.03))
    upper.legend(loc="upper left")
    bars = lower.bar(middles, measured.counts, width * 0.94, color="tab:gray")
    lower.bar_label(bars, fontsize=7)
    lower.set(xlabel="score", ylabel="how many", yticks=[])
    lower.margins(y=0.25)


def draw_worst(figure: Any, dataset: Dataset, detections: list[Detections], pictures: list[Hard]) -> None:
    """Draw what was found in each picture, and beside it the truth."""
    names = dataset.annotations.categories.names
    panels = figure.subplots(len(pictures), 2, squeeze=False)
    for (left, right), picture in zip(panels, pictures, strict=True):
        image = dataset.image(picture.index).permute(1, 2, 0).numpy()
        found, target = detections[picture.index], dataset.annotations.target(picture.index)
        captions = [
            f"{written(name)} {score:.2f}" for name, score in zip(found.names, found.scores.tolist(), strict=True)
        ]
        _show(left, image, found.boxes_xyxy, captions, found.labels.tolist())
        labels = target.labels.tolist()
        _show(right, image, target.boxes_xyxy, [written(names[label]) for label in labels], labels)
        image_id = dataset.annotations.image_ids[picture.index]
        left.set_title(f"image {image_id}, found: {picture.missed} missed, {picture.false} false", fontsize=9)
        right.set_title("true", fontsize=9)


def kinds_table(kinds: ErrorKinds) -> list[list[str]]:
    """Return what the kinds mean, how often they are made at any score, and what mending brings, as rows of text."""
    rows = [[kind, KINDS[kind], str(number), f"{kinds.gains[kind]:.3f}"] for kind, number in kinds.counts.items()]
    return [["kind", "meaning", "at any score", "AP50 gained"], *rows]


def threshold_table(thresholds: Thresholds) -> list[list[str]]:
    """Return the best thresholds as rows of text, those of all categories together first."""
    rows = [["category", "threshold", "F1", "precision", "recall"], _threshold_row("all together", thresholds.overall)]
    return rows + [_threshold_row(name, each) for name, each in thresholds.per_class.items()]


def confusion_table(
    matrix: Int[np.ndarray, "category category"], names: tuple[str, ...], most: int = 10
) -> list[list[str]]:
    """Return the most frequent confusions of one category with another as rows of text."""
    between = matrix[:-1, :-1] * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-between, axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(place, between.shape) for place in order]
    rows = [[names[true], names[said], str(between[true, said])] for true, said in pairs if between[true, said]]
    return [["true", "said", "times"], *rows]


def _curves_figure(metrics: Metrics) -> Figure:
    curves = precision_recall(metrics)
    objects = [int(row["objects"] or 0) for row in metrics.per_class.values()]
    never = [name for name, row in metrics.per_class.items() if row["objects"] and not row["AP50"]]
    listed = ", ".join(never[:NAMED]) + (f" and {len(never) - NAMED} more" if len(never) > NAMED else "")
    return Figure(
        "precision-recall",
        "Precision and recall of each category",
        chart(9, 3.6, lambda figure: draw_precision_recall(figure, curves, objects)),
        "Curves stay high far to the right and then fall; one that ends early belongs to a category of which many "
        "objects are never found, one that starts low to a category with sure false alarms. At IoU 0.75 they lie "
        "lower, by as much as boxes are imprecise.",
        (f"Never found at an IoU of 0.5: {listed}.",) if never else (),
    )


def _kinds_figure(kinds: ErrorKinds, counts: dict[str, int], score: float) -> Figure:
    warnings = ()
    if kinds.gains["duplicate"] > COSTLY_DUPLICATES:
        warnings = (
            f"Duplicates cost {kinds.gains['duplicate']:.3f} AP50: several queries claim one object. A DETR that has "
            "learned long enough suppresses them by itself.",
        )
    return Figure(
        "error-kinds",
        "Kinds of errors",
        chart(9, 2.9, lambda figure: draw_kinds(figure, counts, kinds.gains, f"errors at scores ≥ {score:.2f}")),
        "No bar towers over the others, and duplicates cost nothing; what brings most is to be mended first.",
        warnings,
    )


def _confusion_figure(matrix: Int[np.ndarray, "category category"], names: tuple[str, ...]) -> Figure:
    longest = max(len(written(name)) for name in names)
    side = min(3 + 0.3 * len(names) + 0.07 * longest, 8)
    return Figure(
        "confusion",
        "What was taken for what",
        chart(side + 1, side, lambda figure: draw_confusion(figure.subplots(), matrix, names)),
        "The diagonal holds nearly everything. The last column counts objects that were not found, the last row false "
        "alarms; a cell beside the diagonal counts boxes in the right place with the wrong category.",
    )


def _calibration_figure(measured: Calibration) -> Figure:
    return Figure(
        "calibration",
        "How far scores can be believed",
        chart(5, 4.2, lambda figure: draw_calibration(figure, measured)),
        "Bars end at the dots: of the detections with a score of 0.7, seven in ten are right (at an IoU of 0.5). Here "
        f"the mean distance, the expected calibration error, is {measured.error:.2f}. A loss that asks the score to "
        "follow the overlap (varifocal, ia_bce, mal) gives high scores below that share, and low ones above it.",
        calibration_warnings(measured),
    )


def calibration_warnings(measured: Calibration) -> tuple[str, ...]:
    """Return a sentence on scores that are not to be believed, none where they are."""
    if measured.error <= MISCALIBRATED:
        return ()
    if abs(measured.lean) < measured.error / 2:
        way = "too high in some ranges and too low in others"
    elif measured.lean > 0:
        way = f"over-confident: scores are {measured.lean:.2f} above the share that is right on average"
    else:
        way = f"under-confident: scores are {-measured.lean:.2f} below the share that is right on average"
    return (f"Expected calibration error {measured.error:.2f}: {way}.",)


def _worst_figure(
    dataset: Dataset, detections: list[Detections], pictures: list[Hard], score: float
) -> tuple[Figure, ...]:
    """Return the figure of the worst pictures, none where all is right."""
    worst = [picture for picture in pictures if picture.missed + picture.false][:WORST]
    if not worst:
        return ()
    kept = [found.above(score) for found in detections]
    sizes = [dataset.annotations.sizes[picture.index].tolist() for picture in worst]
    heights = sum(min(4 * height / width, 6) + 0.4 for height, width in sizes)
    return (
        Figure(
            "worst-pictures",
            "The pictures with the most errors",
            chart(8.2, heights, lambda figure: draw_worst(figure, dataset, kept, worst)),
            "The worst pictures are hard for people, too. Where the truth beside them looks wrong or incomplete, it "
            "is the annotations that need mending.",
        ),
    )


def _threshold_row(name: str, best: Threshold | None) -> list[str]:
    if best is None:
        return [name, "nothing is right", "", "", ""]
    return [name, *(f"{value:.2f}" for value in (best.score, best.f1, best.precision, best.recall))]


def _show(
    axes: Any,
    image: UInt8[np.ndarray, "height width 3"],
    boxes_xyxy: Float[Tensor, "box 4"],
    captions: list[str],
    labels: list[int],
) -> None:
    """Draw a picture and its boxes, the first on top, as lines that stay sharp at every size."""
    height, width = image.shape[:2]
    axes.imshow(fewer_colours(sized(image, SIDE)), extent=(0, 1, 1, 0), interpolation="none")
    lay_out(axes, height, width)
    boxes = xyxy_to_cxcywh(boxes_xyxy).numpy() / np.array([width, height, width, height])
    for box, caption, label in reversed(list(zip(boxes, captions, labels, strict=True))):
        outline(axes, box, ink_of(label), caption, linewidth=1.2)
