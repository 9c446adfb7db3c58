"""The whole network: images in, a set of boxes and classes out (DETR, section 3.2 and figure 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lucidetr.config import ModelConfig
from lucidetr.reference.backbone import backbone
from lucidetr.reference.heads import absolute_boxes
from lucidetr.reference.memory import remember
from lucidetr.reference.queries import hinted, queries, side_by_side
from lucidetr.reference.refinement import moved_boxes
from lucidetr.reference.scope import Scope
from lucidetr.reference.trace import Keep, Trace
from lucidetr.reference.transformer import decoder
from lucidetr.structures import Hints, Predictions


def forward(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    images: Float[Tensor, "batch 3 height width"],
    padding: Bool[Tensor, "batch height width"],
    *,
    hints: Hints | None = None,
    training: bool = False,
    generator: torch.Generator | None = None,
    keep: Keep = None,
) -> tuple[Predictions, Trace]:
    """Return the predictions after every decoder layer, and the trace of every value on the way.

    `state` maps the names of the fast model's state_dict to tensors, of one dtype; gradients flow to those that
    ask for them. Images are normalised and zero where `padding` is True. When training, dropout draws from
    `generator`, and batch norm measures its own statistics and moves the running ones in `state`, in place.

    Groups of queries are layers of their own: first the proposals of each, then what each says after each layer.
    Where the config knows denoising, `hints` are one more group, ahead of the others. When training, `tokens` is what
    all tokens say, where they are taught.
    """
    trace = Trace(keep)
    here = Scope(state, config, trace, training, generator)
    maps = backbone(here.inside("backbone"), images)
    return predictions_of(here, maps, padding, hints), trace


def forward_from_maps(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    maps: Sequence[Float[Tensor, "batch _ _ _"]],
    padding: Bool[Tensor, "batch height width"],
    keep: Keep = None,
) -> tuple[Predictions, Trace]:
    """Return the same from a backbone's maps, fine to coarse, whoever made them, when predicting."""
    trace = Trace(keep)
    return predictions_of(Scope(state, config, trace), maps, padding), trace


def predictions_of(
    here: Scope,
    maps: Sequence[Float[Tensor, "batch _ _ _"]],
    padding: Bool[Tensor, "batch height width"],
    hints: Hints | None = None,
) -> Predictions:
    """Return what the network says of a backbone's maps; `here` is the whole network."""
    here.record("backbone", maps[-1])
    memory = remember(here, maps, padding)
    start = own = queries(here.inside("queries"), memory)
    if hints is not None and here.config.denoising > 0:
        number = own.content.shape[1] // own.groups  # fewer than the config says where a picture has few tokens
        start = side_by_side([hinted(here.inside("hints"), hints, number), own])
    if start.boxes_cxcywh is None:
        assert start.position is not None
        hidden = decoder(here.inside("decoder"), start.content, start.position, memory, start.groups)
        predictions = absolute_boxes(here.inside("heads"), hidden)
    else:
        predictions = moved_boxes(here, start, start.boxes_cxcywh, memory)
    predictions = groups_as_layers(predictions, start.groups)
    if own.proposals is not None:
        predictions = replace(
            stacked(groups_as_layers(own.proposals, own.groups), predictions), tokens=own.proposals.tokens
        )
    return predictions


def stacked(first: Predictions, rest: Predictions) -> Predictions:
    """Return the layers of both, one after the other."""
    return Predictions(
        logits=torch.cat([first.logits, rest.logits]),
        boxes_cxcywh=torch.cat([first.boxes_cxcywh, rest.boxes_cxcywh]),
    )


def groups_as_layers(predictions: Predictions, groups: int) -> Predictions:
    """Return the groups of queries as layers of their own, so that each is matched by itself.

    Row layer · groups + group holds what a group says after a layer.

    >>> logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)  # one layer, one image, two groups of two
    >>> said = groups_as_layers(Predictions(logits=logits, boxes_cxcywh=torch.zeros(1, 1, 4, 4)), groups=2)
    >>> said.logits.tolist()
    [[[[1.0], [2.0]]], [[[3.0], [4.0]]]]
    """

    def apart(x: Tensor) -> Tensor:
        """Return the groups along the first axis instead of the third."""
        layers, images, queries, width = x.shape
        x = x.reshape(layers, images, groups, queries // groups, width)
        return x.transpose(1, 2).reshape(layers * groups, images, queries // groups, width)

    return Predictions(logits=apart(predictions.logits), boxes_cxcywh=apart(predictions.boxes_cxcywh))
