"""A bias on the scores of cross-attention, computed from each query's box; attention itself stays dense.

Both kinds are the sum of a term for the row and a term for the column, so no network runs over every cell of every
query.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lucidetr.layers.feed_forward import TwoLayers

SMALLEST_WIDTH = 0.02  # of the picture: no bell is narrower than about a cell
LARGEST_LOG = 3.0
RPB_HIDDEN = 64
FENCE = 40.0  # by how much scores fall at the start from a side of the box to a place a whole picture away


@dataclass(frozen=True, eq=False)
class Grid:
    """Hold the centre of every row and column of a grid, as fractions of each image."""

    rows: Float[Tensor, "batch grid_h"]
    columns: Float[Tensor, "batch grid_w"]

    def centres(self) -> Float[Tensor, "batch token 2"]:
        """Return x and y of every cell's centre, row by row."""
        x = self.columns[:, None, :].expand(-1, self.rows.shape[1], -1)
        y = self.rows[:, :, None].expand(-1, -1, self.columns.shape[1])
        return torch.stack([x, y], dim=-1).flatten(1, 2)


def over_the_grid(
    row: Float[Tensor, "batch head query grid_h"], column: Float[Tensor, "batch head query grid_w"]
) -> Float[Tensor, "batch head query token"]:
    """Return the sum of a row's and a column's term for every cell, row by row."""
    return (row[..., :, None] + column[..., None, :]).flatten(-2)


class NoBias(nn.Module):
    """Add nothing to the scores: the paper's attention knows content and position alone."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()

    def forward(self, content: Tensor, boxes_cxcywh: Tensor | None, grid: Grid) -> None:
        """Return None."""
        return


class GaussianBias(nn.Module):
    """Give each head a Gaussian bell whose centre and widths the query predicts, in units of its box.

    (Gao et al. 2021, SMCA; here separable and relative to the box.) At the start the bells lie half way
    from the box's centre to its edges, each head's in another direction.
    """

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.shape = nn.Linear(d_model, num_heads * 4)
        nn.init.zeros_(self.shape.weight)
        angle = 2 * math.pi * torch.arange(num_heads) / num_heads
        start = torch.stack([0.25 * angle.cos(), 0.25 * angle.sin(), 0 * angle, 0 * angle], dim=-1)
        self.shape.bias.data.copy_(start.flatten())

    def forward(
        self,
        content: Float[Tensor, "batch query d_model"],
        boxes_cxcywh: Float[Tensor, "batch query 4"],
        grid: Grid,
    ) -> Float[Tensor, "batch head query token"]:
        """Return −½ (distance / width)² of every cell, along x plus along y."""
        shape = self.shape(content).to(boxes_cxcywh.dtype).unflatten(-1, (self.num_heads, 4))
        centre, size = boxes_cxcywh[:, :, None, :2], boxes_cxcywh[:, :, None, 2:]
        middle = (centre + shape[..., :2] * size).transpose(1, 2)
        width = shape[..., 2:].clamp(-LARGEST_LOG, LARGEST_LOG).exp() * size + SMALLEST_WIDTH
        width = width.transpose(1, 2)
        x = (grid.columns[:, None, None] - middle[..., :1]) / width[..., :1]
        y = (grid.rows[:, None, None] - middle[..., 1:]) / width[..., 1:]
        return over_the_grid(-0.5 * y.square(), -0.5 * x.square())


def along_one_axis(
    layers: TwoLayers,
    centre: Float[Tensor, "batch query"],
    size: Float[Tensor, "batch query"],
    places: Float[Tensor, "batch place"],
) -> Float[Tensor, "batch head query place"]:
    """Return the bias of each row (or column), computed by two layers from its distances to the box's two sides."""
    sides = torch.stack([centre - size / 2, centre + size / 2], dim=-1)
    distance = stretch(places[:, None, :, None] - sides[:, :, None, :])
    bias = layers(distance).permute(0, 3, 1, 2).to(centre.dtype)
    return bias.contiguous()  # with heads innermost, torch.export asks how large the picture is


def stretch(distance: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return distances on a scale that is fine near 0 and coarse far away.

    >>> stretch(torch.tensor([0.0, 0.875, -0.875])).tolist()  # log2(1 + 8 · 0.875) / log2(8)
    [0.0, 1.0, -1.0]
    """
    return distance.sign() * torch.log2(1 + 8 * distance.abs()) / 3


class SidesBias(nn.Module):
    """Learn a bias from the distances of a cell to the box's four sides (Lin et al. 2023, Plain DETR: BoxRPB).

    Plain DETR takes distances as they are and 512 hidden units; here they are stretched, and 64 are enough. At the
    start every head looks into the box: little speaks against a cell in it, the more the farther outside a cell lies.
    """

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.x = TwoLayers(2, RPB_HIDDEN, num_heads)
        self.y = TwoLayers(2, RPB_HIDDEN, num_heads)
        self.fence()

    @torch.no_grad()
    def fence(self) -> None:
        """Let two hidden units of each axis say how far outside of the box a cell lies, and count against it."""
        for layers in (self.x, self.y):
            layers.hidden.weight[:2] = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
            layers.hidden.bias[:2] = 0.0
            layers.output.weight[:, :2] = -FENCE

    def forward(
        self,
        content: Float[Tensor, "batch query d_model"],
        boxes_cxcywh: Float[Tensor, "batch query 4"],
        grid: Grid,
    ) -> Float[Tensor, "batch head query token"]:
        """Return the bias of every cell."""
        x, y, width, height = boxes_cxcywh.unbind(-1)
        return over_the_grid(
            along_one_axis(self.y, y, height, grid.rows), along_one_axis(self.x, x, width, grid.columns)
        )
