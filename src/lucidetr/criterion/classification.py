"""The classification loss of each query: softmax over the classes and no object, or one sigmoid for each class.

All return one number for each layer, image and query, to be summed and divided by the step's normaliser.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lucidetr.config import LossConfig

ALPHA, GAMMA = 0.25, 2.0  # focal loss (Lin et al. 2017, table 1)
NEGATIVE_WEIGHT = 0.75  # varifocal loss (Zhang et al. 2021)
SMALLEST_TARGET = 0.01

Logits = Float[Tensor, "*any category"]


def softmax_loss(
    logits: Float[Tensor, "layer batch query category"],
    labels: Int[Tensor, "layer batch query"],
    no_object: float,
) -> Float[Tensor, "layer batch query"]:
    """Return −log probability of the label; −1 stands for no object, the last slot, whose weight is `no_object`."""
    slots = logits.shape[-1]
    weight = logits.new_ones(slots)
    weight[-1] = no_object
    target = labels.where(labels >= 0, slots - 1)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, reduction="none").view_as(target)


def sigmoid_loss(
    logits: Float[Tensor, "layer batch query category"],
    labels: Int[Tensor, "layer batch query"],
    overlap: Float[Tensor, "layer batch query"],
    kind: str,
) -> Float[Tensor, "layer batch query"]:
    """Return the sum of the sigmoid losses of all classes; `overlap` is the IoU of a matched box with its object."""
    matched = (labels >= 0).to(logits.dtype)[..., None]
    yes = torch.zeros_like(logits).scatter(-1, labels.clamp(min=0)[..., None], matched)
    quality = yes * overlap.detach().clamp(0, 1)[..., None]
    return SIGMOID_LOSSES[kind](logits, yes, quality).sum(-1)


def focal(logits: Logits, yes: Logits, quality: Logits | None = None) -> Logits:
    """Return α (1 − pₜ)² · cross-entropy: easy answers count little (Lin et al. 2017, equation 5)."""
    wrong = (logits.sigmoid() - yes).abs()
    alpha = ALPHA * yes + (1 - ALPHA) * (1 - yes)
    return alpha * wrong**GAMMA * F.binary_cross_entropy_with_logits(logits, yes, reduction="none")


def varifocal(logits: Logits, yes: Logits, quality: Logits) -> Logits:
    """Return cross-entropy with the overlap as target and as weight (Zhang et al. 2021, equation 2)."""
    weight = NEGATIVE_WEIGHT * logits.detach().sigmoid() ** 2 * (1 - yes) + quality
    return weight * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def ia_bce(logits: Logits, yes: Logits, quality: Logits) -> Logits:
    """Return cross-entropy whose target is √√score · overlap^¾ for a match (Cai et al. 2023, equations 5 and 6)."""
    score = logits.detach().sigmoid()
    target = yes * (score**0.25 * quality**0.75).clamp(min=SMALLEST_TARGET)
    weight = yes + (1 - yes) * score**2
    return weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def mal(logits: Logits, yes: Logits, quality: Logits) -> Logits:
    """Return cross-entropy with overlap^1.5 as target: poor matches still teach (Huang et al. 2024, equation 4)."""
    weight = yes + (1 - yes) * one_and_a_half(logits.detach().sigmoid())
    return weight * F.binary_cross_entropy_with_logits(logits, one_and_a_half(quality), reduction="none")


def one_and_a_half(share: Logits) -> Logits:
    """Return share^1.5, by a root: a power takes four times as long, and tokens times classes are many."""
    return share * share.sqrt()


SIGMOID_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "focal": focal,
    "varifocal": varifocal,
    "ia_bce": ia_bce,
    "mal": mal,
}


def classification_loss(
    logits: Float[Tensor, "layer batch query category"],
    labels: Int[Tensor, "layer batch query"],
    overlap: Float[Tensor, "layer batch query"],
    config: LossConfig,
) -> Float[Tensor, "layer batch query"]:
    """Return the loss that the config names; an unmatched query's label is −1 and its `overlap` is ignored."""
    if config.classification == "cross_entropy":
        return softmax_loss(logits, labels, config.no_object)
    return sigmoid_loss(logits, labels, overlap, config.classification)
