"""Which score is enough: the thresholds with the best F1, kept beside a model, and those that a user asks for."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.categories import Categories
from lucidetr.errors import InputError
from lucidetr.evaluation.errors import Threshold, Thresholds
from lucidetr.fields import from_dict
from lucidetr.structures import labels_of

FILE = "thresholds.json"
BEST = "best.safetensors"  # the model that a folder stands for
IOU = 0.5
DEFAULT = 0.5
LEGAL = "give a number from 0 to 1, best, or NAME=NUMBER,NAME=NUMBER"


@dataclass(frozen=True)
class Kept:
    """Hold what thresholds.json says; categories of which nothing is ever right are not in `per_class`."""

    iou: float
    data: str
    overall: Threshold
    per_class: dict[str, Threshold]


def say(best: Thresholds) -> str:
    """Return the best threshold of all categories in words."""
    if not best.overall:
        return f"best threshold: none, nothing is right at an IoU of {IOU}"
    score, f1, precision, recall = astuple(best.overall)
    return (
        f"best threshold: {score:.3f}, F1 {f1:.3f} (precision {precision:.3f}, recall {recall:.3f}) at an IoU of {IOU}"
    )


def to_json(best: Thresholds, data: str) -> str | None:
    """Return the content of thresholds.json for the best thresholds on `data`; None where nothing is right."""
    if not best.overall:
        return None
    per_class = {name: threshold for name, threshold in best.per_class.items() if threshold}
    return json.dumps(asdict(Kept(IOU, data, best.overall, per_class)), indent=1)


def thresholds_file(model: Path) -> Path:
    """Return where a model's thresholds are kept: those of a folder's best in thresholds.json, others by their name.

    >>> thresholds_file(Path("runs/scenes/best.safetensors")).name
    'thresholds.json'
    >>> thresholds_file(Path("runs/scenes/last.safetensors")).name
    'last.safetensors.thresholds.json'
    """
    if model.is_dir():
        return model / FILE
    return model.with_name(FILE if model.name == BEST else f"{model.name}.{FILE}")


def read_thresholds(model: Path) -> Kept:
    """Read the thresholds that `lucidetr eval` keeps of a run's folder or a model file; none is an InputError."""
    path = thresholds_file(model)
    try:
        return from_dict(Kept, json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; `lucidetr eval {model}` writes it, where at least one detection is right"
        ) from None
    except ValueError as error:  # of JSON, or an InputError of a field
        raise InputError(f"{path}: cannot be used ({error}); write it anew by `lucidetr eval {model}`") from None


def least_scores(
    text: str, categories: Categories, model: Path, only: Sequence[str] = ()
) -> Float[Tensor, " category"]:
    """Return the least score that counts for each label, as float64.

    `text` is a number; `best` for what is kept of `model` for each category, for all where nothing is known of
    one; or NAME=NUMBER,NAME=NUMBER, where the others keep 0.5. With `only`, other categories than these
    never count.

    >>> categories = Categories(ids=(1, 2, 3), names=("a", "b", "c"))
    >>> least_scores("b=0.25", categories, Path(), only=["b", "c"]).tolist()
    [inf, 0.25, 0.5]
    """
    least = _said(text, categories, model)
    if only:
        others = torch.ones(len(categories), dtype=torch.bool)
        others[labels_of(only, categories)] = False
        least[others] = float("inf")
    return least


def _said(text: str, categories: Categories, model: Path) -> Float[Tensor, " category"]:
    if text == "best":
        kept = read_thresholds(model)
        scores = [kept.per_class.get(name, kept.overall).score for name in categories.names]
        return torch.tensor(scores, dtype=torch.float64)
    if "=" not in text:
        return torch.full((len(categories),), _number(text, text), dtype=torch.float64)
    least = torch.full((len(categories),), DEFAULT, dtype=torch.float64)
    for part in split_names(text):
        name, equals, number = part.strip().rpartition("=")
        if not equals:
            raise InputError(f"--threshold {text}: {part!r} is not NAME=NUMBER; {LEGAL}")
        least[labels_of([name], categories)] = _number(number, text)
    return least


def split_names(text: str) -> list[str]:
    """Return the parts between commas; one that holds a comma itself stands in double quotes, as in a CSV file.

    >>> split_names('cat, "car, red", dog')
    ['cat', 'car, red', 'dog']
    """
    try:
        return [part.strip() for part in next(csv.reader([text], skipinitialspace=True, strict=True), [])]
    except csv.Error as error:  # a line break, or very long
        raise InputError(f"{text[:50]!r} cannot be split at its commas ({error}); give names on one line") from None


def _number(word: str, text: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise InputError(f"--threshold {text}: {LEGAL}") from None
    if not 0 <= value <= 1:
        raise InputError(f"--threshold {text}: choose at least 0 and at most 1")
    return value
