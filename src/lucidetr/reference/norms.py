"""Norms from mean and variance: batch, group, layer (Ioffe & Szegedy 2015; Wu & He 2018; Ba et al. 2016).

All three subtract a mean and divide by a standard deviation. They differ only in which values share one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-5  # keeps the division finite where all values are equal
MOMENTUM = 0.1  # how much of a new batch goes into the running statistics


def mean_and_variance(
    x: Float[Tensor, "*any"], axes: tuple[int, ...]
) -> tuple[Float[Tensor, "*any2"], Float[Tensor, "*any2"]]:
    """Return the mean, and the mean of the squared distances from it; the axes stay with length 1.

    >>> mean, variance = mean_and_variance(torch.tensor([[1.0, 3.0]]), axes=(1,))
    >>> mean.tolist(), variance.tolist()
    ([[2.0]], [[1.0]])
    """
    mean = x.mean(dim=axes, keepdim=True)
    return mean, ((x - mean) ** 2).mean(dim=axes, keepdim=True)


def standardise(x: Float[Tensor, "*any"], axes: tuple[int, ...]) -> Float[Tensor, "*any"]:
    """Return (x − mean) / √(variance + ε), the statistics taken over `axes`.

    >>> standardise(torch.tensor([[1.0, 3.0]]), axes=(1,)).round(decimals=3).tolist()
    [[-1.0, 1.0]]
    """
    mean, variance = mean_and_variance(x, axes)
    return (x - mean) / torch.sqrt(variance + EPS)


def per_channel(values: Float[Tensor, " channel"]) -> Float[Tensor, "channel 1 1"]:
    """Return one value per channel in the shape that meets a feature map."""
    return values[:, None, None]


def layer_norm(
    x: Float[Tensor, "*any d_model"], weight: Float[Tensor, " d_model"], bias: Float[Tensor, " d_model"]
) -> Float[Tensor, "*any d_model"]:
    """Return every token standardised over its own channels, then scaled and shifted.

    >>> layer_norm(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), torch.ones(2), torch.zeros(2)).round(decimals=3).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    return standardise(x, (-1,)) * weight + bias


def group_norm(
    x: Float[Tensor, "batch channel h w"], weight: Float[Tensor, " channel"], bias: Float[Tensor, " channel"]
) -> Float[Tensor, "batch channel h w"]:
    """Return every image standardised over the cells of 32 groups of neighbouring channels.

    Fewer groups where 32 would leave a channel alone (it would then lose its own mean, all that it says), or would
    not divide the channels.

    >>> x = torch.tensor([1.0, 3.0, 10.0, 30.0]).view(1, 4, 1, 1)  # four channels: two groups of two
    >>> group_norm(x, torch.ones(4), torch.zeros(4)).flatten().round(decimals=3).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """
    batch, channels, height, width = x.shape
    groups = max(count for count in range(1, min(32, max(channels // 2, 1)) + 1) if channels % count == 0)
    grouped = x.reshape(batch, groups, channels // groups, height, width)
    return standardise(grouped, (2, 3, 4)).reshape(x.shape) * per_channel(weight) + per_channel(bias)


def known_batch_norm(
    x: Float[Tensor, "batch channel h w"],
    weight: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"],
    mean: Float[Tensor, " channel"],
    variance: Float[Tensor, " channel"],
) -> Float[Tensor, "batch channel h w"]:
    """Return (x − mean) / √(variance + ε) · weight + bias with statistics measured before.

    This is batch norm when predicting, and frozen batch norm always (DETR, A.4).

    >>> two, four = torch.full((1,), 2.0), torch.full((1,), 4.0)
    >>> round(known_batch_norm(torch.full((1, 1, 1, 1), 8.0), two, two, two, four).item(), 3)  # (8 − 2) / 2 · 2 + 2
    8.0
    """
    centred = x - per_channel(mean)
    return centred / torch.sqrt(per_channel(variance) + EPS) * per_channel(weight) + per_channel(bias)


def measured_batch_norm(
    x: Float[Tensor, "batch channel h w"],
    weight: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"],
    running_mean: Float[Tensor, " channel"],
    running_variance: Float[Tensor, " channel"],
) -> Float[Tensor, "batch channel h w"]:
    """Return x standardised by this batch's own statistics, and move the running ones towards them, in place.

    This is batch norm when training. The running variance takes the unbiased estimate, with n − 1 below.

    >>> mean, variance = torch.zeros(1), torch.ones(1)
    >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    >>> measured_batch_norm(x, torch.ones(1), torch.zeros(1), mean, variance).flatten().round(decimals=3).tolist()
    [-1.0, 1.0]
    >>> round(mean.item(), 3), round(variance.item(), 3)  # 0.9 · 0 + 0.1 · 2 and 0.9 · 1 + 0.1 · 2
    (0.2, 1.1)
    """
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count < 2:
        raise ValueError(f"batch norm needs at least 2 values per channel to train, not {count}: use a larger image")
    mean, variance = mean_and_variance(x, (0, 2, 3))
    with torch.no_grad():
        unbiased = variance.flatten() * count / (count - 1)
        running_mean.copy_((1 - MOMENTUM) * running_mean + MOMENTUM * mean.flatten())
        running_variance.copy_((1 - MOMENTUM) * running_variance + MOMENTUM * unbiased)
    return (x - mean) / torch.sqrt(variance + EPS) * per_channel(weight) + per_channel(bias)
