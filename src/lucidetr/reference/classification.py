"""What a query pays for each class when every class is a yes or no of its own: four ways, all from one logarithm.

`positive` is for the class of the object that the query answers for, `negative` for every other. `quality` is the IoU
of the matched pair: the last three ways want the score to follow it, so that the surest box is also the best placed.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.reference.elementary import log_sigmoid, sigmoid

ALPHA, GAMMA = 0.25, 2.0  # of focal loss (Lin et al. 2017)
VARIFOCAL_ALPHA, VARIFOCAL_GAMMA = 0.75, 2.0  # (Zhang et al. 2021)
IA_BCE_ALPHA, IA_BCE_GAMMA = 0.25, 2.0  # (Cai et al. 2023)
IA_BCE_LEAST = 0.01  # no match is asked to score less
MAL_GAMMA = 1.5  # (Huang et al. 2024)


def binary_cross_entropy(logit: Float[Tensor, "*any"], target: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return −t log p − (1 − t) log(1 − p) of p = sigmoid(logit): least where p = t.

    1 − sigmoid(x) is sigmoid(−x), so both logarithms are exact, however sure the logit.

    >>> binary_cross_entropy(torch.tensor([1000.0, 1000.0]), torch.tensor([1.0, 0.0])).tolist()
    [0.0, 1000.0]
    """
    return -target * log_sigmoid(logit) - (1 - target) * log_sigmoid(-logit)


def focal_positive(logit: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return α (1 − p)² · −log p: nearly nothing once p is large, so that the hard cases lead.

    >>> round(focal_positive(torch.tensor(0.0)).item(), 4)  # ¼ · ¼ · log 2
    0.0433
    """
    return ALPHA * sigmoid(-logit) ** GAMMA * -log_sigmoid(logit)


def focal_negative(logit: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return (1 − α) p² · −log(1 − p).

    >>> round(focal_negative(torch.tensor(0.0)).item(), 4)  # ¾ · ¼ · log 2
    0.13
    """
    return (1 - ALPHA) * sigmoid(logit) ** GAMMA * -log_sigmoid(-logit)


def varifocal_positive(logit: Float[Tensor, "*any"], quality: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return q · cross entropy with q: a score as high as the overlap, asked of good overlaps the most."""
    return quality * binary_cross_entropy(logit, quality)


def varifocal_negative(logit: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return ¾ p² · −log(1 − p)."""
    return VARIFOCAL_ALPHA * sigmoid(logit) ** VARIFOCAL_GAMMA * -log_sigmoid(-logit)


def ia_bce_positive(logit: Float[Tensor, "*any"], quality: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return the cross entropy with p^¼ q^¾: on the way from the score as it is to the overlap."""
    probability = sigmoid(logit).detach()
    target = probability**IA_BCE_ALPHA * quality ** (1 - IA_BCE_ALPHA)
    return binary_cross_entropy(logit, target.clamp(min=IA_BCE_LEAST))


def ia_bce_negative(logit: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return p² · −log(1 − p)."""
    return sigmoid(logit) ** IA_BCE_GAMMA * -log_sigmoid(-logit)


def mal_positive(logit: Float[Tensor, "*any"], quality: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return the cross entropy with q^1.5: a poor overlap is asked for a poor score, at full weight."""
    return binary_cross_entropy(logit, quality**MAL_GAMMA)


def mal_negative(logit: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return p^1.5 · −log(1 − p), the weight a constant."""
    return sigmoid(logit).detach() ** MAL_GAMMA * -log_sigmoid(-logit)


Positive = Callable[[Tensor, Tensor], Tensor]
Negative = Callable[[Tensor], Tensor]

WAYS: dict[str, tuple[Positive, Negative]] = {
    "focal": (lambda logit, _: focal_positive(logit), focal_negative),
    "varifocal": (varifocal_positive, varifocal_negative),
    "ia_bce": (ia_bce_positive, ia_bce_negative),
    "mal": (mal_positive, mal_negative),
}


def yes_or_no_loss(
    logits: Float[Tensor, " category"], label: int | None, quality: Float[Tensor, ""], way: str
) -> Float[Tensor, ""]:
    """Return the sum over the classes of one query: yes to `label`, no to every other; with None, no to all.

    >>> quality = torch.tensor(0.8)
    >>> round(yes_or_no_loss(torch.zeros(3), 1, quality, "focal").item(), 4)  # 0.0433 + 2 · 0.13
    0.3033
    """
    positive, negative = WAYS[way]
    loss = torch.zeros_like(quality)
    for category, logit in enumerate(logits):
        loss = loss + (positive(logit, quality) if category == label else negative(logit))
    return loss
