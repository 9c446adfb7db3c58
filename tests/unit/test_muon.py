"""Muon: the orthogonal part of a momentum, which weights step along it, and that all others are AdamW's."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lucidetr.config import OptimiserConfig
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training.muon import ITERATIONS, MOMENTUM, QUINTIC, matrices_of, orthogonal
from lucidetr.training.optimiser import build_optimiser, freeze

MUON = OptimiserConfig(lr=1e-2, backbone_lr=1e-3, matrices="muon")


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 60), (60, 24)])
def test_directions_stay_and_become_equally_strong(rows, columns):
    matrices = torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    made = orthogonal(matrices)
    inside = u.mT @ made @ v.mT  # diagonal where directions stayed
    values = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9
    strong = s > 0.01 * s.norm(dim=1, keepdim=True)
    assert values[strong].min() > 0.68
    assert values.max() < 1.21
    assert torch.allclose(orthogonal(1000 * matrices), made)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-22, 1e-12])
def test_vanishing_gradients_are_no_danger(size):
    made = orthogonal(size * torch.randn(2, 16, 32))
    assert made.abs().max() < 1


def written_out(weight, gradients, lr, decay):
    """Return a matrix after steps as the paper says it, one product after the other."""
    a, b, c = QUINTIC
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        x = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        x = x / x.norm()
        for _ in range(ITERATIONS):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        weight = weight - lr * decay * weight - lr * max(x.shape) ** 0.5 * x
    return weight


def test_steps_are_those_of_the_paper_and_all_else_is_adamws():
    """Kernels too, channels last as they are trained, wide and tall, and two of one shape."""
    torch.manual_seed(0)
    layers = {
        "wide": nn.Linear(40, 20),
        "too": nn.Linear(40, 20),
        "tall": nn.Conv2d(16, 200, 3),
        "few": nn.Linear(40, 15),
    }
    model = nn.ModuleDict({"backbone": nn.Conv2d(16, 24, 3), "unused": nn.Linear(16, 16), **layers})
    model = model.double().to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = [{name: torch.randn_like(p) for name, p in before.items() if "unused" not in name} for _ in range(3)]
    gradients[1]["wide.weight"].zero_()
    optimiser = build_optimiser(model, MUON)
    for each in gradients:
        give(model, each)
        optimiser.step()
    rates = {"backbone.weight": 1e-3, "wide.weight": 1e-2, "too.weight": 1e-2, "tall.weight": 1e-2}
    for name, lr in rates.items():
        flat = [each[name].flatten(1) for each in gradients]
        expected = written_out(before[name].flatten(1), flat, lr, MUON.weight_decay).view_as(before[name])
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-12), name
    alone = nn.ParameterDict({name.replace(".", "-"): nn.Parameter(p.clone()) for name, p in before.items()})
    groups = [
        {"params": [p for name, p in alone.items() if name.startswith("backbone") == back], "lr": lr}
        for back, lr in ((True, 1e-3), (False, 1e-2))
    ]
    usual = torch.optim.AdamW(groups, weight_decay=MUON.weight_decay)
    for each in gradients:
        give(alone, {name.replace(".", "-"): gradient for name, gradient in each.items() if name not in rates})
        usual.step()
    for name in before.keys() - rates.keys():
        assert torch.allclose(model.get_parameter(name), alone[name.replace(".", "-")], atol=1e-12), name


def give(model, gradients):
    """Set the gradients of those parameters that have one."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None


def test_frozen_parts_are_in_no_group_and_backbone_matrices_have_the_backbones_rate():
    model = DETR(recipe("lucid-xs").model)
    freeze(model, ("encoder", "backbone.stages.0"))
    groups = build_optimiser(model, MUON).param_groups
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: (group["lr"], group["orthogonal"]) for group in groups for p in group["params"]}
    assert found["backbone.stages.1.down.conv.weight"] == (1e-3, True)
    assert found["backbone.stem.conv.weight"] == (1e-3, False)
    assert found["projection.weight"] == (1e-2, True)
    assert found["heads.category.bias"] == (1e-2, False)
    assert [name for name in found if name.startswith(("encoder.", "backbone.stages.0."))] == []
    assert len(found) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("backbone", [recipe(name).model.backbone for name in ("lucid-xs", "lucid-s-lite0")])
@pytest.mark.parametrize("queries", ["selected", "scored", "anchors"])
def test_matrices_lead_from_features_to_features(backbone, queries):
    """Twenty classes are as many outputs as some layers have; an embedding is a matrix in shape alone."""
    config = recipe("lucid-xs").model
    taught = queries != "anchors"
    config = replace(config, backbone=backbone, queries=queries, teach_tokens=taught, num_classes=20)
    model = DETR(replace(config, denoising=0.4))
    found = matrices_of(model)
    assert {"decoder.layers.1.cross_attention.value.weight", "heads.box.layers.0.weight", "projection.weight"} < {
        *found
    }
    assert [n for n in found if "category" in n or n.endswith("box.output.weight") or ".stem." in n] == []
    assert all(min(model.get_parameter(name).shape[:2]) >= 16 for name in found)
    own = {"selected": set(), "scored": set(), "anchors": {"queries.content"}}
    embeddings = {"hints.label.weight"} | own[queries]
    assert embeddings | {"heads.category.weight"} <= {n for n, p in model.named_parameters() if p.ndim > 1} - {*found}
