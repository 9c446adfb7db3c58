"""What training writes down of itself: weights, gradients, and which query was matched to which object.

A look is one line of RUN/statistics.jsonl: {"step", "seconds", "tensors", "queries"}. "tensors" holds for each
parameter that learns what `describe` returns, and "update": the length of its step as a share of its own length.
"queries" holds churn, used and duplicates, a number for each layer of `Predictions`: proposals, groups and hints are
rows of their own.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lucidetr.boxes import cxcywh_to_xyxy, iou
from lucidetr.config import ModelConfig
from lucidetr.models.postprocess import class_scores
from lucidetr.structures import Assignment, Batch, Predictions
from lucidetr.training.run_log import append_line, drop_lines_after, read_lines

FILE = "statistics.jsonl"
BINS = 32
DIGITS = 4  # significant ones of every number written
NARROWEST = 1e-30  # a range below this cannot be cut into bins
SAME_BOX, SAYS_SO = 0.7, 0.3  # overlap and score from which a query says the same object as another
NOBODY = -1  # the query of an object that none was matched to


def read_statistics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's statistics.jsonl, oldest first; none where there is no such file."""
    return read_lines(run / FILE)


def forget_after(run: Path, step: int) -> None:
    """Drop the lines of later steps, and half a last one."""
    drop_lines_after(run / FILE, step)


class Recorder:
    """Note every step's matching, and write a line about matching, weights and gradients at `looks` of the steps.

    Looks are even over the run, besides the first step. Nothing is drawn at random and nothing changed: a run learns
    the same with it and without. A resumed run remembers neither which queries were ever used nor who had which
    object: both start anew.
    """

    def __init__(self, run: Path, model: ModelConfig, looks: int, taken: int = 0):
        self.path, self.looks, self.taken = run / FILE, looks, taken
        self.num_classes = model.num_classes
        self.sights = Sights(model.num_queries)
        self.looking = False
        self.tensors: dict[str, dict[str, Any]] = {}
        self.before: dict[str, Tensor] = {}
        self.duplicates: list[Tensor] = []
        self.objects = 0  # in the images of the step

    def begin(self, step: int, due: int) -> None:
        """Decide whether the coming step is looked at; `due` looks shall have been taken when it ends."""
        self.looking = self.looks > 0 and (step == 0 or due > self.taken)
        self.taken = max(self.taken, due)

    def pass_over(self) -> None:
        """Forget a step that is not taken; if it was to be looked at, the next one is."""
        if self.looking:
            self.looking, self.tensors, self.before, self.duplicates = False, {}, {}, []
            self.taken -= 1

    def see_predictions(self, predictions: Predictions, batch: Batch, assignment: Assignment) -> None:
        """Count the duplicates in a part of the step."""
        if self.looking:
            self.duplicates.append(count_duplicates(predictions, batch, assignment, self.num_classes))

    def see_gradients(self, model: nn.Module) -> None:
        """Describe weights and gradients as they are: after backward, before the clip and the optimiser's step.

        A parameter that took no part in the loss counts as one whose gradient is zero.
        """
        if self.looking:
            learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.tensors = describe({name: (p, _gradient(p)) for name, p in learning.items()})
            self.before = {name: p.detach().clone() for name, p in learning.items()}

    def see_matching(self, parts: Sequence[Batch], losses: Sequence[Any]) -> None:
        """Note which query was matched to which object in all parts of the step: what an engine's losses say."""
        if self.looks:
            self.objects = sum(int(part.counts.sum()) for part in parts)
            for part, loss in zip(parts, losses, strict=True):
                self.sights.note(part.image_ids, part.counts, loss.assignment, len(loss.l1))

    def see_update(self, model: nn.Module) -> None:
        """Measure how far the optimiser's step has moved each parameter, in shares of its norm before."""
        if self.looking:
            after = dict(model.named_parameters())
            shares = updates(self.before, {name: after[name] for name in self.before})
            for name, share in shares.items():
                self.tensors[name]["update"] = share
            self.before = {}

    def write(self, step: int, seconds: float) -> None:
        """Append a line about the step that is done, if it was looked at; a full disk is an InputError."""
        if not self.looking:
            return
        further = torch.stack(self.duplicates).sum(0).tolist()
        duplicates = [_rounded(number / self.objects) if self.objects else None for number in further]
        queries = {"churn": self.sights.churn(), "used": self.sights.used(), "duplicates": duplicates}
        line = {"step": step, "seconds": _rounded(seconds), "tensors": self.tensors, "queries": queries}
        append_line(self.path, line)
        self.looking, self.tensors, self.duplicates = False, {}, []


class Sights:
    """Remember which query had each object of an image at its last sight, and which queries ever had one."""

    def __init__(self, num_queries: int):
        self.num_queries = num_queries
        self.last: dict[int, np.ndarray] = {}  # by the image's id: (layer, object)
        self.ever = np.zeros((0, num_queries), dtype=bool)
        self.changed = self.compared = np.zeros(0, dtype=np.int64)

    def note(
        self, image_ids: Sequence[int], counts: Int[Tensor, " batch"], assignment: Assignment, layers: int
    ) -> None:
        """Note the matching of some images.

        Augmentation may drop objects, so an image is compared with its last sight only where their number is equal.
        """
        if not len(self.ever):
            self.ever = np.zeros((layers, self.num_queries), dtype=bool)
            self.changed, self.compared = np.zeros((2, layers), dtype=np.int64)
        numbers = counts.tolist()
        table = query_table(assignment, (layers, len(numbers), max(numbers, default=0)))
        layer, image, thing = np.nonzero(table != NOBODY)
        self.ever[layer, table[layer, image, thing]] = True
        for i, (image_id, number) in enumerate(zip(image_ids, numbers, strict=True)):
            now, before = table[:, i, :number].copy(), self.last.get(image_id)
            if before is not None and before.shape == now.shape:
                both = (now != NOBODY) & (before != NOBODY)
                self.compared += both.sum(1)
                self.changed += (both & (now != before)).sum(1)
            self.last[image_id] = now

    def churn(self) -> list[float | None]:
        """Return for each layer the share of objects that changed their query since the last call, and count anew.

        None where no object was seen a second time.
        """
        pairs = zip(self.changed.tolist(), self.compared.tolist(), strict=True)
        shares = [_rounded(changed / compared) if compared else None for changed, compared in pairs]
        self.changed, self.compared = np.zeros((2, len(self.ever)), dtype=np.int64)
        return shares

    def used(self) -> list[float]:
        """Return for each layer the share of queries that ever had an object."""
        return [_rounded(share) for share in self.ever.mean(1).tolist()]


