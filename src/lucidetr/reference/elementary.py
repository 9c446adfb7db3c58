"""The one-line functions everything else is made of (Goodfellow et al. 2016, chapter 6)."""

import torch
from jaxtyping import Float
from torch import Tensor


def linear(
    x: Float[Tensor, "*any inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"]
) -> Float[Tensor, "*any outputs"]:
    """Return x Wᵀ + b: each output is one row of W times x, plus its bias.

    >>> linear(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.0, 10.0])).tolist()
    [1.0, 13.0]
    """
    return x @ weight.T + bias


def relu(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return x where it is positive, else 0; the slope at 0 is taken as 0.

    >>> relu(torch.tensor([-2.0, 0.0, 3.0])).tolist()
    [0.0, 0.0, 3.0]
    """
    return torch.where(x > 0, x, torch.zeros_like(x))


def sigmoid(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return 1 / (1 + e⁻ˣ), written (1 + tanh(x / 2)) / 2, which no x can make overflow.

    >>> sigmoid(torch.tensor([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (1 + torch.tanh(x / 2)) / 2


def softmax(x: Float[Tensor, "*any slot"]) -> Float[Tensor, "*any slot"]:
    """Return eˣ / Σ eˣ over the last axis: positive numbers that sum to 1.

    The largest x is subtracted first. That changes nothing, since top and bottom lose the same factor, and e to
    the power of 1000 would be infinite.

    >>> softmax(torch.tensor([1000.0, 1000.0, -torch.inf])).tolist()
    [0.5, 0.5, 0.0]
    """
    exponential = torch.exp(x - largest(x))
    return exponential / exponential.sum(dim=-1, keepdim=True)


def log_softmax(x: Float[Tensor, "*any slot"]) -> Float[Tensor, "*any slot"]:
    """Return x − log Σ eˣ over the last axis: the logarithm of softmax, finite where softmax rounds to 0.

    >>> log_softmax(torch.tensor([0.0, -1000.0])).tolist()
    [0.0, -1000.0]
    """
    shifted = x - largest(x)
    return shifted - torch.log(torch.exp(shifted).sum(dim=-1, keepdim=True))


def log_sigmoid(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return log 1 / (1 + e⁻ˣ): of two slots with the scores x and 0, what softmax gives the first, as a logarithm.

    >>> log_sigmoid(torch.tensor([-1000.0, 1000.0])).tolist()
    [-1000.0, 0.0]
    """
    return log_softmax(torch.stack([x, torch.zeros_like(x)], dim=-1))[..., 0]


def largest(x: Float[Tensor, "*any slot"]) -> Float[Tensor, "*any 1"]:
    """Return the largest value of the last axis as a constant: it cancels, so no gradient has to pass it."""
    return x.detach().amax(dim=-1, keepdim=True)


def dropout(x: Float[Tensor, "*any"], probability: float, generator: torch.Generator | None) -> Float[Tensor, "*any"]:
    """Return x with each value set to 0 with that probability, the others enlarged so that the mean stays.

    (Srivastava et al. 2014.)

    >>> dropout(torch.ones(6), 0.5, torch.Generator().manual_seed(1)).tolist()
    [2.0, 0.0, 0.0, 2.0, 0.0, 2.0]
    """
    survives = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) >= probability
    return x * survives / (1 - probability)
