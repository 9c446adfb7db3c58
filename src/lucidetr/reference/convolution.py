"""Convolution and pooling as what they are: patches of a picture (He et al. 2015, section 3)."""

import torch
from jaxtyping import Float
from torch import Tensor


def frame(x: Float[Tensor, "batch channel h w"], margin: int, value: float) -> Float[Tensor, "batch channel h2 w2"]:
    """Return the picture with `margin` cells of `value` on all four sides.

    >>> frame(torch.ones(1, 1, 1, 1), 1, 0.0)[0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    batch, channels, height, width = x.shape
    framed = x.new_full((batch, channels, height + 2 * margin, width + 2 * margin), value)
    framed[:, :, margin : margin + height, margin : margin + width] = x
    return framed


def patches(
    x: Float[Tensor, "batch channel h w"], kernel: int, stride: int, dilation: int
) -> Float[Tensor, "batch channel h2 w2 kernel kernel"]:
    """Return the kernel × kernel patch under every position of the window.

    The window moves by `stride`; inside it every `dilation`-th cell counts, so it spans dilation·(kernel − 1) + 1.

    >>> picture = torch.arange(16.0).view(1, 1, 4, 4)
    >>> patches(picture, kernel=2, stride=2, dilation=1)[0, 0, 1, 1].tolist()  # the lower right quarter
    [[10.0, 11.0], [14.0, 15.0]]
    >>> patches(picture, kernel=2, stride=1, dilation=3)[0, 0, 0, 0].tolist()  # the four corners
    [[0.0, 3.0], [12.0, 15.0]]
    """
    span = dilation * (kernel - 1) + 1
    windows = x.unfold(2, span, stride).unfold(3, span, stride)
    return windows[..., ::dilation, ::dilation]


def convolution(
    x: Float[Tensor, "batch channel h w"],
    weight: Float[Tensor, "outputs channel kernel kernel"],
    stride: int = 1,
    dilation: int = 1,
) -> Float[Tensor, "batch outputs h2 w2"]:
    """Return Σ patch · kernel at every position: one matrix product of all patches with all kernels.

    A frame of zeros, half a kernel wide, lets the output cover the input. What is called convolution here is a
    correlation: the kernel is not mirrored. That is the field's habit, and the weights are learned either way.

    >>> picture = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    >>> convolution(picture, torch.ones(1, 1, 3, 3)).tolist()  # every 3 × 3 patch holds the whole picture
    [[[[10.0, 10.0], [10.0, 10.0]]]]
    >>> convolution(torch.zeros(1, 3, 800, 1066), torch.zeros(1, 3, 7, 7), stride=2).shape
    torch.Size([1, 1, 400, 533])
    """
    outputs, _, kernel, _ = weight.shape
    seen = patches(frame(x, dilation * (kernel // 2), 0.0), kernel, stride, dilation)
    batch, _, height, width, _, _ = seen.shape
    rows = seen.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, -1)  # one row for each position
    product = rows @ weight.reshape(outputs, -1).T
    # laid out channel by channel again: sums over values scattered in memory round up to a hundred times worse
    return product.view(batch, height, width, outputs).permute(0, 3, 1, 2).contiguous()


def max_pool(
    x: Float[Tensor, "batch channel h w"], kernel: int = 3, stride: int = 2
) -> Float[Tensor, "batch channel h2 w2"]:
    """Return the largest value of every patch; the frame is −∞, so it never wins.

    Where two values are equal, the first in reading order is the one that gets the gradient.

    >>> max_pool(torch.arange(16.0).view(1, 1, 4, 4))[0, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    seen = patches(frame(x, kernel // 2, -torch.inf), kernel, stride, 1)
    return seen.flatten(-2).max(dim=-1).values
