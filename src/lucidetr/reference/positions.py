"""Where a token lies in its picture, as a vector (DETR, A.4; Vaswani et al. 2017, section 3.5).

Attention sees a set: without this, a picture and the same picture shuffled would be one to it.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TEMPERATURE = 10_000.0
FASTEST = 32.0  # waves over the picture: two cells a wave on a grid of 64


def shrink_padding(
    padding: Bool[Tensor, "batch height width"], grid_h: int, grid_w: int
) -> Bool[Tensor, "batch grid_h grid_w"]:
    """Return which cells of the grid are padding: cell i looks at pixel ⌊i · height / grid_h⌋.

    >>> shrink_padding(torch.tensor([[[False, False, False, False, True, True]]]), 1, 3).tolist()
    [[[False, False, True]]]
    """
    _, height, width = padding.shape
    row = torch.arange(grid_h, device=padding.device) * height // grid_h
    column = torch.arange(grid_w, device=padding.device) * width // grid_w
    return padding[:, row[:, None], column[None, :]]


def sine_position(
    padding: Bool[Tensor, "batch grid_h grid_w"], d_model: int, dtype: torch.dtype
) -> Float[Tensor, "batch d_model grid_h grid_w"]:
    """Return the waves of the row in the first half of the channels, those of the column in the second.

    >>> sine_position(torch.zeros(1, 1, 2, dtype=torch.bool), 4, torch.float64)[0, 2, 0].round(decimals=3).tolist()
    [0.0, -0.0]

    The third channel is the sine of the column's angle: π in the first of two columns, 2π in the last.
    """
    inside = (~padding).to(dtype)
    row = angle(inside.cumsum(dim=1), inside.sum(dim=1, keepdim=True))
    column = angle(inside.cumsum(dim=2), inside.sum(dim=2, keepdim=True))
    return torch.cat([waves(row, d_model // 2), waves(column, d_model // 2)], dim=1)


def angle(
    number: Float[Tensor, "batch grid_h grid_w"], last: Float[Tensor, "batch _ _"]
) -> Float[Tensor, "batch grid_h grid_w"]:
    """Return cell number 1…last stretched to an angle of at most 2π; the small term keeps 0/0 out."""
    return number / (last + 1e-6) * 2 * math.pi


def waves(
    angle: Float[Tensor, "batch grid_h grid_w"], channels: int
) -> Float[Tensor, "batch {channels} grid_h grid_w"]:
    """Return sin and cos of the angle in turn, each pair of channels slower than the one before.

    Channels 2i and 2i + 1 hold sin and cos of angle / 10000^(2i / channels): the hands of a row of clocks.

    >>> waves(torch.full((1, 1, 1), math.pi / 2, dtype=torch.float64), 4).flatten().round(decimals=3).tolist()
    [1.0, 0.0, 0.016, 1.0]
    """
    values = []
    for i in range(channels // 2):
        slower = angle / TEMPERATURE ** (2 * i / channels)
        values += [torch.sin(slower), torch.cos(slower)]
    return torch.stack(values, dim=1)


def learned_position(
    row: Float[Tensor, "table half"], column: Float[Tensor, "table half"], batch: int, grid_h: int, grid_w: int
) -> Float[Tensor, "{batch} d_model {grid_h} {grid_w}"]:
    """Return a learned vector for the cell's column, followed by one for its row: the other way round than in waves.

    >>> row, column = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])
    >>> learned_position(row, column, batch=1, grid_h=2, grid_w=1).tolist()
    [[[[10.0], [10.0]], [[1.0], [2.0]]]]
    """
    if max(grid_h, grid_w) > len(row):
        raise ValueError(f"a grid of {grid_h} × {grid_w} is larger than the learned position table of {len(row)}")
    i = torch.arange(grid_h, device=row.device)[:, None].expand(grid_h, grid_w)
    j = torch.arange(grid_w, device=row.device)[None, :].expand(grid_h, grid_w)
    position = torch.cat([column[j], row[i]], dim=-1)
    return position.permute(2, 0, 1).expand(batch, -1, -1, -1)


def cell_centres(
    padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
) -> tuple[Float[Tensor, "batch grid_h"], Float[Tensor, "batch grid_w"]]:
    """Return where the middle of each row and of each column lies, as fractions of the unpadded picture.

    Padding lies to the right and below, so the first column tells how many rows a picture has, and the first row
    how many columns. Rows and columns of padding go on beyond 1.

    >>> rows, columns = cell_centres(torch.tensor([[[False, False, True]]]), torch.float32)
    >>> rows.tolist(), columns.tolist()  # one row; two columns and one of padding
    ([[0.5]], [[0.25, 0.75, 1.25]])
    """
    inside = (~padding).to(dtype)
    _, grid_h, grid_w = padding.shape
    rows = torch.arange(grid_h, dtype=dtype, device=padding.device) + 0.5
    columns = torch.arange(grid_w, dtype=dtype, device=padding.device) + 0.5
    return rows / inside[:, :, 0].sum(dim=1, keepdim=True), columns / inside[:, 0, :].sum(dim=1, keepdim=True)


def octave_waves(place: Float[Tensor, "*any"], frequencies: int) -> Float[Tensor, "*any channel"]:
    """Return sin and cos of 2π f · place in turn, for frequencies f from 1 to 32, evenly spaced in their logarithm.

    The slowest hand goes round once from edge to edge of the picture, the fastest 32 times: as fine as a cell.

    >>> octave_waves(torch.tensor(0.25, dtype=torch.float64), 2).round(decimals=3).tolist()  # f = 1 and f = 32
    [1.0, 0.0, -0.0, 1.0]
    """
    values = []
    for k in range(frequencies):
        frequency = FASTEST ** (k / max(frequencies - 1, 1))
        angle = 2 * math.pi * frequency * place
        values += [torch.sin(angle), torch.cos(angle)]
    return torch.stack(values, dim=-1)


def octave_position(
    padding: Bool[Tensor, "batch grid_h grid_w"], d_model: int, dtype: torch.dtype
) -> Float[Tensor, "batch {d_model} grid_h grid_w"]:
    """Return the waves of the cell's row in the first half of the channels, those of its column in the second.

    >>> position = octave_position(torch.zeros(1, 2, 1, dtype=torch.bool), 4, torch.float64)
    >>> position[0, :, :, 0].round(decimals=3).tolist()  # rows at ¼ and ¾, their only column at ½
    [[1.0, -1.0], [0.0, -0.0], [0.0, 0.0], [-1.0, -1.0]]
    """
    _, grid_h, grid_w = padding.shape
    rows, columns = cell_centres(padding, dtype)
    by_row = octave_waves(rows, d_model // 4)[:, :, None, :].expand(-1, -1, grid_w, -1)
    by_column = octave_waves(columns, d_model // 4)[:, None, :, :].expand(-1, grid_h, -1, -1)
    return torch.cat([by_row, by_column], dim=-1).permute(0, 3, 1, 2)
