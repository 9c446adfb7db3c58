"""Muon: steps along orthogonal matrices (Jordan et al. 2024), beside AdamW for all that is no matrix.

The gradient of a matrix has a few strong directions, and AdamW, which scales each entry by itself, still steps mostly
along those. With momentum M = U S Vᵀ, Muon steps along U Vᵀ: along every direction equally far. It is scaled so that
entries move by about the rate, in root mean square (Liu et al. 2025, Moonlight, take a fifth of that; Jordan et al.
scale by the shape alone). Momentum is 0.9 instead of 0.95, with four iterations instead of five, in float32. A kernel
counts as the matrix from all its inputs, channels times places, to its outputs.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOMENTUM = 0.9
QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, and keeps 0.68 … 1.2 within
ITERATIONS = 4
SMALLEST = 1e-10  # a norm below it gives no direction, but rounding
NARROW = 16  # a matrix with fewer inputs or outputs has no directions to spare


class Muon(torch.optim.AdamW):
    """Step along orthogonal matrices in the groups that are marked `orthogonal`, and as AdamW in all others."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step; gradients of matrices are let go, so that AdamW passes over them."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self.step_matrices([p for p in group["params"] if p.grad is not None], group)
        super().step(closure)

    def step_matrices(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Step along the orthogonal part of each one's momentum, a step ahead (Nesterov).

        Those of one shape are computed at once, and all of them take each plain operation at once: a GPU waits longer
        for an operation to be asked for than it computes it.
        """
        if not parameters:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.momentum(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        steps = [*ahead]
        for places in by_shape(parameters):
            matrices = torch.stack([as_matrix(ahead[place]) for place in places])
            along = (orthogonal(matrices) * max(matrices.shape[1:]) ** 0.5).contiguous()
            for place, direction in zip(places, along, strict=True):
                steps[place] = as_weight(direction, parameters[place].shape)
        weights: list[Tensor] = [*parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, steps, alpha=-group["lr"])
        for parameter in parameters:
            parameter.grad = None

    def momentum(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's momentum, zero at first."""
        state = self.state[parameter]
        if not state:  # AdamW's load_state_dict looks for a step in all of them; this one is not counted
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(parameter)
        return state["momentum"]


def by_shape(parameters: Sequence[nn.Parameter]) -> Iterable[list[int]]:
    """Return the places of the parameters in groups of one shape."""
    groups: dict[torch.Size, list[int]] = {}
    for place, parameter in enumerate(parameters):
        groups.setdefault(parameter.shape, []).append(place)
    return groups.values()


def as_matrix(weight: Tensor) -> Float[Tensor, "rows columns"]:
    """Return a weight as a matrix from all its inputs; a kernel's lie channels last, as they do in memory.

    >>> kernel = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> as_matrix(kernel)
    tensor([[0., 4., 1., 5., 2., 6., 3., 7.]])
    >>> torch.equal(as_weight(as_matrix(kernel), kernel.shape), kernel)
    True
    """
    return weight.movedim(1, -1).flatten(1) if weight.dim() > 2 else weight


def as_weight(matrix: Float[Tensor, "rows columns"], shape: torch.Size) -> Tensor:
    """Return what `as_matrix` made a matrix of, in its own shape."""
    outputs, inputs, *places = shape
    return matrix.view(outputs, *places, inputs).movedim(-1, 1)


def orthogonal(matrices: Float[Tensor, "matrix rows columns"]) -> Float[Tensor, "matrix rows columns"]:
    """Return U Vᵀ of each U S Vᵀ, nearly: singular values come to lie between 0.68 and 1.2.

    X ← (a + b X Xᵀ + c (X Xᵀ)²) X makes of every singular value s the value a s + b s³ + c s⁵, and leaves U and V. The
    factors of all iterations depend on the small X Xᵀ alone; only their product meets X. Singular values below a
    hundredth of the norm do not come all the way. That needs float32: in bfloat16 or TF32 the factors would lose them.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    gram = x @ x.mT
    product = factor = quintic(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = quintic(gram)
        product = factor @ product
    return product @ x


def quintic(gram: Float[Tensor, "matrix rows rows"]) -> Float[Tensor, "matrix rows rows"]:
    """Return a + b G + c G²."""
    a, b, c = QUINTIC
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def matrices_of(model: nn.Module) -> list[str]:
    """Return the names of the weights that Muon is for.

    Those of linear layers and convolutions with many inputs and outputs, class layers aside: none that starts from
    pixels, ends in a box, or filters each channel by itself.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith("category"):
            outputs, inputs = module.weight.shape[:2]
            if min(outputs, inputs) >= NARROW:
                found.append(f"{name}.weight")
    return found
