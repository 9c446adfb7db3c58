"""Dropout (Srivastava et al. 2014), with coins that cost a CPU less.

torch draws a number for every value, on one thread: a fifth of a training step of the paper's model. Here a draw of 64
bits serves four values.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NUMBERS = 2**16  # that 16 bits can be


class Dropout(nn.Module):
    """Set each value to 0 with probability `rate` in training, and enlarge the others so that the mean stays."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return what is left of x."""
        return dropout(x, self.rate) if self.training else x


def dropout(x: Float[Tensor, "*any"], rate: float) -> Float[Tensor, "*any"]:
    """Return x with each value set to 0 with that probability, the others enlarged so that the mean stays."""
    if rate == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    return x * factors(x, rate)


@torch.no_grad()
def factors(x: Float[Tensor, "*any"], rate: float) -> Float[Tensor, "*any"]:
    """Return for each value of x 0 or what enlarges it, of x's type and laid out as x is.

    1 / (1 − rate) is rounded to that type, 0.9984 of it in bfloat16, and the rate follows, so that the mean is x's.
    """
    kept = torch.empty_like(x)
    enlarged = torch.tensor(1 / (1 - rate), dtype=x.dtype).item()
    lost = round((1 - 1 / enlarged) * NUMBERS)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    coins = draws.view(torch.int16)[: x.numel()].view(x.shape)  # from −32768 on
    return torch.ge(coins, lost - NUMBERS // 2, out=kept).mul_(enlarged)  # 1 where kept, in x's type at once
