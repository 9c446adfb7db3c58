"""A moving average of the weights: what is evaluated and shipped when it is on."""

import copy

import torch
from torch import nn


class MovingAverage:
    """Average the weights over the last part of the run; `horizon` is that part as a share of the whole.

    The decay follows from the horizon and the expected number of steps, so the same setting fits runs of any
    length. Early on, step t weighs in proportion to t − 1: the random start is forgotten at once.
    """

    def __init__(self, model: nn.Module, horizon: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.horizon = horizon
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module, expected_steps: float) -> None:
        """Move the average towards the model's present weights; buffers such as batch-norm statistics too."""
        self.updates += 1
        memory = max(min(self.horizon * expected_steps, self.updates / 2), 1.0)
        mine, present = list(self.model.state_dict().values()), list(model.state_dict().values())
        floats = [(m, p) for m, p in zip(mine, present, strict=True) if m.is_floating_point()]
        torch._foreach_lerp_([m for m, _ in floats], [p for _, p in floats], 1.0 / memory)
        for m, p in zip(mine, present, strict=True):
            if not m.is_floating_point():
                m.copy_(p)
