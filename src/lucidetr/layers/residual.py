"""The residual paths: where the sum is taken and where the norm stands, for encoder and decoder alike.

post_norm     x → norm(x + part(x))    the paper (Vaswani et al. 2017)
pre_norm      x → x + part(norm(x))    the sum itself is never normed, so gradients pass unchanged
no_norm       x → x + part(x)          for blocks whose only norm is elsewhere
no_residual   x → norm(part(x))        the input is not added
no_part       x → x                    for layers without the part
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from lucidetr.layers.dropout import Dropout

Part = Callable[[Tensor], Tensor]


class PostNorm(nn.Module):
    """Add the part's output to its input, then norm the sum."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return norm(x + part(x))."""
        return self.norm(x + self.dropout(part(x)))


class PreNorm(nn.Module):
    """Norm the part's input; the sum stays as it is."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return x + part(norm(x))."""
        return x + self.dropout(part(self.norm(x)))


class NoNorm(nn.Module):
    """Add the part's output to its input, nothing else."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return x + part(x)."""
        return x + self.dropout(part(x))


class NoResidual(nn.Module):
    """Norm the part's output alone; the input is not added."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return norm(part(x))."""
        return self.norm(self.dropout(part(x)))


class NoPart(nn.Module):
    """Return the input: there is no part."""

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return x."""
        return x


class SamePath(nn.Module):
    """Reuse another path, its norm included, for a second part."""

    def __init__(self, path: nn.Module):
        super().__init__()
        self.path = (path,)  # in a tuple, so that the norm is in the state dict once, under the first path's name

    def forward(self, x: Float[Tensor, "batch token d_model"], part: Part) -> Float[Tensor, "batch token d_model"]:
        """Return the other path's result for x and this part."""
        return self.path[0](x, part)
