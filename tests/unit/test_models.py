"""The network as a whole: sizes to the digit, shapes for every picture, gradients everywhere."""

from dataclasses import replace

import pytest
import torch

from lucidetr import recipes
from lucidetr.config import BackboneConfig, ModelConfig, TrainConfig
from lucidetr.models.backbones import ResNet
from lucidetr.models.detr import DETR
from lucidetr.models.memory import shrink_padding
from lucidetr.models.size import measure
from lucidetr.recipes import RECIPES, from_scratch, recipe

TINY = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8, norm="group"),
    num_classes=3,
    d_model=16,
    num_heads=2,
    head_dim=8,
    feed_forward=32,
    encoder_layers=1,
    decoder_layers=2,
    num_queries=5,
)


@pytest.mark.parametrize(
    ("name", "total", "learning"),
    [
        ("detr-r50", 41_524_768, 41_302_368),
        ("detr-r50-dc5", 41_524_768, 41_302_368),
        ("detr-r101", 60_464_672, 60_242_272),
        ("detr-r101-dc5", 60_464_672, 60_242_272),
    ],
)
def test_parameters_of_the_papers_models(name, total, learning):
    size = measure(recipe(name))
    assert (size.parameters, size.learning) == (total, learning)


@pytest.mark.parametrize(("layers", "millions"), [(0, 33.4), (3, 37.4), (6, 41.3), (12, 49.2)])
def test_parameters_by_encoder_depth_are_table_2(layers, millions):
    paper = recipe("detr-r50")
    size = measure(replace(paper, model=replace(paper.model, encoder_layers=layers)))
    assert round(size.learning / 1e6, 1) == millions


