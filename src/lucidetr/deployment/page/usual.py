"""Where each query usually looks for objects: its boxes over many pictures (DETR, figure 7)."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from lucidetr.data.decoding import as_image
from lucidetr.data.preprocessing import make_batch, prepare
from lucidetr.deployment.detector import Detector
from lucidetr.deployment.page.look import inside


@torch.no_grad()
def usual_json(detector: Detector, pictures: Iterable[Any], most: int = 100) -> dict[str, list[list[float]]]:
    """Return the boxes that each query says of the first `most` pictures: [cx, cy, w, h] in fractions of each.

    Pictures are whatever `Detector.predict` takes. An exported model is an InputError.
    """
    model, images = inside(detector), detector.card.images
    some = next(model.parameters())
    places: dict[str, list[list[float]]] = {}
    for picture in islice(pictures, most):
        batch = make_batch([prepare(as_image(picture), images)], images).to(some.device, some.dtype)
        boxes_cxcywh = model(batch.images, batch.padding).boxes_cxcywh[-1, 0]
        for query, box in enumerate(boxes_cxcywh.tolist()):
            places.setdefault(str(query), []).append([round(value, 4) for value in box])
    return places
