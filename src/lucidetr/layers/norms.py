"""Norms of convolutional features: frozen batch, batch, group."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """Apply a batch norm whose statistics, scale and shift never change (DETR, A.4).

    All four are buffers, so they are saved, and neither the optimiser nor the statistics of small batches of
    large images can touch what pretraining measured.
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
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of 32 groups, fewer where they would not divide the channels or hold one each (Wu & He 2018).

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
