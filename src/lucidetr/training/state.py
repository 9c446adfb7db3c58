"""The tensors that a run goes on from: weights, moments, average and random state, taken and put back."""

import torch
from torch import Tensor, nn

from lucidetr.training.checkpoint import load_optimiser, optimiser_tensors
from lucidetr.training.ema import MovingAverage
from lucidetr.training.randomness import random_state, set_random_state


def training_tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, average: MovingAverage | None, device: torch.device
) -> dict[str, Tensor]:
    """Return all that a step changes, under names such as model.heads.class.weight and random.cpu."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= optimiser_tensors(optimiser)
    if average:
        tensors |= {f"average.{name}": value for name, value in average.model.state_dict().items()}
    return tensors | {f"random.{name}": value for name, value in random_state(device).items()}


def put_back(
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: MovingAverage | None,
    device: torch.device,
) -> None:
    """Put back what `training_tensors` returned."""
    model.load_state_dict(with_prefix(tensors, "model."))
    load_optimiser(optimiser, tensors)
    if average:
        average.model.load_state_dict(with_prefix(tensors, "average."))
    set_random_state(with_prefix(tensors, "random."), device)


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
