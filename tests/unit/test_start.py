"""Starting from a detector of the lucid family: a class head in every layer and in the queries, none for no object."""

from dataclasses import replace

import pytest
import torch

from lucid_tools import TINY
from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard
from lucidetr.conversion.names import Converted
from lucidetr.conversion.start import start_from
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training.start import fit_to_weights

SELECTED = replace(TINY, queries="selected")
KNOWN = Categories(ids=(1, 2, 3), names=("cat", "dog", "bird"))
WANTED = Categories(ids=(5, 6), names=("ant", "bird"))


def weights_of(config):
    """Return the state and card of a model whose parameters are all off their start."""
    torch.manual_seed(1)
    state = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in DETR(config).state_dict().items()}
    return state, ModelCard(config, ImageConfig(), KNOWN, "lucid-zoo")


@pytest.mark.parametrize(
    "changes", [{}, {"query_groups": 2}, {"denoising": 0.4}, {"shared_heads": True}], ids=lambda c: next(iter(c), "own")
)
def test_rows_of_known_classes_are_kept_in_every_head(changes):
    config = replace(SELECTED, **changes)
    state, card = weights_of(config)
    model = DETR(replace(config, num_classes=2))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    notes = start_from(model, dict(state), card, WANTED)
    assert notes == [
        "all weights start from lucid-zoo",
        "the class head is new but for 1 of 2 categories of equal name: bird",
    ]
    by_class = {name for name in fresh if "category" in name or name == "hints.label.weight"}
    heads = 1 if config.shared_heads else config.decoder_layers
    assert len(by_class) == 2 * (heads + config.query_groups) + (config.denoising > 0)
    for name, tensor in model.state_dict().items():
        if name in by_class:
            assert torch.equal(tensor[0], fresh[name][0]), name
            assert torch.equal(tensor[1], state[name][2]), name
        else:
            assert torch.equal(tensor, state[name]), name


TAUGHT = replace(SELECTED, teach_tokens=True)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_class_head_of_taught_tokens_knows_names_too(groups):
    config = replace(TAUGHT, query_groups=groups)
    state, card = weights_of(config)
    names = ["queries.taught_category.weight"] if groups == 1 else [f"queries.{g}.taught_category.bias" for g in (0, 1)]
    smaller, turned = DETR(replace(config, num_classes=2)), DETR(config)
    start_from(smaller, dict(state), card, WANTED)
    start_from(turned, dict(state), card, Categories(ids=(1, 2, 3), names=("bird", "cat", "dog")))
    for name in names:
        assert torch.equal(smaller.state_dict()[name][1], state[name][2]), name
        assert torch.equal(turned.state_dict()[name], state[name][[2, 0, 1]]), name


def test_weights_fit_whether_or_not_their_tokens_were_taught():
    (plain, card), (taught, taught_card) = weights_of(SELECTED), weights_of(TAUGHT)
    model = DETR(TAUGHT)
    fresh = model.state_dict()["queries.taught_category.weight"].clone()
    notes = start_from(model, dict(plain), card, KNOWN)
    assert notes == ["all weights start from lucid-zoo", "the class head by which all tokens are taught is new"]
    assert torch.equal(model.state_dict()["queries.taught_category.weight"], fresh)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.items())
    model = DETR(SELECTED)
    assert start_from(model, dict(taught), taught_card, KNOWN) == ["all weights start from lucid-zoo"]
    assert all(torch.equal(tensor, taught[name]) for name, tensor in model.state_dict().items())


def test_hints_of_a_softmax_have_no_row_for_no_object():
    config = replace(TINY, classification="softmax", denoising=0.4)
    state, card = weights_of(config)
    model = DETR(replace(config, num_classes=2))
    start_from(model, dict(state), card, WANTED)
    found = model.state_dict()
    assert torch.equal(found["hints.label.weight"][1], state["hints.label.weight"][2])
    assert torch.equal(found["heads.2.category.weight"][1:], state["heads.2.category.weight"][2:])


def test_the_same_classes_in_another_order_follow_their_names():
    state, card = weights_of(SELECTED)
    model = DETR(SELECTED)
    start_from(model, dict(state), card, Categories(ids=(1, 2, 3), names=("bird", "cat", "dog")))
    for name in ("heads.0.category.weight", "heads.2.category.bias", "queries.category.weight"):
        assert torch.equal(model.state_dict()[name], state[name][[2, 0, 1]]), name


@pytest.mark.parametrize("queries", ["selected", "scored"])
def test_queries_of_tokens_may_be_more_without_being_new(queries):
    config = replace(SELECTED, queries=queries)
    state, card = weights_of(config)
    model = DETR(replace(config, num_queries=9))
    assert start_from(model, dict(state), card, KNOWN) == ["all weights start from lucid-zoo"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_weights_say_at_which_rates_they_go_on():
    state, card = weights_of(SELECTED)
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    plain = replace(recipe("lucid-m"), weights="here")
    config, notes = fit_to_weights(plain, Converted(state, card))
    assert (config.optimiser.lr, config.optimiser.backbone_lr) == pytest.approx((1e-4, 2e-5))
    said = "--optimiser.lr 0.0001 --optimiser.backbone-lr 2e-05"
    assert notes == [f"rates that fit the trained weights: {said}, by AdamW for all of them"]
    for own in (plain, recipe("lucid-s-lite0")):
        assert fit_to_weights(own, Converted(backbone, card)) == (own, [])


@pytest.mark.parametrize("groups", [1, 2])
def test_anchors_are_new_when_their_number_is(groups):
    config = replace(TINY, query_groups=groups)
    state, card = weights_of(config)
    model = DETR(replace(config, num_queries=9))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    notes = start_from(model, dict(state), card, KNOWN)
    assert notes[1:] == ["the 9 queries are new: the weights have 5"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name.startswith("queries.") else state[name]), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shared_heads": True}, ("shared_heads False there, True here", "--model.no-shared-heads")),
        ({"boxes": "relative"}, ("boxes refined there, relative here", "--model.boxes refined")),
        ({"box_bias": "rpb"}, ("box_bias gaussian there, rpb here", "--model.box-bias gaussian")),
        ({"fused": ()}, (r"fused \(8,\) there, \(\) here", "--model.fused 8")),
        ({"query_groups": 2}, ("query_groups 1 there, 2 here", "--model.query-groups 1")),
    ],
)
def test_another_kind_of_model_is_refused_with_what_makes_it_the_same(changes, said):
    state, card = weights_of(SELECTED)
    with pytest.raises(InputError, match=rf"of another model: {said[0]}: choose the recipe .*, or set {said[1]}$"):
        start_from(DETR(replace(SELECTED, **changes)), dict(state), card, KNOWN)
