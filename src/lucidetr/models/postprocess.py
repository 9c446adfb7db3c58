"""From the last layer's predictions to detections in a picture's own pixels (DETR, A.4)."""

import torch

from lucidetr.boxes import cxcywh_to_xyxy
from lucidetr.categories import Categories
from lucidetr.structures import Detections, Predictions


def postprocess(
    predictions: Predictions, sizes: tuple[tuple[int, int], ...], categories: Categories
) -> list[Detections]:
    """Return one `Detections` per image, every query in it, best score first.

    A query's score is that of its best real class, also where no object is likelier still: the paper does so,
    because an average precision counts every rank. `sizes` are (height, width) of the original pictures.
    """
    predictions = predictions.in_full_precision()
    scores, labels = predictions.logits[-1].softmax(-1)[..., :-1].max(-1)
    boxes_xyxy = cxcywh_to_xyxy(predictions.boxes_cxcywh[-1])
    scores, order = scores.sort(descending=True, stable=True)
    labels = labels.gather(1, order).cpu()
    boxes_xyxy = boxes_xyxy.gather(1, order[..., None].expand(-1, -1, 4)).cpu()
    return [
        Detections(
            boxes_xyxy=boxes_xyxy[i] * torch.tensor([width, height, width, height], dtype=boxes_xyxy.dtype),
            scores=scores[i].cpu(),
            labels=labels[i],
            categories=categories,
        )
        for i, (height, width) in enumerate(sizes)
    ]
