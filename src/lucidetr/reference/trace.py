"""The record of a run: every intermediate value under a readable dotted name."""

from collections.abc import Callable, Iterable

from torch import Tensor

Keep = Callable[[str], bool] | Iterable[str] | None


class Trace(dict[str, Tensor]):
    """Map names to the values a run produced, in run order; `keep` says which.

    None keeps everything, a list keeps the names that start with one of its entries (whole words between dots),
    a function is asked for each name. Values stay in the autograd graph, so one can ask for the gradient of a box
    with respect to any of them.

    >>> import torch
    >>> trace = Trace(keep=["encoder.layers.1"])
    >>> for name in ("encoder.layers.1.output", "encoder.layers.10.output", "memory"):
    ...     trace.record(name, torch.zeros(2))
    >>> list(trace)
    ['encoder.layers.1.output']
    """

    def __init__(self, keep: Keep = None):
        super().__init__()
        self.keep = keep if keep is None or callable(keep) else tuple(keep)

    def wants(self, name: str) -> bool:
        """Return whether a value of that name is kept."""
        if self.keep is None:
            return True
        if callable(self.keep):
            return self.keep(name)
        return any(name == start or name.startswith(f"{start}.") for start in self.keep)

    def record(self, name: str, value: Tensor) -> None:
        """Keep the value if it is wanted; a name can be used only once."""
        if self.wants(name):
            assert name not in self, f"{name} is recorded twice"
            self[name] = value
