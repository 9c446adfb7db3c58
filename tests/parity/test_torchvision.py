"""torchvision's ResNets with random weights and statistics: same features, and the classifier left out by name."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ModelConfig
from lucidetr.conversion.convert import convert
from lucidetr.conversion.start import start_from
from lucidetr.errors import InputError
from lucidetr.models.backbones import ResNet
from lucidetr.models.detr import DETR

TOLERANCE = 1e-4
slow = pytest.mark.slow


def features(network, images):
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dilation"),
    [
        ("resnet18", False),
        pytest.param("resnet50", True, marks=slow),
        pytest.param("resnet34", False, marks=slow),
        pytest.param("resnet50", False, marks=slow),
        pytest.param("resnet101", False, marks=slow),
        pytest.param("resnet101", True, marks=slow),
    ],
)
def test_features_are_the_same(name, dilation, randomised, pictures, tmp_path):
    stride_or_dilation = [False, False, dilation]
    theirs = randomised(lambda: getattr(torchvision.models, name)(replace_stride_with_dilation=stride_or_dilation))
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    converted = convert(tmp_path / f"{name}.pth")
    assert converted.card.model.backbone == BackboneConfig(name=name)
    assert "fc" in converted.notes[0]
    with torch.device("meta"):
        ours = ResNet(BackboneConfig(name=name, dilation=dilation)).eval()
    ours.load_state_dict(
        {key.removeprefix("backbone."): tensor for key, tensor in converted.state.items()}, assign=True
    )
    for images, _ in pictures:
        expected = features(theirs, images)
        difference = (ours(images)[-1] - expected).abs().max().item()
        print(f"{tuple(images.shape)}: largest difference {difference:.1e}, largest feature {expected.max():.1f}")
        assert difference <= TOLERANCE * max(1.0, expected.abs().max().item())


def test_a_model_starts_from_it(randomised, tmp_path):
    theirs = randomised(torchvision.models.resnet18)
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    converted = convert(tmp_path / "resnet18.pth")
    shape = {"d_model": 32, "num_heads": 4, "head_dim": 8, "encoder_layers": 1, "decoder_layers": 1}
    for norm in ("frozen_batch", "batch"):
        model = DETR(ModelConfig(backbone=BackboneConfig(name="resnet18", norm=norm, dilation=True), **shape))
        before = model.state_dict()["projection.weight"].clone()
        notes = start_from(model, converted.state, converted.card, Categories(ids=(1,), names=("cat",)))
        assert notes == ["the backbone starts from resnet18; the rest is new"]
        state = model.state_dict()
        assert torch.equal(state["backbone.stages.2.1.conv2.weight"], theirs.layer3[1].conv2.weight)
        assert torch.equal(
            state["backbone.stages.1.0.shortcut.norm.running_var"], theirs.layer2[0].downsample[1].running_var
        )
        assert torch.equal(state["projection.weight"], before)
    for backbone, said in (
        (BackboneConfig(name="resnet18", norm="group"), "set backbone.norm to frozen_batch"),
        (BackboneConfig(name="resnet34"), "set backbone.name to"),
        (BackboneConfig(name="resnet18", width=32), "set backbone.width to"),
    ):
        with pytest.raises(InputError, match=said):
            start_from(
                DETR(ModelConfig(backbone=backbone, **shape)), converted.state, converted.card, Categories((), ())
            )


def test_a_file_is_known_by_what_is_in_it_and_not_by_its_name(tmp_path):
    """Timm's ResNets are folders with a config.json and a model.safetensors, as Hugging Face's DETRs are."""
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", tmp_path):
        (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
        assert convert(source).card.recipe == "resnet18"
    (tmp_path / "config.json").unlink()
    assert convert(tmp_path / "model.safetensors").card.recipe == "resnet18"


def test_every_key_is_accounted_for(tmp_path):
    state = torchvision.models.resnet18().state_dict()

    def said(state):
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(InputError) as error:
            convert(tmp_path / "file.pth")
        return str(error.value)

    assert "no place in the other model: attnpool.weight" in said(state | {"attnpool.weight": torch.zeros(1)})
    assert "1 missing: stages.0.0.norm1.bias" in said({k: v for k, v in state.items() if k != "layer1.0.bn1.bias"})
    assert "none of resnet18, resnet34" in said({k: v for k, v in state.items() if not k.startswith("layer3.1.")})
    assert "is 64 × 3 × 3 × 3, expected" in said(state | {"conv1.weight": torch.zeros(64, 3, 3, 3)})
