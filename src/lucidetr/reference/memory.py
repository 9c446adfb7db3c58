"""From the backbone's maps to the memory that queries read: encoder, then finer maps (DETR, A.3; Lin et al. 2017)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lucidetr.reference.backbone import norm_of_kind
from lucidetr.reference.convolution import convolution
from lucidetr.reference.elementary import relu
from lucidetr.reference.norms import per_channel
from lucidetr.reference.positions import learned_position, octave_position, shrink_padding, sine_position
from lucidetr.reference.scope import Scope
from lucidetr.reference.transformer import Memory, encoder


def remember(
    here: Scope, maps: Sequence[Float[Tensor, "batch _ _ _"]], padding: Bool[Tensor, "batch height width"]
) -> Memory:
    """Return what is known of the picture: the coarsest map through the encoder, fused into finer ones if told so.

    Where a token lies is added to it at every attention, or once, on its way into the encoder, and never again.
    """
    features = here.record("projection", project(here.inside("projection"), maps[-1]))
    grid_padding = here.record("padding", shrink_padding(padding, *features.shape[-2:]))
    position = flatten(here.record("position", positions(here.inside("position"), grid_padding, features.dtype)))
    tokens = here.record("tokens", flatten(features))
    once = here.config.position_at == "input"
    if once:
        tokens, position = tokens + position, torch.zeros_like(position)
    tokens = encoder(here.inside("encoder"), tokens, position, grid_padding.flatten(1))
    if here.config.fused:
        log = here.inside("fusion")
        coarse = here.record("coarse", unflatten(tokens, *features.shape[-2:]))
        fine = fuse(log, coarse, maps)
        grid_padding = log.record("padding", shrink_padding(padding, *fine.shape[-2:]))
        tokens = flatten(fine)
        if once:
            position = torch.zeros_like(tokens)
        else:
            position = flatten(log.record("position", positions(here.inside("position"), grid_padding, fine.dtype)))
    return Memory(here.record("memory", tokens), position, grid_padding)


def project(here: Scope, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch outputs h w"]:
    """Return the features in the transformer's width: a 1 × 1 convolution with a bias."""
    return convolution(x, here["weight"]) + per_channel(here["bias"])


def positions(
    here: Scope, padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
) -> Float[Tensor, "batch d_model grid_h grid_w"]:
    """Return the position of every cell, in waves or as learned, or zeros: one place as good as another."""
    if here.config.position == "sine":
        return sine_position(padding, here.config.d_model, dtype)
    if here.config.position == "octaves":
        return octave_position(padding, here.config.d_model, dtype)
    batch, grid_h, grid_w = padding.shape
    if here.config.position == "none":
        return torch.zeros(batch, here.config.d_model, grid_h, grid_w, dtype=dtype, device=padding.device)
    return learned_position(here["row"], here["column"], batch, grid_h, grid_w)


def flatten(grid: Float[Tensor, "batch d_model grid_h grid_w"]) -> Float[Tensor, "batch token d_model"]:
    """Return the cells of a grid as a sequence, row by row.

    >>> flatten(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).tolist()
    [[[1.0], [2.0], [3.0], [4.0]]]
    """
    return grid.flatten(2).transpose(1, 2)


def unflatten(
    tokens: Float[Tensor, "batch token d_model"], grid_h: int, grid_w: int
) -> Float[Tensor, "batch d_model {grid_h} {grid_w}"]:
    """Return a sequence as the grid it was read from.

    >>> grid = torch.arange(24.0).view(1, 2, 3, 4)
    >>> bool((unflatten(flatten(grid), 3, 4) == grid).all())
    True
    """
    batch, _, d_model = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, d_model, grid_h, grid_w)


def fuse(
    here: Scope, coarse: Float[Tensor, "batch d_model h w"], maps: Sequence[Float[Tensor, "batch _ _ _"]]
) -> Float[Tensor, "batch d_model h2 w2"]:
    """Return the finest of the fused maps: what the coarse one knows of the whole, where the finer one sees it.

    (A feature pyramid's way down: Lin et al. 2017, figure 3.) Step by step: the finer map in the transformer's
    width, plus the coarse one enlarged, smoothed by a 3 × 3 convolution that is normed and cut at 0.
    """
    kind = "group" if here.config.backbone.norm == "frozen_batch" else here.config.backbone.norm
    for index, stride in enumerate(here.config.fused):
        place = here.inside(index)
        finer = maps[here.config.backbone.strides.index(stride)]
        lateral = place.record("lateral", project(place.inside("lateral"), finer))
        up = place.record("up", enlarge(coarse, *finer.shape[-2:]))
        smooth = convolution(lateral + up, place["smooth.weight"])
        coarse = place.record("output", relu(norm_of_kind(place.inside("norm"), smooth, kind)))
    return coarse


def enlarge(x: Float[Tensor, "batch channel h w"], h2: int, w2: int) -> Float[Tensor, "batch channel {h2} {w2}"]:
    """Return the map on a finer grid: cell i takes the value of cell ⌊i · coarse / fine⌋.

    >>> enlarge(torch.tensor([[[[1.0, 2.0]]]]), 1, 5).tolist()
    [[[[1.0, 1.0, 1.0, 2.0, 2.0]]]]
    """
    _, _, h, w = x.shape
    row = torch.arange(h2, device=x.device) * h // h2
    column = torch.arange(w2, device=x.device) * w // w2
    return x[:, :, row[:, None], column[None, :]]
