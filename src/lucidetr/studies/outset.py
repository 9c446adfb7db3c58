"""What a network is like before its first step: how its signals, gradients and attention spread on one batch.

The values come from the reference's trace, so nothing is attached to the fast model.
"""

import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lucidetr.config import TrainConfig
from lucidetr.criterion.set_loss import normalisers
from lucidetr.data.batching import training_steps
from lucidetr.data.dataset import open_training_data
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch
from lucidetr.training.start import settle
from lucidetr.training.statistics import read_statistics


@dataclass(frozen=True)
class Outset:
    """Hold numbers by the name of what they are of, in the order in which the network computes.

    Variances of the stream after each part, deviations of each matrix's gradient, and entropies of each attention as
    a share of the largest possible: 1 where every key gets the same.
    """

    variances: dict[str, float]
    gradients: dict[str, float]
    entropies: dict[str, float]
    loss: float


def fresh(config: TrainConfig) -> tuple[TrainConfig, DETR, Batch]:
    """Return the config as it would be trained, its network as it would start, and its first pictures, unchanged."""
    train_set, _, _ = open_training_data(config)
    config, _ = settle(config, None, train_set)
    config = replace(config, model=replace(config.model, dropout=0.0))
    torch.manual_seed(config.seed)
    model = DETR(config.model).train()
    steps = training_steps(
        train_set, config.images, None, seed=config.seed, batch=config.batch, micro_batch=config.batch
    )
    with closing(steps):
        (batch,) = next(steps)
    return config, model, batch


def look(config: TrainConfig) -> Outset:
    """Return what a network that trains from random weights is like on its first batch, nothing dropped."""
    from lucidetr.reference import engine
    from lucidetr.reference.network import forward

    config, model, batch = fresh(config)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    predictions, trace = forward(state, model.config, batch.images, batch.padding, training=True, keep=wanted)
    groups = config.model.query_groups
    norm = normalisers(batch.counts.tolist(), config.model.num_queries, config.loss, groups)
    total = engine.loss(predictions, batch, norm, config.loss).total
    total.backward()
    return Outset(
        variances={name: float(value.detach().var()) for name, value in trace.items() if not is_attention(name)},
        gradients={
            name: 0.0 if parameter.grad is None else float(parameter.grad.std())
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1
        },
        entropies={name: entropy(value) for name, value in trace.items() if is_attention(name)},
        loss=float(total.detach()),
    )


def is_attention(name: str) -> bool:
    """Say whether a value of the trace is how an attention divides itself."""
    return name.endswith(".weights")


def wanted(name: str) -> bool:
    """Say whether a value of the trace belongs to the stream through the network, or is an attention.

    >>> [wanted(n) for n in ("backbone.stem.output", "encoder.layers.0.attention_path.after", "tokens")]
    [True, True, False]
    """
    picture = name.startswith(("backbone.", "fusion.")) and name.endswith(".output")
    return picture or name == "projection" or name.endswith(".after") or is_attention(name)


def entropy(weights: Float[Tensor, "batch head query key"]) -> float:
    """Return the mean entropy of attention over the keys, divided by that of equal weights.

    >>> round(entropy(torch.full((1, 1, 1, 4), 0.25)), 6), entropy(torch.tensor([[[[1.0, 0.0]]]]))
    (1.0, 0.0)
    """
    keys = weights.shape[-1]
    return float(torch.special.entr(weights.detach()).sum(-1).mean()) / math.log(max(keys, 2))


def is_matrix(name: str) -> bool:
    """Say whether a parameter of that name in statistics.jsonl is a matrix or a stack of kernels, not a norm's or bias.

    >>> [is_matrix(n) for n in ("heads.box.output.weight", "heads.box.output.bias", "backbone.stem.norm.weight")]
    [True, False, False]
    """
    return name.endswith("weight") and ".norm" not in name


def of_each_look(run: Path, name: str, what: str, number: int) -> tuple[float, ...]:
    """Return one of mean, std, min, max (number 0 … 3) of a parameter's weight or gradient at every look of a run."""
    lines: list[dict[str, Any]] = read_statistics(run)
    return tuple(float(line["tensors"][name][what][number]) for line in lines)
