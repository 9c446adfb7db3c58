"""Muon: steps along orthogonal matrices (Jordan et al. 2024), beside AdamW for all that is no matrix.

The gradient of a matrix has a few strong directions, and AdamW, which scales each entry by itself, still steps mostly
along those. With momentum M = U S Vᵀ, Muon steps along U Vᵀ: along every direction equally far. It is scaled so that
entries move by the rate, in root mean square. A kernel counts as the matrix from all its inputs, channels times places,
to its outputs.
"""

from collections.abc import Iterable

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
        """Step along the orthogonal part of each one's momentum; those of one shape are computed at once."""
        for alike in by_shape(parameters):
            ahead = torch.stack([self.momentum(p).flatten(1) for p in alike])
            along = orthogonal(ahead) * max(ahead.shape[1:]) ** 0.5
            for parameter, direction in zip(alike, along, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction.view_as(parameter), alpha=group["lr"])
                parameter.grad = None

    def momentum(self, parameter: nn.Parameter) -> Tensor:
        """Take the gradient into the parameter's momentum and return it a step ahead (Nesterov)."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:  # AdamW's load_state_dict looks for a step in all of them; this one is not counted
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)


def by_shape(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Return the parameters in groups of one shape."""
    groups: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.shape, []).append(parameter)
    return groups.values()


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
