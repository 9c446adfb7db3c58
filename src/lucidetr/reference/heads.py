"""What a query says: a class and four numbers of a box (DETR, section 3.2, "prediction feed-forward networks")."""

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.reference.elementary import linear, relu, sigmoid
from lucidetr.reference.scope import Scope
from lucidetr.structures import Predictions


def class_and_box(
    here: Scope, layer: int, content: Float[Tensor, "batch query d_model"]
) -> tuple[Float[Tensor, "batch query category"], Float[Tensor, "batch query 4"]]:
    """Return class logits and four raw numbers, read with the weights of all layers, or of this layer alone."""
    place = here if here.config.shared_heads else here.inside(layer)
    logits = linear(content, place["category.weight"], place["category.bias"])
    return here.inside(layer).record("logits", logits), box_head(place.inside("box"), content)


def box_head(here: Scope, content: Float[Tensor, "batch query d_model"]) -> Float[Tensor, "batch query 4"]:
    """Return four numbers of any size: three linear layers."""
    x = relu(linear(content, here["layers.0.weight"], here["layers.0.bias"]))
    x = relu(linear(x, here["layers.1.weight"], here["layers.1.bias"]))
    return linear(x, here["output.weight"], here["output.bias"])


def absolute_boxes(here: Scope, hidden: Float[Tensor, "layer batch query d_model"]) -> Predictions:
    """Return what each layer says, its boxes anew from nothing: a sigmoid makes fractions of the picture."""
    every_logits, every_boxes = [], []
    for layer, content in enumerate(hidden):
        logits, raw = class_and_box(here, layer, content)
        every_logits.append(logits)
        every_boxes.append(here.inside(layer).record("boxes_cxcywh", sigmoid(raw)))
    return Predictions(logits=torch.stack(every_logits), boxes_cxcywh=torch.stack(every_boxes))
