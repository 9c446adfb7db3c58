"""The classification loss of each query: softmax over the classes and no object, or one sigmoid for each class.

All return one number for each layer, image and query, to be summed and divided by the step's normaliser.
"""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lucidetr.config import LossConfig

ALPHA, GAMMA = 0.25, 2.0  # focal loss (Lin et al. 2017, table 1)
NEGATIVE_WEIGHT = 0.75  # varifocal loss (Zhang et al. 2021)
SMALLEST_TARGET = 0.01
LINEAR = 40  # from here on softplus(x) is x, to the last digit of a float64

Values = Float[Tensor, "*any"]


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
    """Return the sum of the sigmoid losses of all classes; `overlap` is the IoU of a matched box with its object.

    Nearly every class of every query is a no. So all are taken for one, and those of the matches are replaced.
    """
    positive, negative = SIGMOID_LOSSES[kind]
    losses, place = negative(logits), labels.clamp(min=0)[..., None]
    yes = positive(logits.gather(-1, place), overlap.detach().clamp(0, 1)[..., None])
    own = yes.where(labels[..., None] >= 0, losses.gather(-1, place))
    return losses.scatter(-1, place, own).sum(-1)


def surprise(logits: Values) -> Values:
    """Return −log(1 − score), the cost of a no; called with −logits it is −log score, the cost of a yes."""
    return F.softplus(logits, threshold=LINEAR)


def focal_positive(logits: Values, _: Values | None = None) -> Values:
    """Return α (1 − score)² · −log score: easy answers count little, whatever the overlap.

    (Lin et al. 2017, equation 5.)
    """
    return ALPHA * (-logits).sigmoid() ** GAMMA * surprise(-logits)


def focal_negative(logits: Values) -> Values:
    """Return (1 − α) score² · −log(1 − score)."""
    return (1 - ALPHA) * logits.sigmoid() ** GAMMA * surprise(logits)


def varifocal_positive(logits: Values, overlap: Values) -> Values:
    """Return cross-entropy with the overlap as target and as weight (Zhang et al. 2021, equation 2)."""
    return overlap * F.binary_cross_entropy_with_logits(logits, overlap, reduction="none")


def varifocal_negative(logits: Values) -> Values:
    """Return ¾ score² · −log(1 − score); the weight learns, too, unlike RT-DETR's."""
    return NEGATIVE_WEIGHT * logits.sigmoid() ** 2 * surprise(logits)


def ia_bce_positive(logits: Values, overlap: Values) -> Values:
    """Return cross-entropy whose target is √√score · overlap^¾ (Cai et al. 2023, equations 5 and 6)."""
    target = (logits.detach().sigmoid() ** 0.25 * overlap**0.75).clamp(min=SMALLEST_TARGET)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def ia_bce_negative(logits: Values) -> Values:
    """Return score² · −log(1 − score)."""
    return logits.sigmoid() ** 2 * surprise(logits)


def mal_positive(logits: Values, overlap: Values) -> Values:
    """Return cross-entropy with overlap^1.5 as target: poor matches still teach (Huang et al. 2024, equation 4)."""
    return F.binary_cross_entropy_with_logits(logits, one_and_a_half(overlap), reduction="none")


def mal_negative(logits: Values) -> Values:
    """Return score^1.5 · −log(1 − score), the weight a constant."""
    return one_and_a_half(logits.detach().sigmoid()) * surprise(logits)


def one_and_a_half(share: Values) -> Values:
    """Return share^1.5, by a root: a power takes four times as long, and tokens times classes are many."""
    return share * share.sqrt()


SIGMOID_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "focal": (focal_positive, focal_negative),
    "varifocal": (varifocal_positive, varifocal_negative),
    "ia_bce": (ia_bce_positive, ia_bce_negative),
    "mal": (mal_positive, mal_negative),
}


def classification_loss(
    logits: Float[Tensor, "layer batch query category"],
    labels: Int[Tensor, "layer batch query"],
    overlap: Float[Tensor, "layer batch query"],
    config: LossConfig,
) -> Float[Tensor, "layer batch query"]:
    """Return the loss that the config names; an unmatched query's label is −1 and its `overlap` 0."""
    if config.classification == "cross_entropy":
        return softmax_loss(logits, labels, config.no_object)
    return sigmoid_loss(logits, labels, overlap, config.classification)
