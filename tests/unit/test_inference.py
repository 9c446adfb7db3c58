"""The network made quick for prediction: the same answers, the original untouched."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard
from lucidetr.deployment.detector import AHEAD, Detector, ahead
from lucidetr.deployment.inference import ENGINES, build_engine, quicken
from lucidetr.errors import InputError
from lucidetr.layers.norms import FrozenBatchNorm2d
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES
from lucidetr.training.precision import autocast

CPU = torch.device("cpu")
CATEGORIES = Categories(ids=tuple(range(10)), names=tuple(map(str, range(10))))


def network(config) -> DETR:
    """Return a network whose batch norms have seen something."""
    torch.manual_seed(0)
    model = DETR(config).eval()
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_(0, 0.1)
    return model


def answers(model: nn.Module, precision: str = "fp32"):
    """Return what a network says of a batch with padding."""
    torch.manual_seed(1)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[1, 64:], padding[1, :, 96:] = True, True
    images = torch.randn(2, 3, 96, 128).masked_fill(padding[:, None], 0.0)
    with torch.no_grad(), autocast(precision, CPU)():
        return model(images.to(next(model.heads.parameters()).dtype), padding)


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, {}) for name in ("detr-r50", "detr-r50-dc5", "lucid-xs", "lucid-s-lite0", "lucid-m")]
    + [("lucid-xs", {"box_bias": "gaussian", "boxes": "refined_twice"})]
    + [("lucid-xs", {"queries": "selected", "boxes": "refined"})],
)
def test_the_quick_network_says_the_same(name, changes):
    model = network(replace(RECIPES[name].model, **changes)).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quick = quicken(model, "fp32")
    expected, found = answers(model), answers(quick)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.boxes_cxcywh, expected.boxes_cxcywh, rtol=0, atol=1e-9)
    left = [type(part) for part in quick.modules() if isinstance(part, (nn.BatchNorm2d, FrozenBatchNorm2d))]
    assert not left, "every batch norm is folded"
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the network itself has changed"


@pytest.mark.parametrize("name", ["detr-xs", "lucid-xs"])
def test_weights_rounded_once_give_what_autocast_gives(name):
    model = network(RECIPES[name].model)
    quick = quicken(model, "bf16")
    for part in (quick.backbone.stem.conv, quick.encoder.layers[0].attention.query):
        assert part.weight.dtype == torch.bfloat16
    heads = [p for n, p in quick.named_parameters() if n.startswith(("heads.", "queries.")) or "norm" in n]
    assert heads and all(p.dtype == torch.float32 for p in heads), "boxes and norms stay in float32"
    expected, found = answers(model, "bf16"), answers(quick, "bf16")
    exact = answers(model)
    rounding = (expected.boxes_cxcywh - exact.boxes_cxcywh).abs().max()
    assert (found.boxes_cxcywh - exact.boxes_cxcywh).abs().max() <= 2 * rounding + 1e-3


def test_an_unknown_engine_is_refused():
    with pytest.raises(InputError, match="--engine tensorrt: choose one of torch, compile"):
        build_engine("tensorrt")
    assert ENGINES == ("torch", "compile")


def test_a_detector_sees_each_picture_alone_and_in_order():
    config = replace(RECIPES["lucid-xs"].model, num_classes=len(CATEGORIES))
    card = ModelCard(config, ImageConfig(size=64, resize="square"), CATEGORIES, "lucid-xs")
    detector = Detector(network(config), card, device="cpu", precision="fp32")
    pictures = np.random.default_rng(0).integers(0, 256, (7, 40, 50, 3), dtype=np.uint8)
    one_by_one = [detector.predict(picture) for picture in pictures]
    for found, alone in zip(detector.predict_many(iter(pictures)), one_by_one, strict=True):
        assert torch.equal(found.boxes_xyxy, alone.boxes_xyxy)
        assert torch.equal(found.scores, alone.scores)


def test_a_detector_computes_in_float64_where_it_is_asked_to():
    config = replace(RECIPES["lucid-xs"].model, num_classes=len(CATEGORIES))
    card = ModelCard(config, ImageConfig(size=64, resize="square"), CATEGORIES, "lucid-xs")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    exact, usual = (
        Detector(network(config), card, "cpu", precision).predict(picture) for precision in ("fp64", "fp32")
    )
    assert (exact.boxes_xyxy.dtype, usual.boxes_xyxy.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(exact.boxes_xyxy.float(), usual.boxes_xyxy, atol=1e-2, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_in_float64_are_used_as_the_precision_says(precision):
    config = replace(RECIPES["lucid-xs"].model, num_classes=len(CATEGORIES))
    card = ModelCard(config, ImageConfig(size=64, resize="square"), CATEGORIES, "lucid-xs")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    usual, given = (
        Detector(model, card, "cpu", precision).predict(picture)
        for model in (network(config), network(config).double())
    )
    assert given.boxes_xyxy.dtype == torch.float32
    assert torch.equal(given.boxes_xyxy, usual.boxes_xyxy)
    assert torch.equal(given.scores, usual.scores)


def test_work_is_done_ahead_but_not_far():
    asked, done = [], []

    def items():
        for number in range(20):
            asked.append(number)
            yield number

    for item, work in ahead(lambda item: item * item, items()):
        done.append(work.result())
        assert done[-1] == item**2
        assert len(asked) <= len(done) + AHEAD
    assert done == [number**2 for number in range(20)]


def test_an_error_comes_in_its_turn():
    def work(item):
        if item == 2:
            raise InputError("picture 2 is broken")
        return item

    done = []
    with pytest.raises(InputError, match="picture 2"):
        for _, result in ahead(work, range(10)):
            done.append(result.result())
    assert done == [0, 1]
