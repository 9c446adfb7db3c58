"""Norms of convolutional features: frozen batch, batch, group; and how a fixed norm is folded into a convolution."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenBatchNorm2d(nn.Module):
    """Apply a batch norm whose statistics, scale and shift never change (DETR, A.4).

    All four are buffers: they are saved, and neither the optimiser nor the statistics of small batches change what
    pretraining measured.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """Return (x − mean) / √(variance + eps) · weight + bias as one multiplication and one sum."""
        scale, shift = scale_and_shift(self)
        return x * scale[:, None, None] + shift[:, None, None]


def scale_and_shift(
    norm: FrozenBatchNorm2d | nn.BatchNorm2d,
) -> tuple[Float[Tensor, " channel"], Float[Tensor, " channel"]]:
    """Return the factor and the offset of a batch norm with fixed statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def normed(
    convolution: nn.Conv2d, norm: nn.Module, x: Float[Tensor, "batch channel h w"]
) -> Float[Tensor, "batch outputs h2 w2"]:
    """Return norm(convolution(x)); in training a frozen norm scales the few weights instead of the many features.

    That saves one pass over the features, forward and backward, and the weights get the same gradient. In evaluation
    the order is that of published models, so rounding is the same; `fold` makes evaluation fast.
    """
    if not (norm.training and isinstance(norm, FrozenBatchNorm2d)):
        return norm(convolution(x))
    scale, shift = scale_and_shift(norm)
    weight = convolution.weight * scale[:, None, None, None]
    settings = convolution.stride, convolution.padding, convolution.dilation
    return F.conv2d(x, weight, shift, *settings)


@torch.no_grad()
def fold(convolution: nn.Conv2d, norm: FrozenBatchNorm2d | nn.BatchNorm2d) -> None:
    """Fold a batch norm into the convolution before it, in place; the norm itself is then no longer needed."""
    scale, shift = scale_and_shift(norm)
    convolution.weight.mul_(scale[:, None, None, None])
    convolution.bias = nn.Parameter(shift, requires_grad=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of 32 groups, or as many as divide the channels and hold at least two each (Wu & He 2018).

    >>> [group_norm(channels).num_groups for channels in (2048, 32, 144)]
    [32, 16, 24]
    """
    groups = next(groups for groups in range(min(32, max(channels // 2, 1)), 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_batch": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "group": group_norm,
}
