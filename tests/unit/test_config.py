"""Configs in and out of JSON, categories, and the errors of a user's slip."""

import json
from dataclasses import replace

import pytest

from lucidetr.categories import Categories
from lucidetr.config import ModelCard, ModelConfig, TrainConfig
from lucidetr.errors import InputError
from lucidetr.fields import difference, from_dict, to_dict
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
        ("", "seed", -1, "--seed = -1"),
        ("", "workers", -1, "--workers = -1"),
        ("", "batch", 0, "--batch = 0: choose at least 1"),
    ],
)
def test_a_run_that_cannot_be_is_refused(part, field, value, message):
    config = getattr(TrainConfig(), part) if part else TrainConfig()
    with pytest.raises(InputError, match=message):
        replace(config, **{field: value})


def test_difference_names_nested_fields():
    other = replace(recipe("detr-r50"), model=replace(recipe("detr-r50").model, num_queries=300), seed=1)
    assert difference(other, recipe("detr-r50")) == {"model.num_queries": (300, 100), "seed": (1, 0)}


def test_categories_keep_the_users_ids():
    categories = Categories(ids=(7, 1, 90), names=("a", "b", "c"))
    assert [categories.label_of_id(i) for i in (7, 1, 90)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"category id 2 is not one of \[7, 1, 90\]"):
        categories.label_of_id(2)


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
