"""AdamW or Muon with one rate for the backbone and one for the rest, and how the rate moves (DETR, A.4)."""

import math
from typing import Any

import torch
from torch import nn

from lucidetr.config import OptimiserConfig
from lucidetr.errors import InputError, did_you_mean
from lucidetr.training.muon import Muon, matrices_of


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Switch off learning in the parts of these names; a name that is no part is an InputError."""
    names = dict(model.named_modules())
    for part in parts:
        if not part or part not in names:
            shallow = [name for name in names if name and name.count(".") <= 2]
            raise InputError(f"--freeze {part!r} is no part of the model: {did_you_mean(part, shallow)}")
        names[part].requires_grad_(False)


def learning_mode(model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Put a DETR into training mode, all but its frozen parts: their batch-norm statistics stand still too.

    Queries have no statistics. In training they start in groups and let tokens be taught, frozen or not.
    """
    model.train()
    for part in frozen:
        model.get_submodule(part).eval()
    model.get_submodule("queries").train()


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """Return the optimiser over what learns; each group keeps its peak rate under "peak"."""
    muon = config.matrices == "muon"
    matrices = set(matrices_of(model)) if muon else set()
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_backbone, orthogonal = name.startswith("backbone."), name in matrices
            peak = config.backbone_lr if in_backbone else config.lr
            fresh = {"params": [], "lr": peak, "peak": peak, "orthogonal": orthogonal}
            groups.setdefault((in_backbone, orthogonal), fresh)["params"].append(parameter)
    if not groups:
        raise InputError("every part of the model is frozen: leave something to learn out of --freeze")
    optimiser = Muon if muon else torch.optim.AdamW
    return optimiser(list(groups.values()), weight_decay=config.weight_decay, fused=True)


def rate(progress: float, config: OptimiserConfig) -> float:
    """Return the share of the peak rate at `progress` 0…1 of the run; even the first step of a warm-up moves a little.

    >>> paper = OptimiserConfig(schedule="step", drop_at=2 / 3)
    >>> rate(0.5, paper), rate(0.7, paper)
    (1.0, 0.1)
    >>> cosine = OptimiserConfig(schedule="cosine", warmup=0.1, final=0.02)
    >>> [round(rate(p, cosine), 3) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.01, 0.5, 1.0, 0.51, 0.02]
    >>> flat = OptimiserConfig(schedule="cosine", flat=0.5, final=0.0)
    >>> [round(rate(p, flat), 3) for p in (0.0, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if progress < config.warmup:
        return max(progress / config.warmup, 0.01)
    if config.schedule == "step":
        return 1.0 if progress < config.drop_at else 0.1
    if config.schedule == "cosine":
        start = max(config.warmup, config.flat)
        along = min(max(progress - start, 0.0) / (1 - start), 1.0)
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * along)) / 2
    return 1.0


def set_rate(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to that share of its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share
