"""The reference in the hands of a training loop: the same two steps as the fast model's, predict and loss.

A loop that owns a fast model for its parameters hands them over as they are: with
`state = dict(model.named_parameters()) | dict(model.named_buffers())` the gradients and the running statistics land
in the model, and optimiser, moving average and checkpoints need not know who computed them (DETR, section 4).
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lucidetr.config import LossConfig, ModelConfig
from lucidetr.reference.network import forward
from lucidetr.reference.set_loss import Losses, Normalisers, set_loss
from lucidetr.structures import Batch, Hints, Predictions


@runtime_checkable
class Divisors(Protocol):
    """Name what `loss` reads from its normalisers, so that the fast criterion's fit as well as the reference's."""

    @property
    def objects(self) -> float: ...  # noqa: D102

    @property
    def class_weight(self) -> float: ...  # noqa: D102


def predict(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    images: Float[Tensor, "batch 3 height width"],
    padding: Bool[Tensor, "batch height width"],
    generator: torch.Generator | None = None,
    training: bool = True,
    hints: Hints | None = None,
) -> Predictions:
    """Return the predictions of every layer, dropout drawn from `generator`; nothing else is kept."""
    predictions, _ = forward(
        state, config, images, padding, hints=hints, training=training, generator=generator, keep=()
    )
    return predictions


def loss(predictions: Predictions, batch: Batch, normalisers: Divisors, config: LossConfig) -> Losses:
    """Return the set loss, divided by `normalisers` of the whole optimiser step."""
    norm = Normalisers(objects=normalisers.objects, class_weight=normalisers.class_weight)
    return set_loss(predictions, batch, norm, config)