def test_without_pretrained_weights_nothing_is_frozen_and_it_is_said():
    config, notes = from_scratch(recipe("detr-r50"))
    assert config.model.backbone.norm == "group"
    assert config.freeze == ()
    assert config.optimiser.backbone_lr == config.optimiser.lr
    assert len(notes) == 3
    assert from_scratch(recipe("detr-xs")) == (recipe("detr-xs"), [])


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize(("dilation", "stride"), [(False, 32), (True, 16)])
def test_backbones_take_any_size(name, dilation, stride):
    backbone = ResNet(BackboneConfig(name=name, width=4, norm="group", dilation=dilation))
    for height, width in ((64, 96), (65, 33), (1, 1)):
        maps = backbone(torch.randn(1, 3, height, width))
        assert len(maps) == len(backbone.channels) == len(BackboneConfig(name=name, dilation=dilation).strides)
        assert maps[-1].shape == (1, backbone.channels[-1], -(-height // stride), -(-width // stride))


@pytest.mark.parametrize("encoder_block", ["post_norm", "pre_norm", "end_norm"])
@pytest.mark.parametrize("decoder_block", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("position", ["sine", "learned", "octaves"])
@pytest.mark.parametrize("norm", ["group", "batch", "frozen_batch"])
def test_every_form_predicts_and_learns(encoder_block, decoder_block, position, norm):
    torch.manual_seed(0)
    backbone = replace(TINY.backbone, norm=norm)
    config = replace(
        TINY, backbone=backbone, encoder_block=encoder_block, decoder_block=decoder_block, position=position
    )
    model = DETR(config)
    images, padding = torch.randn(2, 3, 70, 45), torch.zeros(2, 70, 45, dtype=torch.bool)
    padding[1, 50:], images[1, :, 50:] = True, 0
    predictions = model(images, padding)
    assert predictions.logits.shape == (2, 2, 5, 4)
    assert predictions.boxes_cxcywh.shape == (2, 2, 5, 4)
    assert ((predictions.boxes_cxcywh > 0) & (predictions.boxes_cxcywh < 1)).all()
    (predictions.logits.square().sum() + predictions.boxes_cxcywh.square().sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_a_gradient_reaches_every_parameter_but_those_of_the_empty_first_self_attention():
    """The first decoder layer attends over queries whose content is zero, as in the paper: its values are all
    alike, so its weights cannot matter until dropout tells the queries apart."""
    torch.manual_seed(0)
    model = DETR(replace(TINY, dropout=0.0, num_classes=3))
    predictions = model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    (predictions.logits.square().sum() + predictions.boxes_cxcywh.square().sum()).backward()
    silent = {name for name, p in model.named_parameters() if not (p.grad.abs() > 1e-9).any()}
    # a bias on all keys adds the same to every logit of a softmax: it never matters
    keys = {name for name, _ in model.named_parameters() if name.endswith("attention.key.bias")}
    assert {name for name in silent - keys if not name.startswith("decoder.layers.0.self_attention")} == set()
    assert "decoder.layers.0.self_attention.value.weight" in silent


def test_every_layer_is_read_by_the_same_heads_and_the_same_norm():
    model = DETR(replace(TINY, decoder_layers=3))
    assert sum("heads" in name for name in model.state_dict()) == 8
    assert sum(name.startswith("decoder.norm") for name in model.state_dict()) == 2


def test_dropout_is_off_in_evaluation():
    torch.manual_seed(0)
    model = DETR(replace(TINY, dropout=0.5)).eval()
    images, padding = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    assert torch.equal(model(images, padding).logits, model(images, padding).logits)
    model.train()
    assert not torch.equal(model(images, padding).logits, model(images, padding).logits)


def test_what_lies_in_padded_tokens_does_not_matter():
    """Beyond the receptive field of the picture's edge nothing of the padding reaches a prediction."""
    torch.manual_seed(0)
    model = DETR(replace(TINY, backbone=replace(TINY.backbone, norm="frozen_batch"))).eval()
    images, padding = torch.randn(1, 3, 64, 1024), torch.ones(1, 64, 1024, dtype=torch.bool)
    padding[:, :, :64] = False
    before = model(images, padding).logits
    images[..., 800:] = 77.0
    torch.testing.assert_close(model(images, padding).logits, before)


def test_padding_shrinks_to_the_first_pixel_of_each_cell():
    padding = torch.zeros(1, 6, 8, dtype=torch.bool)
    padding[:, 3:], padding[:, :, 5:] = True, True
    assert shrink_padding(padding, 2, 3).int().tolist() == [[[0, 0, 1], [1, 1, 1]]]


def test_no_recipe_hides_another():
    written = [config for config in vars(recipes).values() if isinstance(config, TrainConfig)]
    assert len(written) >= 6
    assert [config.recipe for config in written if RECIPES[config.recipe] is not config] == []
    assert [name for name, config in RECIPES.items() if config.recipe != name] == []
    assert {"detr-r50", "detr-r50-dc5", "detr-r101", "detr-r101-dc5"} < set(RECIPES)


def test_every_size_is_counted_without_memory_for_it():
    """Parameters of the meta model are those of a real one, and a wider picture asks for more arithmetic."""
    config = recipe("lucid-xs")
    size = measure(config)
    assert size.parameters == size.learning == sum(p.numel() for p in DETR(config.model).parameters())
    twice = measure(replace(config, images=replace(config.images, size=2 * config.images.size)))
    assert twice.parameters == size.parameters
    assert 3 < twice.gflops / size.gflops < 8
    frozen = measure(replace(config, freeze=("backbone",)))
    assert 0 < frozen.learning < frozen.parameters


def test_a_multiplication_and_its_sum_are_two_operations():
    """By hand: what a residual block more adds to every cell of its grid, and an encoder layer more to every token."""
    config = recipe("lucid-xs")
    model, backbone = config.model, config.model.backbone

    def added(**changes):
        return measure(replace(config, model=replace(model, **changes))).gflops - measure(config).gflops

    depths = (backbone.depths[0], backbone.depths[1] + 1, *backbone.depths[2:])
    channels, cells = 4 * backbone.width, (config.images.size // 8) ** 2
    block = 2 * 2 * 9 * channels**2 * cells  # two convolutions of 3 × 3
    assert added(backbone=replace(backbone, depths=depths)) == pytest.approx(block / 1e9, rel=1e-6)

    tokens, width = (config.images.size // backbone.strides[-1]) ** 2, model.num_heads * model.head_dim
    projections = 4 * 2 * tokens * model.d_model * width
    attention = 2 * 2 * tokens**2 * width  # queries times keys, weights times values
    feed_forward = 2 * 2 * tokens * model.d_model * model.feed_forward
    expected = (projections + attention + feed_forward) / 1e9
    assert added(encoder_layers=model.encoder_layers + 1) == pytest.approx(expected, rel=1e-6)
