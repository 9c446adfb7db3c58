"""Small experiments behind the design: the scale of attention, softmax without it, the residual sum.

(Vaswani et al. 2017, section 3.2.1; He et al. 2016.)
"""

import torch

from lucidetr.reference.elementary import softmax


def product_variance(d: int, samples: int = 10_000) -> float:
    """Return the variance of q · k for vectors of d independent values of mean 0 and variance 1.

    Each of the d products has mean 0 and variance 1, and variances of independent terms add up: Var(q · k) = d.
    Divided by √d it is 1 again, whatever d is: hence `head_dim ** -0.5` (Vaswani et al. 2017, section 3.2.1).

    >>> [round(product_variance(d) / d, 1) for d in (4, 64, 512)]
    [1.0, 1.0, 1.0]
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(samples, d, generator=generator)
    key = torch.randn(samples, d, generator=generator)
    product = (query * key).sum(dim=1)
    return ((product - product.mean()) ** 2).mean().item()


def sharpest_weight(d: int, scaled: bool, keys: int = 100) -> float:
    """Return how much of its attention a random query gives to its favourite of 100 random keys, on average.

    An even share would be 0.01. With the scale the favourite gets the same little more at every d; without it,
    nearly everything: attention has chosen before anything was learned.

    >>> [round(sharpest_weight(d, scaled=True), 1) for d in (4, 64, 512)]
    [0.1, 0.1, 0.1]
    >>> [round(sharpest_weight(d, scaled=False), 1) for d in (4, 64, 512)]
    [0.2, 0.8, 0.9]
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(500, d, generator=generator)
    key = torch.randn(500, keys, d, generator=generator)
    scores = (query[:, None] * key).sum(dim=-1) * (d**-0.5 if scaled else 1.0)
    return softmax(scores).amax(dim=-1).mean().item()


def softmax_slope(score: float) -> float:
    """Return d p / d s of p = softmax(s, 0)₀: p (1 − p), the gradient that a score receives through its weight.

    Large scores are why a hard softmax does not learn: the slope falls off like e⁻ˢ.

    >>> [f"{softmax_slope(score):.1e}" for score in (0.0, 2.0, 8.0, 16.0)]
    ['2.5e-01', '1.0e-01', '3.4e-04', '1.1e-07']
    """
    scores = torch.tensor([score, 0.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(softmax(scores)[0], scores)
    return slope[0].item()


def sum_gradient() -> tuple[float, float]:
    """Return what arrives at a and b when the gradient at y = a + b is 7: dy/da = dy/db = 1, so 7 and 7.

    A sum does not share its gradient out, it hands the whole of it to both sides (He et al. 2016, section 2).

    >>> sum_gradient()
    (7.0, 7.0)
    """
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    at_a, at_b = torch.autograd.grad(7 * (a + b), (a, b))
    return at_a.item(), at_b.item()


def stream_gradient(blocks: int, residual: bool) -> float:
    """Return the gradient at the bottom of a tower of blocks f(x) = ±x / 10, stacked, or each added to a stream.

    Stacked, every block multiplies the gradient by its own slope, ±0.1: nothing is left after a few. Added,
    x → x + f(x) multiplies it by 1 + slope: the 1 comes from the sum, and carries it down whole.

    >>> [f"{stream_gradient(blocks, residual=False):.0e}" for blocks in (2, 10, 50)]
    ['-1e-02', '-1e-10', '-1e-50']
    >>> [round(stream_gradient(blocks, residual=True), 2) for blocks in (2, 10, 50)]  # 0.99 for each two blocks
    [0.99, 0.95, 0.78]
    """
    bottom = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    x = bottom
    for block in range(blocks):
        slope = 0.1 if block % 2 == 0 else -0.1
        x = x + slope * x if residual else slope * x
    (gradient,) = torch.autograd.grad(x, bottom)
    return gradient.item()


def softmax_without_largest(x: float) -> float:
    """Return eˣ / (eˣ + eˣ) as written, without subtracting the largest x first: it should be ½.

    >>> softmax_without_largest(1.0), softmax_without_largest(1000.0)  # ∞ / ∞
    (0.5, nan)
    """
    exponential = torch.exp(torch.tensor([x, x]))
    return (exponential / exponential.sum())[0].item()
