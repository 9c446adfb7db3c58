"""From the last layer's predictions to detections in a picture's own pixels (DETR, section 4)."""

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.boxes import cxcywh_to_xyxy
from lucidetr.categories import Categories
from lucidetr.structures import Detections, Predictions


def class_scores(
    logits: Float[Tensor, "*any query category"], num_classes: int
) -> Float[Tensor, "*any query num_classes"]:
    """Return the score of every real class: sigmoids, or a softmax where there is one slot more, no object.

    >>> class_scores(torch.tensor([[0.0, 0.0, 1000.0]]), num_classes=2).tolist()  # surely no object
    [[0.0, 0.0]]
    >>> class_scores(torch.tensor([[-1000.0, 0.0]]), num_classes=2).tolist()
    [[0.0, 0.5]]
    """
    return logits.softmax(-1)[..., :-1] if logits.shape[-1] > num_classes else logits.sigmoid()


def postprocess(
    predictions: Predictions, sizes: tuple[tuple[int, int], ...], categories: Categories
) -> list[Detections]:
    """Return one `Detections` per image, best score first, as many as there are queries.

    With a softmax, a query's score is that of its best real class, even where no object is more likely: the paper
    does so because average precision counts every rank. With sigmoids, the best (query, class) pairs are kept, so one
    query may give two detections. `sizes` are (height, width) of the original pictures.
    """
    predictions = predictions.in_full_precision()
    logits = predictions.logits[-1]
    queries = logits.shape[1]
    each = class_scores(logits, len(categories))
    if logits.shape[-1] > len(categories):
        scores, labels = each.max(-1)
        scores, query = scores.sort(descending=True, stable=True)
        labels = labels.gather(1, query)
    else:
        scores, index = each.flatten(1).sort(descending=True, stable=True)
        scores, index = scores[:, :queries], index[:, :queries]
        query, labels = index // logits.shape[-1], index % logits.shape[-1]
    boxes_xyxy = cxcywh_to_xyxy(predictions.boxes_cxcywh[-1])
    boxes_xyxy = boxes_xyxy.gather(1, query[..., None].expand(-1, -1, 4)).cpu()
    return [
        Detections(
            boxes_xyxy=boxes_xyxy[i] * torch.tensor([width, height, width, height], dtype=boxes_xyxy.dtype),
            scores=scores[i].cpu(),
            labels=labels[i].cpu(),
            categories=categories,
        )
        for i, (height, width) in enumerate(sizes)
    ]
