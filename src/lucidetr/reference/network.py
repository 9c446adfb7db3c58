"""The whole network: images in, a set of boxes and classes out (DETR, section 3.2 and figure 2)."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lucidetr.config import ModelConfig
from lucidetr.reference.backbone import resnet
from lucidetr.reference.convolution import convolution
from lucidetr.reference.elementary import linear, relu, sigmoid
from lucidetr.reference.norms import per_channel
from lucidetr.reference.positions import learned_position, shrink_padding, sine_position
from lucidetr.reference.scope import Scope
from lucidetr.reference.trace import Keep, Trace
from lucidetr.reference.transformer import decoder, encoder
from lucidetr.structures import Predictions


def forward(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    images: Float[Tensor, "batch 3 height width"],
    padding: Bool[Tensor, "batch height width"],
    *,
    training: bool = False,
    generator: torch.Generator | None = None,
    keep: Keep = None,
) -> tuple[Predictions, Trace]:
    """Return the predictions after every decoder layer, and the trace of every value on the way.

    `state` maps the names of the fast model's state_dict to tensors, of one dtype; gradients flow to those that
    ask for them. Images are normalised and zero where `padding` is True. When training, dropout draws from
    `generator`, and batch norm measures its own statistics and moves the running ones in `state`, in place.
    """
    trace = Trace(keep)
    here = Scope(state, config, trace, training, generator)
    features = here.record("backbone", resnet(here.inside("backbone"), images))
    features = here.record("projection", project(here.inside("projection"), features))

    grid_h, grid_w = features.shape[-2:]
    grid_padding = here.record("padding", shrink_padding(padding, grid_h, grid_w))
    grid_position = here.record("position", positions(here.inside("position"), grid_padding, features.dtype))

    tokens = here.record("tokens", flatten(features))
    position, token_padding = flatten(grid_position), grid_padding.flatten(1)
    memory = here.record("memory", encoder(here.inside("encoder"), tokens, position, token_padding))

    content, query_position = queries(here.inside("queries"), len(images))
    hidden = decoder(here.inside("decoder"), content, query_position, memory, position, token_padding)
    return heads(here.inside("heads"), hidden), trace


def project(here: Scope, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch d_model h w"]:
    """Return the features in the transformer's width: a 1 × 1 convolution with a bias."""
    return convolution(x, here["weight"]) + per_channel(here["bias"])


def positions(
    here: Scope, padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
) -> Float[Tensor, "batch d_model grid_h grid_w"]:
    """Return the position of every cell, in waves or as learned."""
    if here.config.position == "sine":
        return sine_position(padding, here.config.d_model, dtype)
    batch, grid_h, grid_w = padding.shape
    return learned_position(here["row"], here["column"], batch, grid_h, grid_w)


def flatten(grid: Float[Tensor, "batch d_model grid_h grid_w"]) -> Float[Tensor, "batch token d_model"]:
    """Return the cells of a grid as a sequence, row by row.

    >>> flatten(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).tolist()
    [[[1.0], [2.0], [3.0], [4.0]]]
    """
    return grid.flatten(2).transpose(1, 2)


def queries(
    here: Scope, batch: int
) -> tuple[Float[Tensor, "{batch} query d_model"], Float[Tensor, "{batch} query d_model"]]:
    """Return the queries' content, which is nothing yet, and their learned positions, equal for every image."""
    position = here.record("position", here["position"].expand(batch, -1, -1))
    return torch.zeros_like(position), position


def heads(here: Scope, hidden: Float[Tensor, "layer batch query d_model"]) -> Predictions:
    """Return class logits and boxes of every layer, all read with the same weights."""
    every_logits, every_boxes = [], []
    for layer, content in enumerate(hidden):
        logits = linear(content, here["category.weight"], here["category.bias"])
        boxes = box_head(here.inside("box"), content)
        every_logits.append(here.inside(layer).record("logits", logits))
        every_boxes.append(here.inside(layer).record("boxes_cxcywh", boxes))
    return Predictions(logits=torch.stack(every_logits), boxes_cxcywh=torch.stack(every_boxes))


def box_head(here: Scope, content: Float[Tensor, "batch query d_model"]) -> Float[Tensor, "batch query 4"]:
    """Return centre and size as fractions of the picture: three linear layers and a sigmoid."""
    x = relu(linear(content, here["layers.0.weight"], here["layers.0.bias"]))
    x = relu(linear(x, here["layers.1.weight"], here["layers.1.bias"]))
    return sigmoid(linear(x, here["output.weight"], here["output.bias"]))
