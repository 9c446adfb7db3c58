"""A decoder whose queries carry a box: each layer looks from where it is, and moves it.

(DAB-DETR, Liu et al. 2022; "look forward twice": DINO, Zhang et al. 2023, section 3.5.)
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.reference.box_bias import box_bias
from lucidetr.reference.boxes import move
from lucidetr.reference.elementary import linear, relu
from lucidetr.reference.heads import class_and_box
from lucidetr.reference.positions import octave_waves
from lucidetr.reference.queries import Start
from lucidetr.reference.scope import Scope
from lucidetr.reference.transformer import Memory, decoder_layer, for_heads
from lucidetr.structures import Predictions


def moved_boxes(here: Scope, start: Start, start_cxcywh: Float[Tensor, "batch query 4"], memory: Memory) -> Predictions:
    """Return classes and boxes after every layer; `here` is the whole network, for decoder and heads take turns.

    A layer knows the reference box as the queries' position and, with a `box_bias`, as a bias on what they look at.
    """
    content, reference, previous = start.content, start_cxcywh, start_cxcywh
    every_logits, every_boxes = [], []
    for layer in range(here.config.decoder_layers):
        decoder = here.inside("decoder")
        place = decoder.inside("layers").inside(layer)
        place.record("reference_cxcywh", reference)
        query_position = place.record("query_position", box_position(decoder.inside("position"), reference))
        bias = partial(box_bias, place, reference, memory)
        content = decoder_layer(place, content, query_position, memory, start.groups, bias)
        hidden = place.record("hidden", for_heads(decoder, content))
        logits, delta = class_and_box(here.inside("heads"), layer, hidden)
        boxes, reference, previous = step(here.config.boxes, reference, previous, delta)
        every_logits.append(logits)
        every_boxes.append(here.inside("heads").inside(layer).record("boxes_cxcywh", boxes))
    return Predictions(logits=torch.stack(every_logits), boxes_cxcywh=torch.stack(every_boxes))


def box_position(here: Scope, boxes_cxcywh: Float[Tensor, "batch query 4"]) -> Float[Tensor, "batch query d_model"]:
    """Return a box as a vector: waves of its four numbers, each an eighth of d_model twice, through two layers."""
    x = octave_waves(boxes_cxcywh, max(here.config.d_model // 8, 1)).flatten(-2)
    x = relu(linear(x, here["hidden.weight"], here["hidden.bias"]))
    return linear(x, here["output.weight"], here["output.bias"])


def step(
    kind: str,
    reference: Float[Tensor, "batch query 4"],
    previous: Float[Tensor, "batch query 4"],
    delta: Float[Tensor, "batch query 4"],
) -> tuple[Float[Tensor, "batch query 4"], Float[Tensor, "batch query 4"], Float[Tensor, "batch query 4"]]:
    """Return a layer's box, and the next layer's reference and previous box.

    relative: the reference stays the first box, and each layer says the whole way from it.
    refined: the next layer starts where this one arrived. detach cuts the gradient: each layer learns its own step.
    refined_twice: `previous` is the same box uncut. A layer's loss reaches this layer's step and the one before.

    >>> still, right = torch.tensor([[[0.5, 0.5, 0.25, 1.0]]]), torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    >>> for kind in ("relative", "refined", "refined_twice"):
    ...     box, reference, _ = step(kind, still, still, right)
    ...     print(kind, box[0, 0, 0].item(), reference[0, 0, 0].item())
    relative 0.75 0.5
    refined 0.75 0.75
    refined_twice 0.75 0.75
    """
    if kind == "relative":
        return move(reference, delta), reference, previous
    if kind == "refined":
        box = move(reference, delta)
        return box, box.detach(), previous
    arrived = move(reference, delta)
    return move(previous, delta), arrived.detach(), arrived
