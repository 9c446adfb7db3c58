"""The metrics as tables for people."""

from rich.console import Console
from rich.table import Table

from lucidetr.evaluation.coco import MEANING, Metrics


def print_metrics(metrics: Metrics, name: str) -> None:
    """Print what was compared, the twelve numbers and the table by category."""
    console = Console(highlight=False)
    counts = f"{metrics.images} images, {metrics.objects} objects, {metrics.detections} detections"
    console.print(f"{name}: {counts}", markup=False)
    if not metrics.detections:
        console.print("nothing was detected at all: every AP is 0")
    table = Table("number", "value", "meaning", box=None, pad_edge=False)
    for key, value in metrics.numbers.items():
        table.add_row(key, _say(value), MEANING[key])
    console.print(table)
    classes = Table("category", "AP", "AP50", "AR100", "objects", box=None, pad_edge=False)
    for category, row in metrics.per_class.items():
        classes.add_row(category, *(_say(row[key]) for key in ("AP", "AP50", "AR100")), str(row["objects"]))
    console.print(classes)


def _say(value: float | int | None) -> str:
    return "none in the set" if value is None else f"{value:.3f}"
