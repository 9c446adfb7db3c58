"""2-D position encodings: where a token lies in its picture (DETR, A.4; Parmar et al. 2018).

Half of the channels encode the row, half the column. Waves are relative to the picture without its padding.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.errors import InputError
from lucidetr.layers.feed_forward import TwoLayers

MOST_WAVES = 32.0
TEMPERATURE = 10_000.0  # the longest sine wave is nearly this many times the shortest (Vaswani et al. 2017, 3.5)


def cell_centres(
    padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
) -> tuple[Float[Tensor, "batch grid_h"], Float[Tensor, "batch grid_w"]]:
    """Return the centre of every row and column, as a fraction of the picture without its padding.

    Exact only where the stride divides the picture's side; otherwise the last cell reaches past the edge.

    >>> rows, columns = cell_centres(torch.tensor([[[False, False, True]]]), torch.float32)
    >>> rows.tolist(), columns.tolist()
    ([[0.5]], [[0.25, 0.75, 1.25]])
    """
    _, grid_h, grid_w = padding.shape
    inside = (~padding).to(dtype)
    row = torch.arange(grid_h, device=padding.device, dtype=dtype) + 0.5
    column = torch.arange(grid_w, device=padding.device, dtype=dtype) + 0.5
    return row / inside[:, :, 0].sum(1, keepdim=True), column / inside[:, 0].sum(1, keepdim=True)


def octaves(fraction: Float[Tensor, "*any"], number: int) -> Float[Tensor, "*any waves"]:
    """Return sin and cos, alternating, of `number` waves with 1 to 32 periods between 0 and 1.

    >>> octaves(torch.tensor(0.25), 2).round(decimals=3).abs().tolist()  # a quarter of one period, 8 whole periods
    [1.0, 0.0, 0.0, 1.0]
    """
    exponent = torch.arange(number, device=fraction.device, dtype=fraction.dtype) / max(number - 1, 1)
    phase = 2 * math.pi * fraction[..., None] * MOST_WAVES**exponent
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)


class OctavePosition(nn.Module):
    """Encode each coordinate of a cell's centre in waves from the picture's side down to a 32nd of it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.number = config.d_model // 4

    def forward(
        self, padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
    ) -> Float[Tensor, "batch d_model grid_h grid_w"]:
        """Return the encoding of every cell, rows in the first half of the channels, columns in the second."""
        _, grid_h, grid_w = padding.shape
        rows, columns = (octaves(centres, self.number) for centres in cell_centres(padding, dtype))
        row = rows[:, :, None].expand(-1, -1, grid_w, -1)
        column = columns[:, None].expand(-1, grid_h, -1, -1)
        return torch.cat([row, column], dim=-1).permute(0, 3, 1, 2)


class BoxPosition(TwoLayers):
    """Encode a query's box: octaves of its four numbers through two linear layers (Liu et al. 2022, DAB-DETR)."""

    def __init__(self, d_model: int):
        number = max(d_model // 8, 1)
        super().__init__(8 * number, d_model, d_model)
        self.number = number

    def forward(self, x: Float[Tensor, "batch query 4"]) -> Float[Tensor, "batch query d_model"]:
        """Return the position that self- and cross-attention add to the queries of these boxes_cxcywh."""
        return super().forward(octaves(x, self.number).flatten(-2))


class SinePosition(nn.Module):
    """Encode each coordinate, stretched to 0…2π over the unpadded picture, in sines and cosines."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.channels = config.d_model // 2  # for each of the two axes

    def forward(
        self, padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
    ) -> Float[Tensor, "batch d_model grid_h grid_w"]:
        """Return the encoding of every cell, rows in the first half of the channels, columns in the second."""
        inside = (~padding).to(dtype)
        row = inside.cumsum(1)
        column = inside.cumsum(2)
        row = row / (row[:, -1:, :] + 1e-6) * 2 * math.pi
        column = column / (column[:, :, -1:] + 1e-6) * 2 * math.pi
        return torch.cat([self.waves(row), self.waves(column)], dim=1)

    def waves(self, angle: Float[Tensor, "batch grid_h grid_w"]) -> Float[Tensor, "batch half grid_h grid_w"]:
        """Return sin and cos, alternating, of the angle divided by growing wavelengths."""
        pair = torch.arange(0, self.channels, 2, device=angle.device, dtype=angle.dtype)
        phase = angle[:, None] / (TEMPERATURE ** (pair / self.channels))[:, None, None]
        return torch.stack([phase.sin(), phase.cos()], dim=2).flatten(1, 2)


class NoPosition(nn.Module):
    """Encode nothing: zero everywhere, so that tokens are an unordered set."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.d_model = config.d_model

    def forward(
        self, padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
    ) -> Float[Tensor, "batch d_model grid_h grid_w"]:
        """Return zeros."""
        batch, grid_h, grid_w = padding.shape
        return torch.zeros(batch, self.d_model, grid_h, grid_w, dtype=dtype, device=padding.device)


class LearnedPosition(nn.Module):
    """Learn one vector for each row and one for each column of the grid.

    Padding lies to the right of and below the picture, so a cell of the picture has the same row and column
    in every batch.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.row = nn.Parameter(torch.rand(config.position_table, config.d_model // 2))
        self.column = nn.Parameter(torch.rand(config.position_table, config.d_model // 2))

    def forward(
        self, padding: Bool[Tensor, "batch grid_h grid_w"], dtype: torch.dtype
    ) -> Float[Tensor, "batch d_model grid_h grid_w"]:
        """Return the encoding of every cell, columns in the first half of the channels, rows in the second.

        That is the order of published weights; the sines and octaves have rows first.
        """
        batch, grid_h, grid_w = padding.shape
        if max(grid_h, grid_w) > len(self.row):
            raise InputError(
                f"a grid of {grid_h} × {grid_w} is larger than the learned position table of {len(self.row)}: "
                f"set model.position_table to at least {max(grid_h, grid_w)}, or model.position to sine"
            )
        row = self.row[:grid_h, None].expand(-1, grid_w, -1)
        column = self.column[None, :grid_w].expand(grid_h, -1, -1)
        return torch.cat([column, row], dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1).to(dtype)


class AtAttention(nn.Module):
    """Hand positions to every attention, where they are added to queries and keys, never to values (the paper)."""

    def enter(
        self, tokens: Float[Tensor, "batch token d_model"], position: Float[Tensor, "batch token d_model"]
    ) -> tuple[Float[Tensor, "batch token d_model"], Float[Tensor, "batch token d_model"]]:
        """Return the tokens that enter the encoder, and what its layers add to queries and keys."""
        return tokens, position

    def keys(
        self, tokens: Float[Tensor, "batch token d_model"], position: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token d_model"]:
        """Return the keys that the decoder compares its queries with."""
        return tokens + position


class AtInput(AtAttention):
    """Add positions once, to the tokens that enter the encoder (Vaswani et al. 2017, section 3.5).

    So values carry them, too.
    """

    def enter(
        self, tokens: Float[Tensor, "batch token d_model"], position: Float[Tensor, "batch token d_model"]
    ) -> tuple[Float[Tensor, "batch token d_model"], Float[Tensor, "batch token d_model"]]:
        """Return the tokens with positions added, and zeros for the layers to add."""
        return tokens + position, torch.zeros_like(position)

    def keys(
        self, tokens: Float[Tensor, "batch token d_model"], position: Float[Tensor, "batch token d_model"]
    ) -> Float[Tensor, "batch token d_model"]:
        """Return the tokens as they are."""
        return tokens
