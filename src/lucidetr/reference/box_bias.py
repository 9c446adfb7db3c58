"""What cross-attention knows of a query's box: a number added to the score of every token.

Both kinds give every row of the grid a number and every column a number, and a token the sum of its two.
(A bell: SMCA, Gao et al. 2021. Distances to the sides: Plain DETR, Lin et al. 2023.)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.reference.elementary import linear, relu
from lucidetr.reference.positions import cell_centres
from lucidetr.reference.scope import Scope
from lucidetr.reference.transformer import Memory

NARROWEST = 0.02  # width of a bell around a box without width
MOST_GROWTH = 3.0  # a bell is at most e³ = 20 times as wide as its box, and at least a twentieth


def box_bias(
    here: Scope,
    boxes_cxcywh: Float[Tensor, "batch query 4"],
    memory: Memory,
    x: Float[Tensor, "batch query d_model"],
) -> Float[Tensor, "batch head query token"] | None:
    """Return what is added to the score of every head, query and token, or None where nothing is.

    `x` are the queries as cross-attention sees them, without their position.
    """
    if here.config.box_bias == "none":
        return None
    centres = cell_centres(memory.padding, x.dtype)
    inside = here.inside("box_bias")
    if here.config.box_bias == "gaussian":
        by_row, by_column = gaussian(inside, boxes_cxcywh, x, *centres)
    else:
        by_row, by_column = sides(inside, boxes_cxcywh, *centres)
    return here.record("box_bias", (by_row[..., :, None] + by_column[..., None, :]).flatten(-2))


def gaussian(
    here: Scope,
    boxes_cxcywh: Float[Tensor, "batch query 4"],
    x: Float[Tensor, "batch query d_model"],
    rows: Float[Tensor, "batch grid_h"],
    columns: Float[Tensor, "batch grid_w"],
) -> tuple[Float[Tensor, "batch head query grid_h"], Float[Tensor, "batch head query grid_w"]]:
    """Return a bell for each head, which the query shifts and widens in units of its box."""
    batch, queries, _ = x.shape
    shape = linear(x, here["shape.weight"], here["shape.bias"]).reshape(batch, queries, -1, 4)
    shift_x, shift_y, widen_x, widen_y = shape.permute(0, 2, 1, 3).unbind(-1)  # each: batch, head, query
    centre_x, centre_y, width, height = boxes_cxcywh[:, None].unbind(-1)  # each: batch, 1, query
    by_row = bell(rows, centre_y + shift_y * height, bell_width(height, widen_y))
    by_column = bell(columns, centre_x + shift_x * width, bell_width(width, widen_x))
    return here.record("y", by_row), here.record("x", by_column)


def bell_width(
    side: Float[Tensor, "batch 1 query"], widen: Float[Tensor, "batch head query"]
) -> Float[Tensor, "batch head query"]:
    """Return the bell's width: the side of the box, stretched by e^widen, and never nothing.

    >>> round(bell_width(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)).item(), 2)
    1.02
    """
    return torch.exp(widen.clamp(min=-MOST_GROWTH, max=MOST_GROWTH)) * side + NARROWEST


def bell(
    places: Float[Tensor, "batch place"],
    centre: Float[Tensor, "batch head query"],
    width: Float[Tensor, "batch head query"],
) -> Float[Tensor, "batch head query place"]:
    """Return −½ ((place − centre) / width)²: added to a score, it multiplies a weight by a bell of height 1.

    >>> one = torch.ones(1, 1, 1)
    >>> bell(torch.tensor([[1.0, 3.0]]), one, one).tolist()
    [[[[-0.0, -2.0]]]]
    """
    distance = places[:, None, None, :] - centre[..., None]
    return -0.5 * (distance / width[..., None]) ** 2


def sides(
    here: Scope,
    boxes_cxcywh: Float[Tensor, "batch query 4"],
    rows: Float[Tensor, "batch grid_h"],
    columns: Float[Tensor, "batch grid_w"],
) -> tuple[Float[Tensor, "batch head query grid_h"], Float[Tensor, "batch head query grid_w"]]:
    """Return a learned function of how far each row lies from top and bottom, each column from left and right."""
    centre_x, centre_y, width, height = boxes_cxcywh.unbind(-1)
    by_row = between(here.inside("y"), rows, centre_y - height / 2, centre_y + height / 2)
    by_column = between(here.inside("x"), columns, centre_x - width / 2, centre_x + width / 2)
    return here.record("y", by_row), here.record("x", by_column)


def between(
    here: Scope,
    places: Float[Tensor, "batch place"],
    low: Float[Tensor, "batch query"],
    high: Float[Tensor, "batch query"],
) -> Float[Tensor, "batch head query place"]:
    """Return what two linear layers make of the distances to two sides, a number for each head."""
    from_low = stretch(places[:, None, :] - low[..., None])
    from_high = stretch(places[:, None, :] - high[..., None])
    x = torch.stack([from_low, from_high], dim=-1)
    x = relu(linear(x, here["hidden.weight"], here["hidden.bias"]))
    return linear(x, here["output.weight"], here["output.bias"]).permute(0, 3, 1, 2)


def stretch(distance: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return the distance on a scale that is fine near 0 and coarse far away: ±log₂(1 + 8 |distance|) / 3.

    >>> stretch(torch.tensor([-0.875, 0.0, 0.125])).tolist()  # 1 + 8 · 7/8 is 8, and 1 + 8 · 1/8 is 2
    [-1.0, 0.0, 0.3333333432674408]
    """
    return torch.sign(distance) * torch.log2(1 + 8 * distance.abs()) / 3
