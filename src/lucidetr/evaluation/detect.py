"""Run a model over a split, image by image in order."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from lucidetr.categories import Categories
from lucidetr.config import ImageConfig
from lucidetr.data.batching import evaluation_batches
from lucidetr.data.dataset import Dataset
from lucidetr.errors import InputError
from lucidetr.models.postprocess import postprocess
from lucidetr.structures import Detections


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
) -> list[Detections]:
    """Return the detections of every image of a split; the model's training mode is left as it was."""
    some = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    found: list[Detections] = []
    try:
        for part in evaluation_batches(dataset, images, batch):
            moved = part.to(some.device, some.dtype)
            with precision():
                predictions = model(moved.images, moved.padding)
            found += postprocess(predictions, part.sizes, categories)
            progress(len(found))
    finally:
        for module, training in modes.items():
            module.training = training
    return found


def speak(detections: list[Detections], mine: Categories, theirs: Categories) -> list[Detections]:
    """Return a model's detections in a data set's categories, matched by name.

    Detections of categories that the data set lacks are left out. No common name at all is an InputError.
    """
    if mine == theirs:
        return detections
    common = {k: theirs.names.index(name) for k, name in enumerate(mine.names) if name in theirs.names}
    if not common:
        raise InputError(
            f"the model knows {', '.join(mine.names)}; the data set knows {', '.join(theirs.names)}: "
            "no category has the same name in both"
        )
    translated = []
    for found in detections:
        keep = torch.tensor([label in common for label in found.labels.tolist()], dtype=torch.bool)
        labels = torch.tensor([common[label] for label in found.labels[keep].tolist()], dtype=torch.long)
        boxes_xyxy, scores = found.boxes_xyxy[keep], found.scores[keep]
        translated.append(replace(found, boxes_xyxy=boxes_xyxy, scores=scores, labels=labels, categories=theirs))
    return translated
