"""What the decoder reads: the tokens of each image, and where each token lies."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lucidetr.layers.box_bias import Grid


@dataclass(frozen=True, eq=False)
class Memory:
    """Hold the encoder's output with everything that attention needs to know about its tokens.

    `keys` are the tokens with their positions, added once for all decoder layers.
    """

    tokens: Float[Tensor, "batch token d_model"]
    keys: Float[Tensor, "batch token d_model"]
    padding: Bool[Tensor, "batch token"]
    grid: Grid


def flatten(grid: Float[Tensor, "batch d_model grid_h grid_w"]) -> Float[Tensor, "batch token d_model"]:
    """Return the cells of a grid as a sequence, row by row."""
    return grid.flatten(2).transpose(1, 2)


def shrink_padding(
    padding: Bool[Tensor, "batch height width"], grid_h: int, grid_w: int
) -> Bool[Tensor, "batch grid_h grid_w"]:
    """Return which cells of the feature grid are padding: those whose first pixel is."""
    height, width = padding.shape[-2:]
    rows = torch.arange(grid_h, device=padding.device) * height // grid_h
    columns = torch.arange(grid_w, device=padding.device) * width // grid_w
    return padding[:, rows][:, :, columns]
