"""The model's parts in the order in which data pass through them, and what training wrote down of each."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lucidetr.config import ModelConfig
from lucidetr.models.size import part_of

Line = dict[str, Any]  # of statistics.jsonl

FAMILIES = ("backbone", "encoder", "decoder", "the rest")
FEWEST_LOOKS = 5  # fewer do not tell a fault from a beginning


def block_of(part: str) -> str:
    """Return the larger block that a part stands in: a backbone stage, an encoder or decoder layer, or itself.

    >>> block_of("decoder layer 2, cross-attention key"), block_of("backbone, stage 2"), block_of("box head layer 1")
    ('decoder layer 2', 'backbone, stage 2', 'box head layer 1')
    """
    inside = re.match(r"(?:encoder|decoder) layer \d+", part)
    return inside[0] if inside else part


def is_vector(name: str) -> bool:
    """Say whether a parameter is a bias, belongs to a norm, or makes the content of scored queries.

    These are few numbers, of another size than a part's matrices.

    >>> [is_vector(name) for name in ("projection.weight", "projection.bias", "decoder.norm.weight", "x.norm1.weight")]
    [False, True, True, True]
    """
    *_, owner, kind = ("", *name.split("."))
    return kind in ("bias", "base", "by_score") or owner.startswith("norm")


def by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters of each part, in the order given, which is that of the data's way through the model."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(part_of(name)[2], []).append(name)
    return parts


def family_of(part: str) -> str:
    """Return the panel that a part is drawn in.

    >>> family_of("encoder layer 1, feed-forward"), family_of("backbone, stem"), family_of("fused map")
    ('encoder', 'backbone', 'the rest')
    """
    first = re.split(r"\W", part)[0]
    return first if first in FAMILIES else FAMILIES[-1]


@dataclass(frozen=True, eq=False)
class PartCourse:
    """Hold what training wrote down, by part and look: matrices only, for biases and norms are of another size.

    A number that is not there (a part that does not learn, a weight of zero) is nan.
    """

    parts: tuple[str, ...]
    steps: Int[np.ndarray, " look"]
    weight_std: Float[np.ndarray, "look part"]
    gradient_std: Float[np.ndarray, "look part"]
    gradient_zero: Float[np.ndarray, "look part"]  # 1 where every entry of every matrix was exactly 0
    update: Float[np.ndarray, "look part"]  # |Δw| / |w|
    silent: Float[np.ndarray, "look part"]  # the largest share among the part's matrices

    def moments(self) -> list[int]:
        """Return the first look, the one in the middle and the last, each once."""
        last = len(self.steps) - 1
        return sorted({0, last // 2, last})


def course_of_parts(statistics: Sequence[Line]) -> PartCourse:
    """Gather the lines of statistics.jsonl by part; parts without a matrix are left out.

    Deviations are those of all the numbers of a part together; an update is the norm of a part's whole change over
    the norm of all its weights.
    """
    names = by_part(name for name in statistics[0]["tensors"] if not is_vector(name)) if statistics else {}
    measures: dict[str, Callable[[list[Line]], float]] = {
        "weight_std": lambda tensors: pooled_std(tensors, "weight"),
        "gradient_std": lambda tensors: pooled_std(tensors, "gradient"),
        "gradient_zero": _all_zero,
        "update": _update,
        "silent": lambda tensors: max((t["silent"] for t in tensors if t.get("silent") is not None), default=np.nan),
    }
    tables = {name: np.full((len(statistics), len(names)), np.nan) for name in measures}
    for look, line in enumerate(statistics):
        for column, members in enumerate(names.values()):
            tensors = [line["tensors"][name] for name in members if name in line["tensors"]]
            for name, measure in measures.items():
                tables[name][look, column] = measure(tensors)
    return PartCourse(tuple(names), np.array([line["step"] for line in statistics], dtype=np.int64), **tables)


def pooled_std(tensors: Iterable[Line], kind: str) -> float:
    """Return the standard deviation of all numbers of some tensors together, nan where there are none.

    >>> two = [{"weight": [1.0, 0.0, 1, 1], "weight_histogram": [1, 1, [8]]},
    ...        {"weight": [3.0, 0.0, 3, 3], "weight_histogram": [3, 3, [8]]}]
    >>> pooled_std(two, "weight")
    1.0
    """
    there = [t for t in tensors if t.get(kind)]
    counts = np.array([count_of(t, kind) for t in there], dtype=float)
    if not counts.sum():
        return float("nan")
    means, stds = (np.array([t[kind][i] for t in there], dtype=float) for i in (0, 1))
    mean = float(np.average(means, weights=counts))
    return float(np.sqrt(np.average(stds**2 + (means - mean) ** 2, weights=counts)))


def count_of(tensor: Line, kind: str) -> float:
    """Return how many numbers a tensor has: what its histogram counts."""
    histogram = tensor.get(f"{kind}_histogram")
    return float(sum(histogram[2])) if histogram else 0.0


def _all_zero(tensors: list[Line]) -> float:
    """Return 1 where every gradient is exactly zero, else 0; nan where there is none."""
    ranges = [tensor["gradient"][2:] for tensor in tensors if tensor.get("gradient")]
    return float(all(low == high == 0 for low, high in ranges)) if ranges else float("nan")


def _update(tensors: list[Line]) -> float:
    """Return the norm of the change of some tensors over the norm of their weights."""
    changes, weights = 0.0, 0.0
    for tensor in tensors:
        if tensor.get("update") is not None:
            mean, std, _, _ = tensor["weight"]
            square = count_of(tensor, "weight") * (mean**2 + std**2)
            changes, weights = changes + tensor["update"] ** 2 * square, weights + square
    return float(np.sqrt(changes / weights)) if weights else float("nan")


def pooled_histogram(
    tensors: Sequence[Line], kind: str, edges: Float[np.ndarray, " edge"]
) -> Float[np.ndarray, " bin"]:
    """Return the share of the numbers of some tensors in each bin; within their own bins they are taken as even.

    >>> one = {"weight_histogram": [0.0, 2.0, [6, 2]]}
    >>> pooled_histogram([one], "weight", np.array([0.0, 0.5, 1.0, 2.0])).tolist()
    [0.375, 0.375, 0.25]
    """
    below = np.zeros(len(edges))
    total = 0.0
    for tensor in tensors:
        if histogram := tensor.get(f"{kind}_histogram"):
            low, high, counts = histogram
            own = np.linspace(low, high, len(counts) + 1)
            passed = np.concatenate([[0.0], np.cumsum(counts)])
            if high > low:
                below += np.interp(edges, own, passed, left=0.0, right=passed[-1])
            else:  # all numbers are alike
                below += np.where(edges > low, passed[-1], 0.0)
            total += passed[-1]
    return np.diff(below) / total if total else np.zeros(len(edges) - 1)


def lasting(wrong: Bool[np.ndarray, " look"]) -> bool:
    """Say whether something is so at the last look or at half of all looks after the first.

    The first look sees layers that start at zero, and fewer than five looks tell nothing.

    >>> lasting(np.array([True, False, False, False, False])), lasting(np.array([False, True, True, False, False]))
    (False, True)
    """
    later = wrong[1:]
    return len(wrong) >= FEWEST_LOOKS and bool(later[-1] or 2 * later.sum() >= len(later))


def explained(part: str, config: ModelConfig) -> str | None:
    """Return why a part has no gradient, or hardly any, by the model's own nature; None where that is a fault.

    >>> explained("decoder layer 1, self-attention value", ModelConfig()) is None
    False
    >>> explained("decoder layer 2, self-attention value", ModelConfig()) is None
    True
    """
    if config.num_queries == 1 and re.search("self-attention (query|key)$", part):
        return "a single query has nothing to choose among"
    if config.queries == "learned" and part.startswith("decoder layer 1, self-attention"):
        return (
            "the queries' content is zero before the first decoder layer, so this attention has nothing to choose "
            "among: value never learns, query and key wake up late. The paper notes that it can be left out"
        )
    return None
