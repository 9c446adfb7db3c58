"""Who computes: the fast model, or another that gives the same numbers from the same parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lucidetr.config import LossConfig
from lucidetr.criterion.set_loss import Normalisers, set_loss
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch, Hints, Predictions


@dataclass(frozen=True)
class Engine:
    """Hold the two steps of training; parameters, optimiser and everything else stay with the loop.

    `loss` returns an object with the fields of `criterion.set_loss.Losses`.
    """

    forward: Callable[[DETR, Batch, Hints | None], Predictions]
    loss: Callable[[Predictions, Batch, Normalisers, LossConfig], Any]


FAST = Engine(forward=lambda model, batch, hints: model(batch.images, batch.padding, hints), loss=set_loss)