def query_table(assignment: Assignment, shape: tuple[int, int, int]) -> Int[np.ndarray, "layer batch object"]:
    """Return the query of every object after every layer, −1 where it was left without.

    >>> one = Assignment(*torch.tensor([[0, 1], [0, 0], [7, 3], [1, 0]]).unbind())
    >>> query_table(one, (2, 1, 2)).tolist()
    [[[-1, 7]], [[3, -1]]]
    """
    columns = (assignment.layer, assignment.image, assignment.object, assignment.query)
    layer, image, thing, query = torch.stack(columns).cpu().numpy()
    table = np.full(shape, NOBODY, dtype=np.int32)
    table[layer, image, thing] = query
    return table


@torch.no_grad()
def count_duplicates(
    predictions: Predictions, batch: Batch, assignment: Assignment, num_classes: int
) -> Int[Tensor, " layer"]:
    """Return for each layer how often a query says an object that it was not matched to.

    It does where the object's class is its best, with a score of at least 0.3, and their boxes overlap by an IoU of
    0.7. No object is no class.
    """
    predictions = predictions.in_full_precision()
    logits = predictions.logits
    best, label = class_scores(logits, num_classes).max(-1)
    boxes, objects = cxcywh_to_xyxy(predictions.boxes_cxcywh), cxcywh_to_xyxy(batch.boxes_cxcywh)
    same = iou(boxes[:, :, :, None], objects[None, :, None]) >= SAME_BOX  # never where an object is padding: no area
    same &= (best >= SAYS_SO)[..., None] & (label[..., None] == batch.labels[None, :, None])
    same[assignment.layer, assignment.image, assignment.query, assignment.object] = False
    return same.sum((1, 2, 3))


@torch.no_grad()
def describe(tensors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, Any]]:
    """Return mean, deviation, extremes and histograms of (weight, gradient) by name, and the share of silent units.

    Under "weight" and "gradient" stand [mean, std, min, max], under "weight_histogram" and "gradient_histogram" the
    two ends of the range and the counts of 32 equal bins in it, under "silent" what `silent_share` returns.
    """
    flat = [tensor.detach() for pair in tensors.values() for tensor in pair]
    summaries = summarise(flat)
    silent = torch.stack([silent_share(gradient) for gradient in flat[1::2]]).tolist()
    lines: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(tensors):
        (weight, weights), (gradient, gradients) = summaries[2 * i : 2 * i + 2]
        lines[name] = {"weight": weight, "gradient": gradient}
        lines[name] |= {"weight_histogram": weights, "gradient_histogram": gradients, "silent": _rounded(silent[i])}
    return lines


def summarise(tensors: Sequence[Tensor]) -> list[tuple[list[float], list[Any]]]:
    """Return ([mean, std, min, max], [low, high, counts]) of each tensor; all are copied to the host at once, twice."""
    moments = torch.stack([torch.stack([*reversed(torch.std_mean(x, correction=0)), *x.aminmax()]) for x in tensors])
    ranges = [_range(low, high) for *_, low, high in moments.tolist()]
    counts = torch.stack([x.histc(BINS, low, high) for x, (low, high) in zip(tensors, ranges, strict=True)])
    rows = zip(moments.tolist(), ranges, counts.long().tolist(), strict=True)
    return [([_rounded(x) for x in each], [*map(_rounded, ends), bins]) for each, ends, bins in rows]


def silent_share(gradient: Float[Tensor, "*any"]) -> Float[Tensor, ""]:
    """Return the share of a layer's output units (rows; of a vector its numbers) whose gradient is exactly zero.

    Such a unit has passed nothing back: before a ReLU, it was below zero for every input of the step.

    >>> silent_share(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).item()
    0.5
    """
    zero = gradient == 0
    return (zero.flatten(1).all(1) if zero.ndim > 1 else zero).float().mean()


@torch.no_grad()
def updates(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float | None]:
    """Return |after − before| / |before| of each parameter, None where there was no length before."""
    if not before:
        return {}
    pairs = [(was, after[name]) for name, was in before.items()]
    lengths = torch.stack([torch.stack([(now - was).norm(), was.norm()]) for was, now in pairs]).tolist()
    shares = [_rounded(step / length) if length else None for step, length in lengths]
    return dict(zip(before, shares, strict=True))


def _gradient(parameter: Tensor) -> Tensor:
    """Return the gradient, zeros where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _range(low: float, high: float) -> tuple[float, float]:
    """Return the ends of a histogram: the extremes, or 1 about them where all values are one."""
    if NARROWEST < high - low < math.inf:
        return low, high
    middle = low if math.isfinite(low) else 0.0  # a step that is not finite is skipped, and this with it
    return middle - 0.5, middle + 0.5


def _rounded(number: float) -> float:
    """Return a number with the digits that are written down."""
    return float(f"{number:.{DIGITS}g}")
