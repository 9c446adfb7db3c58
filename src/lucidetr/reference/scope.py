"""Standing at one place of the network: its weights by short names, its values into the trace."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lucidetr.config import ModelConfig
from lucidetr.reference.elementary import dropout
from lucidetr.reference.trace import Trace


@dataclass(frozen=True, eq=False)
class Scope:
    """Hold what a part of the network needs to know besides its input.

    >>> state = {"encoder.norm.weight": torch.ones(3)}
    >>> here = Scope(state, ModelConfig(), Trace())
    >>> here.inside("encoder").inside("norm")["weight"].tolist()
    [1.0, 1.0, 1.0]
    """

    state: Mapping[str, Tensor]
    config: ModelConfig
    trace: Trace
    training: bool = False
    generator: torch.Generator | None = None
    place: str = ""

    def inside(self, name: str | int) -> "Scope":
        """Return the scope of a part of this part."""
        return replace(self, place=f"{self.place}{name}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.place + name]

    def __contains__(self, name: str) -> bool:
        return self.place + name in self.state

    def record(self, name: str, value: Tensor) -> Tensor:
        """Put a value into the trace under this place's name, and return it."""
        self.trace.record(self.place + name, value)
        return value

    def drop(self, x: Tensor) -> Tensor:
        """Return x with some values dropped when training, else x itself."""
        if not self.training or self.config.dropout == 0:
            return x
        return dropout(x, self.config.dropout, self.generator)
