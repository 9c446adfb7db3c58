"""Start a model from other weights: a whole detector, or its backbone only."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ModelCard, ModelConfig
from lucidetr.conversion.names import COUNTER, backbone_only, listed, shape, without
from lucidetr.errors import InputError
from lucidetr.fields import difference
from lucidetr.models.detr import DETR

CLASS_HEAD = re.compile(r"(heads|queries)\.(\d+\.)?(taught_)?category\.(weight|bias)")
TAUGHT = re.compile(r"queries\.(\d+\.)?taught_category\.(weight|bias)")  # of no use but in training
HINTS = "hints.label.weight"  # one row for each class, too
QUERIES = re.compile(r"queries\.(\d+\.)?(position|box|content)")  # one row for each query
# fields of the config that the function sees to itself, or that no tensor depends on
FREE = {"num_classes", "num_queries", "dropout", "position_table", "residual_start", "initialisation"}
FREE |= {"backbone.norm", "backbone.zero_residual", "teach_tokens"}


def start_from(model: DETR, state: Mapping[str, Tensor], card: ModelCard, categories: Categories) -> list[str]:
    """Copy weights into a freshly made model and return a sentence for each thing that is not as it was.

    `categories` are the model's; `state` and `card` belong to the weights. Categories of equal names
    keep their rows of the class head, the slot for no object keeps its own; other rows stay fresh. Queries stay
    fresh where their number differs. Any other difference is an InputError that names it.
    """
    config, state = model.config, without(state, suffixes=(COUNTER,))
    if backbone_only(state):
        _check_backbone(card.model.backbone, config.backbone)
        targets = {name: t for name, t in _targets(model).items() if name.startswith("backbone.")}
        notes = [f"the backbone starts from {card.recipe}; the rest is new"]
    else:
        _check_model(card.model, config)
        targets, notes = _targets(model), [f"all weights start from {card.recipe}"]
        state = {name: t for name, t in state.items() if name in targets or not TAUGHT.fullmatch(name)}
        if new := [name for name in targets if TAUGHT.fullmatch(name) and name not in state]:
            targets = without(targets, suffixes=tuple(new))
            notes.append("the class head by which all tokens are taught is new")
        if config.num_queries != card.model.num_queries:
            own = [name for name in targets if QUERIES.fullmatch(name)]  # those that are tokens have none
            for name in own:
                del targets[name], state[name]
            if own:
                notes.append(f"the {config.num_queries} queries are new: the weights have {card.model.num_queries}")
        if categories.names != card.categories.names:
            softmax = config.classification == "softmax"
            notes.append(_adapt_class_heads(targets, state, card.categories, categories, softmax))
    _copy(targets, state)
    return notes


def _targets(model: DETR) -> dict[str, Tensor]:
    return without(model.state_dict(), suffixes=(COUNTER,))


def _adapt_class_heads(
    targets: dict[str, Tensor], state: dict[str, Tensor], known: Categories, wanted: Categories, softmax: bool
) -> str:
    """Replace the weights' class heads by such for the wanted categories, and say how much of them is new."""
    kept = [(label, known.names.index(name)) for label, name in enumerate(wanted.names) if name in known.names]
    no_object = [(len(wanted), len(known))] if softmax else []  # the last row of each
    for name in [name for name in targets if CLASS_HEAD.fullmatch(name) or name == HINTS]:
        rows = kept if name == HINTS else kept + no_object
        new, old = torch.tensor(rows, dtype=torch.long).reshape(-1, 2).unbind(1)
        fresh = targets[name].detach().clone()
        fresh[new.to(fresh.device)] = state[name][old].to(fresh)
        state[name] = fresh
    if not kept:
        return "the class head is new: no category has a name that the weights know"
    names = [wanted.names[label] for label, _ in kept]
    return f"the class head is new but for {len(kept)} of {len(wanted)} categories of equal name: {listed(names)}"


def _check_backbone(known: BackboneConfig, wanted: BackboneConfig) -> None:
    """Refuse statistics in a norm that has none, and another network; dilation changes no tensor."""
    if (known.norm == "group") != (wanted.norm == "group"):
        raise InputError(
            f"the weights were trained with backbone.norm {known.norm}, this model has {wanted.norm}, which cannot use "
            f"them: set backbone.norm to {known.norm}"
        )
    for field in ("name", "width"):
        if getattr(known, field) != getattr(wanted, field):
            raise InputError(
                f"the weights have backbone.{field} {getattr(known, field)}, "
                f"this model {getattr(wanted, field)}: set backbone.{field} to that of the weights"
            )


def _check_model(known: ModelConfig, wanted: ModelConfig) -> None:
    _check_backbone(known.backbone, wanted.backbone)
    differs = {name: values for name, values in difference(known, wanted).items() if name not in FREE}
    if differs:
        told = ", ".join(f"{name} {was} there, {now} here" for name, (was, now) in differs.items())
        asked = " ".join(as_option(name, was) for name, (was, _) in differs.items())
        raise InputError(
            f"the weights are of another model: {told}: choose the recipe that they were trained with, or set {asked}"
        )


def as_option(name: str, value: Any) -> str:
    """Return what a field of a model's config is set by on the command line.

    >>> as_option("boxes", "refined"), as_option("shared_heads", False), as_option("fused", (16, 8))
    ('--model.boxes refined', '--model.no-shared-heads', '--model.fused 16 8')
    """
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{option}" if value else f"--model.no-{option}"
    return f"--model.{option} {' '.join(map(str, value)) if isinstance(value, tuple) else value}".rstrip()


def _copy(targets: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, leftover = targets.keys() - state.keys(), state.keys() - targets.keys()
    if missing or leftover:
        told = {"missing": missing, "left over": leftover}
        raise InputError(
            "the weights do not fit this model: "
            + "; ".join(f"{what}: {listed(sorted(names))}" for what, names in told.items() if names)
        )
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != state[name].shape:
                raise InputError(f"{name} is {shape(state[name])} in the weights, {shape(target)} in this model")
            target.copy_(state[name])
