"""Configs in and out of JSON, categories, and the errors of a user's slip."""

import json
import re
from dataclasses import replace

import pytest

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, LossConfig, ModelCard, ModelConfig, TrainConfig
from lucidetr.errors import InputError
from lucidetr.fields import difference, from_dict, to_dict, with_fields
from lucidetr.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(recipe(name))))) == recipe(name)


def test_cards_survive_json():
    card = ModelCard(
        model=ModelConfig(num_classes=2),
        images=recipe("detr-xs").images,
        categories=Categories(ids=(3, 9), names=("cat", "a dog")),
        recipe="detr-xs",
        step=7,
        metrics={"AP": 0.5},
    )
    assert from_dict(ModelCard, json.loads(json.dumps(to_dict(card)))) == card


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"num_querys": 3}}, r"unknown field model.num_querys: did you mean num_queries\?"),
        ({"model": {"num_queries": "3"}}, r"model.num_queries = '3': expected int"),
        ({"model": {"backbone": {"name": "resnet20"}}}, r"model.backbone.name = 'resnet20': choose one of resnet18"),
        (
            {"model": {"initialisation": "he"}},
            r"model.initialisation = 'he': choose one of default, uniform, .*, t_fixup",
        ),
        ({"model": {"decoder_block": "end_norm"}}, r"decoder_block = 'end_norm': choose one of .* shared_norm"),
        ({"images": {"mean": [0.5]}}, r"images.mean = \[0.5\]: expected 3 values"),
        ({"freeze": [1]}, r"freeze\[0\] = 1: expected str"),
        ({"model": 3}, r"expected an object with fields, got 3"),
        ({"steps": True}, r"steps = True: expected int"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        from_dict(TrainConfig, values)


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="the field categories is missing"):
        from_dict(ModelCard, {"model": {}, "images": {}, "recipe": "x"})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", 30, "model.d_model = 30: choose a multiple of 4"),
        ("num_queries", 0, "model.num_queries = 0: choose at least 1"),
        ("decoder_layers", 0, "model.decoder_layers = 0: choose at least 1"),
        ("encoder_layers", -1, "model.encoder_layers = -1: choose at least 0"),
        ("feed_forward", -1, "model.feed_forward = -1: choose at least 0"),
        ("dropout", 1.0, "model.dropout = 1.0: choose at least 0 and at most 0.99"),
        ("dropout", float("nan"), "model.dropout = nan: choose at least 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        replace(ModelConfig(), **{field: value})


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("optimiser", "clip", -1.0, "optimiser.clip = -1.0: choose at least 0"),
        ("optimiser", "lr", -1.0, "optimiser.lr = -1.0"),
        ("optimiser", "ema", 1.5, "optimiser.ema = 1.5: choose at least 0 and at most 1"),
        ("loss", "no_object", -1.0, "loss.no_object = -1.0"),
        ("images", "size", 0, "images.size = 0: choose at least 8"),
        ("augmentation", "flip", 2.0, "augmentation.flip = 2.0: choose at least 0 and at most 1"),
        ("augmentation", "scales", (480, 0), r"augmentation.scales = \(480, 0\): choose at least 8"),
        ("augmentation", "crop_sides", (600, 384), r"crop_sides = \(600, 384\): give the smallest .* first, 384 600"),
        ("augmentation", "crop_scales", (), r"crop_scales = \(\): name the short sides .* by augmentation.crop 0"),
        ("augmentation", "mosaic_from", 0.6, r"mosaic_from = 0.6: choose at most augmentation.mosaic_until, .* 0.5"),
        ("", "seed", -1, "--seed = -1"),
        ("", "workers", -1, "--workers = -1"),
        ("", "batch", 0, "--batch = 0: choose at least 1"),
    ],
)
def test_a_run_that_cannot_be_is_refused(part, field, value, message):
    config = getattr(TrainConfig(), part) if part else TrainConfig()
    with pytest.raises(InputError, match=message):
        replace(config, **{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": "anchors"}, r"queries = anchors and model.boxes = absolute: .*all others start from a box"),
        (
            {"boxes": "refined"},
            r"queries = learned and model.boxes = refined: learned and content queries say absolute boxes",
        ),
        ({"queries": "selected", "boxes": "relative"}, r"selected needs model.classification sigmoid"),
        ({"queries": "scored", "boxes": "relative"}, r"scored needs model.classification sigmoid"),
        (
            {"queries": "content", "boxes": "refined"},
            r"= content and model.boxes = refined: learned and content queries say absolute boxes",
        ),
        ({"queries": "content", "box_bias": "rpb"}, r"model.box_bias = rpb needs queries that start from a box"),
        ({"queries": "content", "denoising": 0.4}, r"model.denoising needs queries that start from a box"),
        ({"box_bias": "gaussian"}, r"model.box_bias = gaussian needs queries that start from a box: anchors, selected"),
        ({"box_bias": "rpb"}, r"model.box_bias = rpb needs queries that start from a box"),
        ({"denoising": 0.4}, r"model.denoising needs queries that start from a box"),
        ({"denoising": 1.5}, r"model.denoising = 1.5: choose at least 0 and at most 1"),
        ({"query_groups": 0}, r"model.query_groups = 0: choose at least 1"),
        ({"fused": (32,)}, r"model.fused = \(32,\): choose from 16, 8, 4, each once, coarse to fine"),
        ({"fused": (12,)}, r"model.fused = \(12,\): choose from 16, 8, 4"),
        ({"fused": (8, 16)}, r"model.fused = \(8, 16\): choose from 16, 8, 4, each once, coarse to fine"),
        ({"fused": (8, 8)}, r"model.fused = \(8, 8\): choose from 16, 8, 4, each once"),
        ({"fused": (16,), "backbone": BackboneConfig(dilation=True)}, r"fused = \(16,\): choose from 8, 4"),
        ({"fused": (16,), "backbone": BackboneConfig(name="convnet")}, r"fused = \(16,\): choose from 8, 4"),
        ({"fused": (8,), "backbone": BackboneConfig(name="convnet", depths=(1,))}, r"has one map, leave it empty"),
    ],
)
def test_model_settings_that_need_each_other_are_refused_alone(changes, message):
    with pytest.raises(InputError, match=message):
        replace(ModelConfig(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "convnet", "dilation": True}, "backbone.dilation = True: only ResNets are dilated, not convnet"),
        ({"name": "efficientnet_lite0", "dilation": True}, "only ResNets are dilated, not efficientnet_lite0"),
        ({"depths": ()}, r"backbone.depths = \(\): give 1 to 4 stages"),
        ({"depths": (1,) * 5}, r"backbone.depths = \(1, 1, 1, 1, 1\): give 1 to 4 stages"),
        ({"depths": (1, -1)}, r"backbone.depths = \(1, -1\): choose at least 0"),
        ({"width": 1}, "backbone.width = 1: choose at least 2"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        BackboneConfig(**changes)


@pytest.mark.parametrize("queries", ["anchors", "selected", "scored"])
@pytest.mark.parametrize("boxes", ["relative", "refined", "refined_twice"])
@pytest.mark.parametrize("box_bias", ["none", "gaussian", "rpb"])
def test_what_fits_together_is_taken(queries, boxes, box_bias):
    config = ModelConfig(queries=queries, boxes=boxes, box_bias=box_bias, classification="sigmoid", denoising=0.4)
    assert replace(config, fused=(16, 8, 4), query_groups=3).backbone.strides == (4, 8, 16, 32)


def test_learned_content_says_whole_boxes_in_any_number_of_groups():
    config = ModelConfig(queries="content", query_groups=3, feed_forward=0, position="none", position_at="input")
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_the_loss_fits_the_kind_of_logits():
    sigmoid = replace(ModelConfig(), classification="sigmoid")
    with pytest.raises(InputError, match=r"= cross_entropy does not fit .* = sigmoid: choose focal, varifocal, ia_bce"):
        TrainConfig(model=sigmoid)
    for kind in ("focal", "varifocal", "ia_bce", "mal"):
        loss = LossConfig(classification=kind)
        assert TrainConfig(model=sigmoid, loss=loss).loss.classification == kind
        with pytest.raises(InputError, match=rf"= {kind} does not fit .* = softmax: choose cross_entropy"):
            TrainConfig(loss=loss)


def test_fields_are_changed_together_where_they_need_each_other():
    changes = {"model.queries": "anchors", "model.boxes": "refined", "seed": 3, "model.fused": [16, 8]}
    changed = with_fields(TrainConfig(), changes)
    assert difference(changed, TrainConfig()) == {
        "model.fused": ((16, 8), ()),
        "model.queries": ("anchors", "learned"),
        "model.boxes": ("refined", "absolute"),
        "seed": (3, 0),
    }
    with pytest.raises(InputError, match="learned and content queries say absolute boxes"):
        with_fields(TrainConfig(), {"model.boxes": "refined"})
    with pytest.raises(InputError, match=r"unknown field model.backbone.widht: did you mean width\?"):
        with_fields(TrainConfig(), {"model.backbone.widht": 3})
    assert with_fields(TrainConfig(), {}) == TrainConfig()


def test_difference_names_nested_fields():
    other = replace(recipe("detr-r50"), model=replace(recipe("detr-r50").model, num_queries=300), seed=1)
    assert difference(other, recipe("detr-r50")) == {"model.num_queries": (300, 100), "seed": (1, 0)}


@pytest.mark.parametrize(
    ("ids", "names", "message"),
    [
        ((1, 1), ("a", "b"), "category id 1 is given twice"),
        ((1, 2), ("a", "a"), "category name 'a' is given twice"),
        ((1,), ("a", "b"), "1 category ids but 2 names"),
    ],
)
def test_ambiguous_categories_are_refused(ids, names, message):
    with pytest.raises(InputError, match=message):
        Categories(ids=ids, names=names)


def test_a_card_names_every_class_or_none():
    model = replace(recipe("detr-xs").model, num_classes=3)
    ModelCard(model, ImageConfig(), Categories((), ()), "a backbone")
    ModelCard(model, ImageConfig(), Categories((1, 2, 7), ("a", "b", "c")), "a detector")
    with pytest.raises(InputError, match="the card names 2 categories for a model of 3 classes"):
        ModelCard(model, ImageConfig(), Categories((1, 2), ("a", "b")), "a detector")


def test_changes_by_name_name_what_is_unknown():
    for name, said in (("modle.num_queries", "did you mean model?"), ("seed.x", "unknown field seed.x")):
        with pytest.raises(InputError, match=re.escape(said)):
            with_fields(recipe("lucid-xs"), {name: 5})


def test_the_upper_end_of_a_range_is_named_where_it_is_passed():
    with pytest.raises(InputError, match=r"lr = 2000000\.0: choose at least 0 and at most 1,000,000"):
        with_fields(recipe("lucid-xs"), {"optimiser.lr": 2e6})
    with pytest.raises(InputError, match=r"lr = -1\.0: choose at least 0$"):
        with_fields(recipe("lucid-xs"), {"optimiser.lr": -1.0})


def test_an_engine_that_is_asked_for_must_be_handed_over(tmp_path):
    from lucidetr.training.loop import train

    with pytest.raises(InputError, match="engine = reference: train"):
        train(replace(recipe("lucid-xs"), engine="reference", data="generated:digits", out=str(tmp_path), steps=1))
