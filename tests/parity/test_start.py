"""Starting from a whole detector: what is kept, what is new, and what is refused."""

from dataclasses import replace

import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, ModelCard, ModelConfig
from lucidetr.conversion.start import start_from
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR

MODEL = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8),
    num_classes=3,
    d_model=16,
    num_heads=2,
    head_dim=8,
    feed_forward=24,
    encoder_layers=1,
    decoder_layers=1,
    num_queries=5,
)
KNOWN = Categories(ids=(1, 2, 3), names=("cat", "dog", "bird"))
CARD = ModelCard(MODEL, ImageConfig(), KNOWN, "detr-zoo")
HEAD = "heads.category.weight"


@pytest.fixture(scope="module")
def state(randomised):
    return randomised(lambda: DETR(MODEL)).state_dict()


def test_same_classes_keep_everything(state):
    model = DETR(MODEL)
    assert start_from(model, state, CARD, KNOWN) == ["all weights start from detr-zoo"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_rows_of_equal_names_and_of_no_object_are_kept(state):
    wanted = Categories(ids=(10, 20), names=("horse", "dog"))
    model = DETR(replace(MODEL, num_classes=2, dropout=0.5))
    fresh = model.state_dict()[HEAD][0].clone()
    notes = start_from(model, state, CARD, wanted)
    assert notes[1] == "the class head is new but for 1 of 2 categories of equal name: dog"
    head = model.state_dict()[HEAD]
    assert torch.equal(head[0], fresh)
    assert torch.equal(head[1], state[HEAD][1])
    assert torch.equal(head[2], state[HEAD][3])
    assert model.state_dict()["heads.category.bias"][2] == state["heads.category.bias"][3]
    assert torch.equal(model.state_dict()["queries.position"], state["queries.position"])


def test_other_classes_in_the_same_number_are_not_confused(state):
    wanted = Categories(ids=(1, 2, 3), names=("bird", "car", "cat"))
    model = DETR(MODEL)
    start_from(model, state, CARD, wanted)
    head = model.state_dict()[HEAD]
    assert torch.equal(head[[0, 2, 3]], state[HEAD][[2, 0, 3]])
    assert not torch.equal(head[1], state[HEAD][1])
    none = Categories(ids=(1, 2, 3), names=("x", "y", "z"))
    assert "no category has a name that the weights know" in start_from(DETR(MODEL), state, CARD, none)[1]


def test_another_number_of_queries_starts_them_anew(state):
    model = DETR(replace(MODEL, num_queries=9))
    fresh = model.state_dict()["queries.position"].clone()
    notes = start_from(model, state, CARD, KNOWN)
    assert notes[1] == "the 9 queries are new: the weights have 5"
    assert torch.equal(model.state_dict()["queries.position"], fresh)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 4, "head_dim": 4}, "num_heads 2 there, 4 here"),
        ({"encoder_block": "pre_norm"}, "encoder_block post_norm there, pre_norm here"),
        ({"decoder_layers": 2}, "decoder_layers 1 there, 2 here"),
        ({"backbone": BackboneConfig(name="resnet18", width=8, norm="group")}, "set backbone.norm to frozen_batch"),
        ({"backbone": BackboneConfig(name="resnet18", width=8, dilation=True)}, "backbone.dilation False there"),
    ],
)
def test_another_model_is_refused_and_nothing_is_copied(changes, said, state):
    model = DETR(replace(MODEL, **changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=said):
        start_from(model, state, CARD, KNOWN)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_missing_and_left_over_tensors_are_listed(state):
    short = {name: tensor for name, tensor in state.items() if name != "decoder.norm.bias"}
    with pytest.raises(InputError, match=r"missing: decoder\.norm\.bias; left over: extra"):
        start_from(DETR(MODEL), short | {"extra": torch.zeros(1)}, CARD, KNOWN)
