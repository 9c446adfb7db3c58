"""Tables of names that are read in both directions, and the account of every key on both sides.

A table is a tuple of rows (their name, our name). A field in braces stands for one part of a name and is carried
over: `{leaf}` for a word (weight, bias, running_mean), any other field for a number.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lucidetr.config import ModelCard
from lucidetr.errors import InputError

Rows = tuple[tuple[str, str], ...]
FIELD = re.compile(r"\\{(\w+)\\}")
COUNTER = ".num_batches_tracked"  # how many batches a batch norm has seen: no forward pass reads it
MOST_LISTED = 40  # names in one error message


@dataclass(frozen=True, eq=False)
class Converted:
    """Hold weights under our names, the card that describes them, and what had to be assumed or left out.

    A backbone alone has only names that start with `backbone.`, and a card without categories.
    """

    state: dict[str, Tensor]
    card: ModelCard
    notes: tuple[str, ...] = ()


def backbone_only(state: Mapping[str, Tensor]) -> bool:
    """Return whether the weights are those of a backbone without a detector."""
    return all(name.startswith("backbone.") for name in state)


def prefixed(rows: Rows, theirs: str, ours: str) -> Rows:
    """Return the rows with a prefix for each side.

    >>> prefixed((("bn1.{leaf}", "norm.{leaf}"),), "body.", "backbone.")
    (('body.bn1.{leaf}', 'backbone.norm.{leaf}'),)
    """
    return tuple((theirs + their, ours + our) for their, our in rows)


def swapped(rows: Rows) -> Rows:
    """Return the table that leads from our names to theirs."""
    return tuple((our, their) for their, our in rows)


def rename(state: Mapping[str, Tensor], rows: Rows, source: str) -> dict[str, Tensor]:
    """Return the tensors under the names of the table's right side.

    A name without a row, or two names that mean the same, is an InputError that lists them; `source` opens it.

    >>> rows = (("layer{n}.fc.{leaf}", "layers.{n}.linear.{leaf}"),)
    >>> rename({"layer3.fc.bias": torch.zeros(1)}, rows, "weights.pth")
    {'layers.3.linear.bias': tensor([0.])}
    >>> rename({"layer3.mask": torch.zeros(1)}, rows, "weights.pth")
    Traceback (most recent call last):
    lucidetr.errors.InputError: weights.pth: 1 name has no place in the other model: layer3.mask
    """
    patterns = [(_pattern(left), right) for left, right in rows]
    renamed: dict[str, Tensor] = {}
    leftover, doubled = [], []
    for name, tensor in state.items():
        target = next((right.format(**m.groupdict()) for p, right in patterns if (m := p.fullmatch(name))), None)
        if target is None:
            leftover.append(name)
        elif target in renamed:
            doubled.append(name)
        else:
            renamed[target] = tensor
    if leftover:
        plural = "name has" if len(leftover) == 1 else "names have"
        raise InputError(f"{source}: {len(leftover)} {plural} no place in the other model: {listed(leftover)}")
    if doubled:
        raise InputError(f"{source}: given twice under different names: {listed(doubled)}")
    return renamed


def _pattern(template: str) -> re.Pattern[str]:
    """Return the regular expression of a row's left side."""
    kinds = {"leaf": "[a-z_]+"}
    return re.compile(FIELD.sub(lambda m: f"(?P<{m[1]}>{kinds.get(m[1], '[0-9]+')})", re.escape(template)))


def without(
    state: Mapping[str, Tensor], prefixes: Iterable[str] = (), suffixes: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors whose names neither start nor end so: things known to be of no use, dropped by name."""
    starts, ends = tuple(prefixes), tuple(suffixes)
    return {name: tensor for name, tensor in state.items() if not name.startswith(starts) and not name.endswith(ends)}


def account(state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Check that the tensors are exactly those of the model, name by name and shape by shape.

    `model` may live on the meta device. Anything missing, left over or of another shape is an InputError.
    """
    expected = without(model.state_dict(), suffixes=(COUNTER,))
    missing = [name for name in expected if name not in state]
    leftover = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {shape(state[name])}, expected {shape(tensor)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {"missing": missing, "left over": leftover, "of another shape": shapes}
    found = [f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names]
    if found:
        raise InputError(f"{source}: the weights do not fit the model they describe; {'; '.join(found)}")


def shape(tensor: Tensor) -> str:
    """Return a tensor's shape as people write it.

    >>> shape(torch.zeros(2, 3))
    '2 × 3'
    """
    return " × ".join(map(str, tensor.shape)) or "a single number"


def listed(names: Iterable[str]) -> str:
    """Return names with commas between them, the end cut off where there are very many."""
    names = list(names)
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def in_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor in float32, each in memory of its own: safetensors stores no views."""
    return {name: tensor.detach().to("cpu", torch.float32).clone().contiguous() for name, tensor in state.items()}
