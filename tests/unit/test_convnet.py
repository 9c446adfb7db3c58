"""The small backbone, fused maps, and how residual branches start."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lucid_tools import TINY
from lucidetr.config import BackboneConfig
from lucidetr.layers.norms import NORMS
from lucidetr.models.backbones import BasicBlock, Bottleneck, ResNet
from lucidetr.models.convnet import ConvNet
from lucidetr.models.detr import DETR
from lucidetr.models.fusion import Fusion


@pytest.mark.parametrize("depths", [(1,), (0, 2), (1, 1, 1), (1, 0, 2, 1)])
def test_a_map_for_every_stage_each_half_the_one_before(depths):
    config = BackboneConfig(name="convnet", width=4, depths=depths, norm="group")
    backbone = ConvNet(config)
    assert config.strides == (4, 8, 16, 32)[: len(depths)]
    assert backbone.channels == (8, 16, 16, 32)[: len(depths)]
    for height, width in ((64, 96), (65, 33), (1, 1)):
        maps = backbone(torch.randn(2, 3, height, width))
        shapes = [
            (2, channels, -(-height // stride), -(-width // stride))
            for channels, stride in zip(backbone.channels, config.strides, strict=True)
        ]
        assert [tuple(each.shape) for each in maps] == shapes
    assert [len(stage.blocks) for stage in backbone.stages] == list(depths)


def test_the_stem_has_no_pool_and_stands_at_stride_2():
    backbone = ConvNet(BackboneConfig(name="convnet", width=4, norm="group"))
    assert backbone.stem(torch.randn(1, 3, 32, 48)).shape == (1, 4, 16, 24)
    kinds = {type(part) for part in backbone.modules()}
    assert not kinds & {nn.MaxPool2d, nn.AvgPool2d}


def test_dilated_resnets_give_one_map_for_each_stride_the_later_of_two():
    backbone = ResNet(BackboneConfig(name="resnet18", width=4, norm="group", dilation=True))
    images = torch.randn(1, 3, 64, 64)
    maps = backbone(images)
    assert [each.shape[-1] for each in maps] == [16, 8, 4]
    assert backbone.channels == (4, 8, 32)
    torch.testing.assert_close(maps[-1], backbone.stages(backbone.stem(images)))


@pytest.mark.parametrize("norm", ["batch", "group", "frozen_batch"])
@pytest.mark.parametrize("name", ["convnet", "resnet18", "resnet50"])
def test_zero_residual_blocks_begin_as_their_shortcut(name, norm):
    torch.manual_seed(0)
    backbone = BackboneConfig(name=name, width=4, norm=norm, zero_residual=True)
    quiet = blocks(DETR(replace(TINY, backbone=backbone, fused=())))
    assert len(quiet) == {"convnet": 3, "resnet18": 8, "resnet50": 16}[name]
    for block in quiet:
        x = torch.rand(2, block.conv1.in_channels, 6, 6)
        torch.testing.assert_close(block(x), block.shortcut(x).relu())
        if isinstance(block.shortcut, nn.Identity):
            assert torch.equal(block(x), x)
        zeros = {name for name, tensor in block.state_dict().items() if name.endswith("weight") and not tensor.any()}
        assert zeros == {"norm3.weight" if isinstance(block, Bottleneck) else "norm2.weight"}
    loud = blocks(DETR(replace(TINY, backbone=replace(backbone, zero_residual=False), fused=())))
    x = torch.rand(2, loud[-1].conv1.in_channels, 6, 6)
    assert not torch.allclose(loud[-1](x), loud[-1].shortcut(x).relu())


def blocks(model):
    return [part for part in model.backbone.modules() if isinstance(part, (BasicBlock, Bottleneck))]


def test_a_residual_start_of_zero_makes_the_transformer_s_layers_the_identity():
    torch.manual_seed(0)
    model = DETR(replace(TINY, residual_start="zero"))
    tokens, position = torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    assert torch.equal(model.encoder.layers[0](tokens, position, torch.zeros(2, 6, dtype=torch.bool)), tokens)
    images, padding = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    predictions = model(images, padding)
    content = model.decoder.norm(model.queries.content)
    for layer in range(TINY.decoder_layers):
        torch.testing.assert_close(predictions.logits[layer, 1], model.heads[layer](content)[0])


def test_a_scaled_residual_start_divides_the_last_layers_by_the_root_of_twice_the_layers():
    def state(start):
        torch.manual_seed(0)
        return DETR(replace(TINY, residual_start=start)).state_dict()

    plain, scaled, last = state("xavier"), state("scaled"), (".output.weight", ".contract.weight", ".contract.bias")
    changed = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    transformer = ("encoder.layers.", "decoder.layers.")
    assert changed == {name for name in plain if name.startswith(transformer) and name.endswith(last)}
    assert len(changed) == 3 * TINY.encoder_layers + 4 * TINY.decoder_layers
    for name in changed:
        torch.testing.assert_close(scaled[name], plain[name] / (2 * 4) ** 0.5)  # one layer and three


@pytest.mark.parametrize(("coarse", "fine"), [((3, 4), (6, 8)), ((3, 4), (5, 7)), ((1, 1), (2, 1)), ((2, 3), (2, 3))])
def test_fusing_spreads_each_cell_over_the_finer_grid(coarse, fine):
    fusion = Fusion(channels=5, d_model=4, norm="batch")
    fusion.smooth, fusion.norm = nn.Identity(), nn.Identity()
    nn.init.zeros_(fusion.lateral.bias)
    above, below = torch.rand(2, 4, *coarse), torch.randn(2, 5, *fine)
    fused = fusion(above, below)
    lateral = fusion.lateral(below)
    assert fused.shape == (2, 4, *fine)
    for row in range(fine[0]):
        for column in range(fine[1]):
            over = above[:, :, row * coarse[0] // fine[0], column * coarse[1] // fine[1]]
            torch.testing.assert_close(fused[:, :, row, column], (lateral[:, :, row, column] + over).relu())


@pytest.mark.parametrize(("fused", "stride"), [((), 16), ((8,), 8), ((8, 4), 4), ((4,), 4)])
def test_the_decoder_reads_the_finest_fused_map_whatever_the_size(fused, stride):
    model = DETR(replace(TINY, fused=fused))
    height, width = 75, 41
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, 40:], padding[1, :, 24:] = True, True
    memory = model.encode(model.backbone(torch.randn(2, 3, height, width)), padding)
    grid_h, grid_w = -(-height // stride), -(-width // stride)
    assert memory.tokens.shape == memory.keys.shape == (2, grid_h * grid_w, TINY.d_model)
    assert (memory.grid.rows.shape, memory.grid.columns.shape) == ((2, grid_h), (2, grid_w))
    hidden = memory.padding.view(2, grid_h, grid_w)
    assert not hidden[0].any()
    rows = sum(i * height // grid_h < 40 for i in range(grid_h))
    columns = sum(i * width // grid_w < 24 for i in range(grid_w))
    assert (~hidden[1]).sum() == rows * columns
    torch.testing.assert_close(memory.grid.rows[1, 0].item(), 0.5 / rows)
    assert [name for name, _ in model.fusion.named_children()] == [str(i) for i in range(len(fused))]


@pytest.mark.parametrize(("norm", "used"), [("frozen_batch", "group"), ("batch", "batch"), ("group", "group")])
def test_what_was_never_pretrained_has_no_frozen_norm(norm, used):
    model = DETR(replace(TINY, backbone=replace(TINY.backbone, norm=norm)))
    assert type(model.fusion[0].norm) is type(NORMS[used](TINY.d_model))
