"""The residual paths: where the sum is taken and where the norm stands, written once for every block.

post_norm     x → norm(x + part(x))    the paper (Vaswani et al. 2017)
pre_norm      x → x + part(norm(x))    the stream itself is never normed, so gradients pass unchanged
no_norm       x → x + part(x)          for blocks that norm once, elsewhere
no_residual   x → norm(part(x))        nothing of the input is left but what the part makes of it
no_part       x → x                    for layers that lack the part
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

Part = Callable[[Tensor], Tensor]


class PostNorm(nn.Module):
    """Add the part's output to its input, then norm the sum."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return norm(x + part(x))."""
        return self.norm(x + self.dropout(part(x)))


class PreNorm(nn.Module):
    """Norm only what the part sees; the sum stays as it is."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return x + part(norm(x))."""
        return x + self.dropout(part(self.norm(x)))


class NoNorm(nn.Module):
    """Add the part's output to its input, nothing else."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return x + part(x)."""
        return x + self.dropout(part(x))


class NoResidual(nn.Module):
    """Norm the part's output alone; the input is not added."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return norm(part(x))."""
        return self.norm(self.dropout(part(x)))


class NoPart(nn.Module):
    """Pass the input by a part that is not there."""

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return x."""
        return x


class SamePath(nn.Module):
    """Take another part along a path that already serves one: two sums, one norm."""

    def __init__(self, path: nn.Module):
        super().__init__()
        self.path = (path,)  # a tuple is not looked into: the norm has one name in the state, that of its first use

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return what the other path makes of x and this part."""
        return self.path[0](x, part)
