"""How networks start: every matrix by the rule that the config names, and what starts with a meaning keeps it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import lucid_tools
from lucidetr.config import BackboneConfig, ModelConfig
from lucidetr.layers.box_bias import FENCE
from lucidetr.models.detr import DETR
from lucidetr.models.heads import PRIOR_BIAS

WIDE = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=16, norm="group"),
    num_classes=63,
    d_model=64,
    num_heads=3,
    head_dim=16,
    feed_forward=256,
    encoder_layers=2,
    decoder_layers=3,
    num_queries=200,
)
SCHEMES = ["uniform", "uniform_scaled", "xavier", "he_in", "he_out", "t_fixup"]


def made(scheme, config=WIDE, seed=0):
    torch.manual_seed(seed)
    return DETR(replace(config, initialisation=scheme))


def fans(weight):
    """Return how many numbers an output is made of, and how many outputs an input goes into."""
    window = weight[0, 0].numel()
    return weight.shape[1] * window, weight.shape[0] * window


def deviation(scheme, weight):
    inputs, outputs = fans(weight)
    return {
        "uniform": 0.02 / math.sqrt(3),
        "uniform_scaled": 0.02 / math.sqrt(3),
        "xavier": math.sqrt(2 / (inputs + outputs)),
        "he_in": math.sqrt(2 / inputs),
        "he_out": math.sqrt(2 / outputs),
        "t_fixup": math.sqrt(2 / (inputs + outputs)),
    }[scheme]


def factor(scheme, name):
    """Return what the scheme multiplies this matrix by after it is drawn."""
    if scheme == "uniform_scaled" and "attention." in name and "output" not in name:
        return 16**-0.5
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if scheme == "t_fixup" and name.startswith(("encoder.layers", "decoder.layers")):
        scale = 0.67 * 2**-0.25 if name.startswith("encoder") else (9 * 3) ** -0.25
        return scale if last in ("value", "output", "expand", "contract") else 1.0
    return 1.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_matrix_has_the_deviation_and_the_shape_of_its_rule(scheme):
    state = made(scheme).state_dict()
    matrices = {name: tensor for name, tensor in state.items() if tensor.dim() > 1 and name != "queries.position"}
    assert len(matrices) == 20 + 1 + 2 * 6 + 3 * 10 + 4  # backbone, projection, layers, heads
    for name, weight in matrices.items():
        expected = deviation(scheme, weight) * factor(scheme, name)
        tolerance = 6 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected, rel=tolerance), name
        bounded = weight.abs().max() <= 1.0001 * math.sqrt(3) * expected  # a uniform range ends there
        assert bounded == (not scheme.startswith("he")), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_are_zero_and_norms_stay(scheme):
    model = made(scheme)
    norms = [part for part in model.modules() if isinstance(part, (nn.LayerNorm, nn.GroupNorm))]
    assert len(norms) > 20 and all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)
    assert not any(tensor.any() for name, tensor in model.state_dict().items() if name.endswith("bias"))


def test_learned_vectors_are_drawn_anew_by_t_fixup_alone():
    for scheme in SCHEMES:
        expected = 64**-0.5 if scheme == "t_fixup" else 1.0
        assert made(scheme).queries.position.std().item() == pytest.approx(expected, rel=0.03)
    content = replace(WIDE, queries="content")
    assert made("t_fixup", content).queries.content.std().item() == pytest.approx(1 / 8, rel=0.03)
    hinted = replace(lucid_tools.TINY, denoising=0.4, num_classes=500)
    assert made("t_fixup", hinted).hints.label.weight.std().item() == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("queries", ["anchors", "selected", "scored"])
def test_what_starts_with_a_meaning_keeps_it(scheme, queries):
    config = replace(lucid_tools.TINY, queries=queries, denoising=0.4)
    plain, model = made("default", config).state_dict(), made(scheme, config)
    state = model.state_dict()
    rare = [name for name in state if name.endswith("category.bias")]
    unmoved = [name for name in state if name.startswith(("heads", "queries")) and ".box.output." in f".{name}"]
    bells = [name for name in state if ".box_bias.shape." in name]
    selected = config.selects
    assert (len(rare), len(unmoved), len(bells)) == (3 + selected, 2 * (3 + selected), 6)
    assert all((state[name] == torch.tensor(PRIOR_BIAS)).all() for name in rare)
    assert not any(state[name].any() for name in unmoved)
    assert all(torch.equal(state[name], plain[name]) for name in bells)
    drawn = {name for name in state if not torch.equal(state[name], plain[name])}
    matrices = {name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    matrices -= {name.rsplit(".", 1)[0] for name in unmoved + bells}
    assert {f"{name}.weight" for name in matrices} <= drawn


def test_a_learned_function_of_the_sides_is_drawn_as_any_layer_but_for_its_fence():
    config = replace(lucid_tools.TINY, box_bias="rpb")
    x = made("uniform", config).decoder.layers[0].box_bias.x
    assert 0.015 < x.hidden.weight[2:].abs().max() <= 0.02
    assert x.output.weight[:, 2:].abs().max() <= 0.02
    assert not x.hidden.bias.any()
    assert x.hidden.weight[:2].tolist() == [[-1, 0], [0, 1]]
    assert (x.output.weight[:, :2] == -FENCE).all()


def test_residual_branches_have_the_last_word():
    state = made("he_in", replace(WIDE, residual_start="zero")).state_dict()
    last = [
        name
        for name in state
        if (name.startswith(("encoder.", "decoder.")) and "output.weight" in name) or "contract.weight" in name
    ]
    assert len(last) == 2 * 2 + 3 * 3 and not any(state[name].any() for name in last)
    loud, scaled = made("xavier").state_dict(), made("xavier", replace(WIDE, residual_start="scaled")).state_dict()
    for name in last:
        torch.testing.assert_close(scaled[name], loud[name] / math.sqrt(2 * 5))


def test_the_default_starts_each_part_by_its_own_rule_as_before():
    """Known numbers: the attention's three input matrices at the scale of one packed matrix, kernels by fan-out."""
    state = made("default").state_dict()
    weight = state["decoder.layers.0.self_attention.query.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(1 / (64 + 48)), rel=0.05)
    kernel = state["backbone.stages.3.1.conv2.weight"]
    assert kernel.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert state["heads.category.bias"].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_start_can_be_drawn_without_memory_and_anew(scheme):
    with torch.device("meta"):
        DETR(replace(lucid_tools.TINY, initialisation=scheme))
    first, again, other = (made(scheme, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projection.weight"], other["projection.weight"])
