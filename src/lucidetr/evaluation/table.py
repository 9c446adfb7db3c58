"""The metrics as tables for people."""

from rich.console import Console
from rich.table import Table

from lucidetr.evaluation.coco import MEANING, Metrics
from lucidetr.evaluation.crowds import Group

PLAIN = {"highlight": False, "markup": False, "emoji": False}  # names are the user's: brackets and colons mean nothing


def print_metrics(metrics: Metrics, name: str) -> None:
    """Print what was compared, the twelve numbers and the table by category."""
    console = Console(**PLAIN)
    counts = f"{metrics.images} images, {metrics.objects} objects, {metrics.detections} detections"
    console.print(f"{name}: {counts}", soft_wrap=True)  # one line, however long the name
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


def print_crowds(groups: list[Group], score: float) -> None:
    """Print what was found by the number of objects in a picture, from a score on."""
    table = Table("objects in a picture", "pictures", "objects", "recall", "precision", box=None, pad_edge=False)
    for group in groups:
        span = f"{group.fewest}" if group.fewest == group.most else f"{group.fewest} to {group.most}"
        table.add_row(span, str(group.images), str(group.objects), _say(group.recall), _say(group.precision, "–"))
    console = Console(**PLAIN)
    console.print(f"by crowding, at an IoU of 0.5 and scores of at least {score:.3f}, the best F1:")
    console.print(table)


def _say(value: float | int | None, nothing: str = "none in the set") -> str:
    return nothing if value is None else f"{value:.3f}"
