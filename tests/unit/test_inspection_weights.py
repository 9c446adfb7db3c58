"""Weights and gradients part by part: planted faults are found and named, numbers are those of the tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lucid_tools import TINY
from lucidetr.config import ModelConfig
from lucidetr.inspection import gradients, weights
from lucidetr.inspection.page import as_svg, chart
from lucidetr.inspection.parts import by_part, course_of_parts, is_vector, pooled_histogram, pooled_std
from lucidetr.models.detr import DETR
from lucidetr.models.size import part_of
from lucidetr.recipes import RECIPES
from lucidetr.training.statistics import describe

NAMES = ["backbone.stem.conv.weight", "projection.weight", "encoder.layers.0.attention.query.weight"]
NAMES += ["encoder.layers.0.attention.key.weight", "decoder.layers.0.self_attention.query.weight"]
NAMES += ["decoder.layers.0.feed_forward.expand.weight", "heads.category.weight", "heads.box.output.weight"]
STEM, PROJECTION, QUERY, KEY, SELF, FEED, CLASS, BOX = NAMES
SCALES = {"update": 1e-3, "gradient": 1.0, "silent": 0.0}


def drawn(name, look, **planted):
    """Return what training writes of a matrix of 8 × 8, its update, gradient and silence as planted."""
    generator = torch.Generator().manual_seed(NAMES.index(name) + 100 * look)
    weight, gradient = torch.randn(2, 8, 8, generator=generator)
    values = SCALES | planted
    line = describe({name: (weight, gradient * values["gradient"])})[name]
    return line | {"update": values["update"], "silent": values["silent"]}


def statistics(looks=6, **planted):
    """Return the lines of a run; `planted` says by look what is wrong with which matrix."""
    faults = planted.get("faults", {})
    return [
        {
            "step": 1 + 10 * look,
            "seconds": 1.0 * look,
            "tensors": {name: drawn(name, look, **faults.get((name, look), faults.get(name, {}))) for name in NAMES},
            "queries": {"churn": [], "used": [], "duplicates": []},
        }
        for look in range(looks)
    ]


def course(**planted):
    return course_of_parts(statistics(**planted))


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_of_every_recipe_has_a_part(name):
    with FakeTensorMode():
        model = DETR(RECIPES[name].model)
    names = [each for each, _ in model.named_parameters()]
    parts = by_part(names)
    assert sum(map(len, parts.values())) == len(names)
    layers = RECIPES[name].model.decoder_layers
    assert f"decoder layer {layers}, cross-attention key" in parts
    assert f"decoder layer {layers + 1}, cross-attention key" not in parts


def test_parts_follow_the_way_of_the_data():
    with FakeTensorMode():
        config = replace(RECIPES["lucid-xs"].model, box_bias="gaussian")
        names = [name for name, _ in DETR(config).named_parameters()]
    order = list(by_part(names))
    some = ["backbone, stem", "backbone, stage 2", "projection to d_model", "encoder layer 1, self-attention value"]
    some += ["fused map", "queries box head", "decoder layer 2, box bias", "class head", "box head"]
    places = [order.index(part) for part in some]
    assert places == sorted(places)


@pytest.mark.parametrize("queries", ["selected", "scored"])
def test_vectors_are_the_parameters_of_one_axis(queries):
    model = DETR(replace(TINY, queries=queries, denoising=0.4))
    for name, parameter in model.named_parameters():
        assert is_vector(name) == (parameter.ndim == 1), name


def test_deviation_and_update_of_a_part_are_those_of_its_numbers_together():
    first, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    second = second * 3 + 2
    lines = describe({"a.weight": (first, first), "b.weight": (second, second)})
    both = torch.cat([first, second])
    assert pooled_std(lines.values(), "weight") == pytest.approx(both.std(correction=0).item(), rel=1e-3)
    step = {"a.weight": 0.1, "b.weight": 0.01}
    line = {"step": 1, "tensors": {name: each | {"update": step[name]} for name, each in lines.items()}}
    renamed = {"projection.weight": line["tensors"]["a.weight"], "projection.more.weight": line["tensors"]["b.weight"]}
    found = course_of_parts([{"step": 1, "tensors": renamed}])
    moved = torch.hypot(0.1 * first.norm(), 0.01 * second.norm())
    assert found.parts == ("projection to d_model",)
    assert found.update[0, 0] == pytest.approx((moved / both.norm()).item(), rel=1e-3)


def test_histograms_of_several_tensors_are_added():
    values = torch.linspace(-1, 1, 6401)
    lines = list(describe({"a": (values, values), "b": (values * 2, values)}).values())
    shares = pooled_histogram(lines, "weight", np.linspace(-2, 2, 5))
    assert shares == pytest.approx([0.125, 0.375, 0.375, 0.125], abs=2e-3)


def test_a_run_without_faults_is_not_warned_of():
    assert gradients.find_faults(course()) == []
    assert weights.update_warnings(course(), TINY) == ()
    assert weights.silent_warnings(course(), TINY) == ()


@pytest.mark.parametrize(
    ("scale", "kind"), [(0.0, "dead"), (1e-6, "vanishing"), (1e6, "exploding"), (1e-3, None), (1e3, None)]
)
def test_a_planted_gradient_is_found_by_its_part(scale, kind):
    faults = gradients.find_faults(course(faults={KEY: {"gradient": scale}}))
    key = "encoder layer 1, self-attention key"
    assert [(fault.part, fault.kind, fault.looks) for fault in faults] == ([(key, kind, 6)] if kind else [])
    warnings, _ = gradients.fault_sentences(faults, TINY)
    assert all(text.startswith(f"{key}: at 6 of 6 looks") for text in warnings)
    assert len(warnings) == (kind is not None)


def test_zero_at_the_first_look_alone_is_how_a_layer_that_starts_at_zero_looks():
    assert gradients.find_faults(course(faults={(KEY, 0): {"gradient": 0.0}})) == []
    (last,) = gradients.find_faults(course(faults={(KEY, 5): {"gradient": 0.0}}))
    assert (last.kind, last.looks) == ("dead", 1)


def test_the_first_self_attention_of_learned_queries_is_explained_and_not_alarmed():
    faults = gradients.find_faults(course(faults={SELF: {"gradient": 0.0}}))
    warnings, remarks = gradients.fault_sentences(faults, ModelConfig())
    assert warnings == ()
    assert "No fault: the queries' content is zero" in remarks[0]
    warnings, remarks = gradients.fault_sentences(faults, replace(TINY, queries="anchors"))
    assert "decoder layer 1, self-attention query" in warnings[0]
    assert remarks == ()


@pytest.mark.parametrize(("update", "said"), [(0.5, "rate is far too high"), (1e-8, "does not learn"), (1e-3, "")])
def test_updates_beyond_reason_are_warned_of(update, said):
    warnings = weights.update_warnings(course(faults={BOX: {"update": update}}), TINY)
    assert len(warnings) == bool(said)
    assert all(text.startswith("box head") and said in text for text in warnings)


def test_a_part_that_starts_at_zero_is_not_warned_of_once_its_steps_are_small_beside_it():
    early = {(BOX, look): {"update": 0.5} for look in range(5)}
    assert weights.update_warnings(course(faults=early), TINY) == ()


def test_a_part_that_holds_still_is_no_number_where_the_weight_is_zero():
    found = course(faults={BOX: {"update": None}})
    assert np.isnan(found.update[:, found.parts.index("box head")]).all()
    assert weights.update_warnings(found, TINY) == ()


def test_what_stands_still_by_nature_and_few_looks_are_not_warned_of():
    planted = {SELF: {"update": 1e-8, "silent": 1.0}}
    assert weights.update_warnings(course(faults=planted), ModelConfig()) == ()
    assert len(weights.update_warnings(course(faults=planted), replace(TINY, queries="anchors"))) == 1
    few = course_of_parts(statistics(looks=2, faults={BOX: {"update": 0.5, "silent": 1.0, "gradient": 0.0}}))
    assert weights.update_warnings(few, TINY) == weights.silent_warnings(few, TINY) == ()
    assert gradients.find_faults(few) == []


def test_silent_units_are_warned_of_when_they_stay_so():
    early = {(FEED, look): {"silent": 1.0} for look in (0, 1, 2)}
    assert weights.silent_warnings(course(faults=early), TINY) == ()
    (said,) = weights.silent_warnings(course(faults={FEED: {"silent": 0.8}}), TINY)
    assert said.startswith("decoder layer 1, feed-forward: in the run's second half at least 80%")


def test_the_groups_that_are_drawn():
    made = weights.weight_distributions(statistics(), [0, 3])
    assert list(made) == ["backbone", "encoder query", "encoder key", "decoder", "box head"]
    for each in made.values():
        assert each.shares.shape == (2, 80)
        assert each.shares.sum(1) == pytest.approx([1, 1], abs=0.02)
        assert each.steps.tolist() == [1, 31]


@pytest.mark.parametrize("looks", [1, 2, 4])
def test_every_chart_is_drawn_from_few_looks_too(looks):
    lines = statistics(looks=looks, faults={KEY: {"gradient": 0.0, "update": None}})
    found = course_of_parts(lines)
    distributions = weights.weight_distributions(lines, found.moments())
    drawings = [
        lambda made: weights.draw_distributions(made, distributions),
        lambda made: weights.draw_over_steps(made, found, found.weight_std),
        lambda made: weights.draw_updates(made, found, 1e-3),
        lambda made: weights.draw_silent(made, found),
        lambda made: gradients.draw_gradients(made, found),
        lambda made: gradients.draw_depth(made, found),
    ]
    svgs = [as_svg(chart(6, 4, draw), "one", "title") for draw in drawings]
    assert "encoder layer 1, self-attention key" in svgs[3]
    assert "encoder query" in svgs[0]


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("queries.1.box.hidden.weight", "queries box head"),
        ("queries.category.weight", "queries class head"),
        ("queries.1.position", "queries"),
        ("heads.2.box.layers.0.weight", "box head layer 3"),
        ("decoder.layers.2.feed_forward_path.norm.bias", "decoder layer 3, norms"),
    ],
)
def test_pieces_speak_of_groups_and_heads_of_layers(name, piece):
    assert part_of(name)[2] == piece
