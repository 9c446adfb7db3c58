"""Run a model over a split, image by image in order."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from lucidetr.categories import Categories
from lucidetr.config import ImageConfig
from lucidetr.data.annotations import Annotations
from lucidetr.data.batching import WHOLE, evaluation_batches
from lucidetr.data.dataset import Dataset
from lucidetr.data.faults import listing
from lucidetr.errors import InputError
from lucidetr.models.postprocess import postprocess
from lucidetr.structures import Detections

Batches = list[list[Detections]]


@torch.no_grad()
def detect(
    model: nn.Module,
    dataset: Dataset,
    images: ImageConfig,
    categories: Categories,
    *,
    batch: int = 8,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int], None] = lambda done: None,
    share: tuple[int, int] = WHOLE,
    gather: Callable[[Batches], Batches] = lambda batches: batches,
) -> list[Detections]:
    """Return the detections of every image of a split; the model's training mode is left as it was.

    With a `share` (rank, ranks) this process does every so many-th batch, and `gather` turns what it found into what
    all have found, in order.
    """
    some = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    found: Batches = []
    done = 0
    try:
        for part in evaluation_batches(dataset, images, batch, share):
            moved = part.to(some.device, some.dtype)
            with precision():
                predictions = model(moved.images, moved.padding)
            found.append(postprocess(predictions, part.sizes, categories))
            done += len(part) * share[1]
            progress(min(done, len(dataset)))
    finally:
        for module, training in modes.items():
            module.training = training
    return [each for part in gather(found) for each in part]


def speak(detections: list[Detections], mine: Categories, theirs: Categories) -> list[Detections]:
    """Return a model's detections in a data set's categories, matched by name.

    Detections of categories that the data set lacks are left out. No common name at all is an InputError.
    """
    if mine == theirs:
        return detections
    common = common_labels(mine, theirs)
    translated = []
    for found in detections:
        keep = torch.tensor([label in common for label in found.labels.tolist()], dtype=torch.bool)
        labels = torch.tensor([common[label] for label in found.labels[keep].tolist()], dtype=torch.long)
        boxes_xyxy, scores = found.boxes_xyxy[keep], found.scores[keep]
        translated.append(replace(found, boxes_xyxy=boxes_xyxy, scores=scores, labels=labels, categories=theirs))
    return translated


def common_labels(mine: Categories, theirs: Categories) -> dict[int, int]:
    """Return a data set's labels by a model's, for the categories of the same name; none is an InputError."""
    common = {k: theirs.names.index(name) for k, name in enumerate(mine.names) if name in theirs.names}
    if not common:
        raise InputError(
            f"the model knows {', '.join(mine.names)}; the data set knows {', '.join(theirs.names)}: "
            "no category has the same name in both"
        )
    return common


def strangers(mine: Categories, truth: Annotations) -> list[str]:
    """Return sentences on the categories that only one of a model and a data set knows; no common one is an InputError.

    Of the data set's those count of which there are objects: the others have no AP.
    """
    theirs = truth.categories
    common_labels(mine, theirs)
    seen = [theirs.names[label] for label in np.unique(truth.labels)]
    unknown = [name for name in seen if name not in mine.names]
    extra = [name for name in mine.names if name not in theirs.names]
    said = []
    if unknown:
        said.append(f"warning: the model does not know {listing(unknown)}, which is in the data: its AP will be 0")
    if extra:
        said.append(f"warning: the data do not know {listing(extra)}, which the model finds: that is left out")
    return said
