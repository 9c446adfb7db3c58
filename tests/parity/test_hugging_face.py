"""Hugging Face's DETR with random weights: same logits and boxes from every layer, in both key layouts, and back."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, ModelCard, ModelConfig
from lucidetr.conversion.convert import convert, export_hugging_face
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR

TOLERANCE = 1e-4
SMALL = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "num_queries": 13,
    "id2label": {0: "N/A", 1: "cat", 2: "N/A", 3: "dog", 4: "bird"},
}
RESNET18 = ResNetConfig(
    layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], out_features=["stage4"]
)
NARROW_RESNET50 = ResNetConfig(embedding_size=16, hidden_sizes=[64, 128, 256, 512], out_features=["stage4"])
BACKBONES = {
    "timm-r18": {"use_timm_backbone": True, "backbone": "resnet18"},
    "own-r18": {"use_timm_backbone": False, "backbone_config": RESNET18},
    "own-narrow-r50": {"use_timm_backbone": False, "backbone_config": NARROW_RESNET50},
    "timm-r50-dc5": {"use_timm_backbone": True, "backbone": "resnet50", "dilation": True},
}
SLOW_DC5 = pytest.param("timm-r50-dc5", marks=pytest.mark.slow)  # the round trip below has DC5 in every run
FULL = {
    "timm-r50": {"use_timm_backbone": True, "backbone": "resnet50"},
    "own-r50": {"use_timm_backbone": False, "backbone_config": ResNetConfig(out_features=["stage4"])},
    "timm-r101": {"use_timm_backbone": True, "backbone": "resnet101"},
    "own-r101": {
        "use_timm_backbone": False,
        "backbone_config": ResNetConfig(depths=[3, 4, 23, 3], out_features=["stage4"]),
    },
    "timm-r50-dc5": {"use_timm_backbone": True, "backbone": "resnet50", "dilation": True},
    "timm-r101-dc5": {"use_timm_backbone": True, "backbone": "resnet101", "dilation": True},
}


def build(randomised, settings):
    return randomised(lambda: DetrForObjectDetection(DetrConfig(**settings)))


@torch.no_grad()
def outputs_of_every_layer(theirs, images, padding):
    """Return their logits and boxes after each decoder layer; theirs gives the last only, hooks see the others."""
    hidden = []
    hooks = [
        layer.register_forward_hook(lambda *a: hidden.append(a[-1][0] if isinstance(a[-1], tuple) else a[-1]))
        for layer in theirs.model.decoder.layers
    ]
    last = theirs(pixel_values=images, pixel_mask=(~padding).long())
    for hook in hooks:
        hook.remove()
    hidden = theirs.model.decoder.layernorm(torch.stack(hidden))
    logits, boxes = theirs.class_labels_classifier(hidden), theirs.bbox_predictor(hidden).sigmoid()
    assert torch.equal(logits[-1], last.logits)
    return logits, boxes


@torch.no_grad()
def assert_same(theirs, state, card, pictures):
    with torch.device("meta"):
        ours = DETR(card.model).eval()
    ours.load_state_dict(state, assign=True)
    for images, padding in pictures:
        found = ours(images, padding)
        logits, boxes = outputs_of_every_layer(theirs, images, padding)
        difference = (found.logits - logits).abs().max().item(), (found.boxes_cxcywh - boxes).abs().max().item()
        print(f"{tuple(images.shape)}: largest difference of logits {difference[0]:.1e}, of boxes {difference[1]:.1e}")
        assert boxes.std(dim=2).mean() > 1e-2, "queries that all say the same would prove little"
        assert max(difference) <= TOLERANCE


def write_current_layout(theirs, folder):
    """Write the folder with the names that the library's modules have now, which it never writes itself."""
    theirs.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize("backbone", ["timm-r18", "own-r18", "own-narrow-r50", SLOW_DC5])
def test_every_layer_gives_the_same(backbone, randomised, pictures, tmp_path):
    theirs = build(randomised, SMALL | BACKBONES[backbone])
    theirs.save_pretrained(tmp_path)
    converted = convert(tmp_path)
    assert converted.card.model.backbone.dilation == ("dc5" in backbone)
    assert_same(theirs, converted.state, converted.card, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FULL)
def test_published_size(backbone, randomised, larger_pictures, tmp_path):
    theirs = build(randomised, {"num_labels": 91} | FULL[backbone])
    theirs.save_pretrained(tmp_path)
    converted = convert(tmp_path)
    name = "detr-" + backbone.split("-", 1)[1]
    assert converted.card.recipe == name
    assert_same(theirs, converted.state, converted.card, larger_pictures)


@pytest.mark.parametrize("backbone", ["timm-r18", "own-r18"])
def test_both_key_layouts_mean_the_same(backbone, randomised, tmp_path):
    theirs = build(randomised, SMALL | BACKBONES[backbone])
    theirs.save_pretrained(tmp_path / "published")
    write_current_layout(theirs, tmp_path / "current")
    names = {layout: set(load_file(tmp_path / layout / "model.safetensors")) for layout in ("published", "current")}
    assert any(".conv_encoder." in name for name in names["published"])
    assert any(".o_proj." in name for name in names["current"])
    published, current = convert(tmp_path / "published"), convert(tmp_path / "current" / "model.safetensors")
    assert published.card == current.card
    assert published.state.keys() == current.state.keys()
    assert all(torch.equal(published.state[name], current.state[name]) for name in published.state)


def test_card_says_what_config_json_said(randomised, tmp_path):
    build(randomised, SMALL | BACKBONES["own-narrow-r50"]).save_pretrained(tmp_path)
    preprocessor = {"size": {"shortest_edge": 333, "longest_edge": 555}, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    card = convert(tmp_path).card
    assert card.model == ModelConfig(
        backbone=BackboneConfig(name="resnet50", width=16, norm="frozen_batch"),
        num_classes=5,
        d_model=48,
        num_heads=4,
        head_dim=12,
        feed_forward=56,
        encoder_layers=2,
        decoder_layers=3,
        num_queries=13,
    )
    assert card.categories == Categories(ids=(0, 1, 2, 3, 4), names=("N/A 0", "cat", "N/A 2", "dog", "bird"))
    assert card.images == ImageConfig(size=333, max_size=555, mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("written", [{"dilation": True}, {"dilation": True, "backbone_kwargs": {"output_stride": 16}}])
def test_config_json_of_version_4(written, randomised, tmp_path):
    build(randomised, SMALL | BACKBONES["timm-r50-dc5"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"backbone": "resnet50", "use_timm_backbone": True, "backbone_config": None, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | old | written))
    assert convert(tmp_path).card.model.backbone == BackboneConfig(name="resnet50", dilation=True)


def small_card(**changes) -> ModelCard:
    model = ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=16),
        num_classes=3,
        d_model=32,
        num_heads=4,
        head_dim=8,
        feed_forward=40,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=7,
    )
    return ModelCard(
        model=replace(model, **changes),
        images=ImageConfig(size=200, max_size=300, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
        categories=Categories(ids=(3, 1, 7), names=("red", "white", "blue")),
        recipe="converted",
    )


@pytest.mark.parametrize(
    "backbone",
    [
        BackboneConfig(name="resnet18", width=16),
        BackboneConfig(name="resnet50", width=16, norm="batch"),
        BackboneConfig(name="resnet50", dilation=True),
    ],
    ids=["own-r18", "own-r50-batch-norm", "timm-r50-dc5"],
)
def test_round_trip_through_from_pretrained(backbone, randomised, pictures, tmp_path):
    card = small_card(backbone=backbone)
    state = randomised(lambda: DETR(card.model)).state_dict()
    export_hugging_face(state, card, tmp_path)
    theirs, report = DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(theirs.eval(), state, card, pictures[-1:])
    assert theirs.config.id2label == {0: "red", 1: "white", 2: "blue"}
    back = convert(tmp_path)
    assert back.card.categories == card.categories
    assert back.card.images == card.images
    assert replace(back.card.model, backbone=backbone) == card.model
    assert all(torch.equal(state[name], tensor) for name, tensor in back.state.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": BackboneConfig(name="resnet18", norm="group")}, "backbone.norm is group"),
        ({"backbone": BackboneConfig(name="resnet18", dilation=True)}, "only ResNets of width 64 agree"),
        ({"encoder_block": "pre_norm"}, "post_norm"),
        ({"head_dim": 16}, "num_heads × head_dim is not d_model"),
        ({"position": "learned"}, "position is learned"),
    ],
)
def test_a_model_that_the_library_cannot_build_is_refused(changes, said, tmp_path):
    card = small_card(**changes)
    with pytest.raises(InputError, match=said):
        export_hugging_face(DETR(card.model).state_dict(), card, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def folder(randomised, tmp_path_factory):
    place = tmp_path_factory.mktemp("detr")
    build(randomised, SMALL | BACKBONES["own-r18"]).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auxiliary_loss": True}, "auxiliary_loss is True"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"model_type": "conditional_detr"}, "model_type is 'conditional_detr'"),
        ({"decoder_attention_heads": 2}, "encoder_attention_heads and decoder_attention_heads differ"),
        ({"encoder_attention_heads": 5, "decoder_attention_heads": 5}, "5 heads do not divide d_model 48"),
        ({"id2label": {"0": "cat"}}, "names 1 in id2label"),
        ({"backbone_config": {"model_type": "swin"}}, "model_type 'swin' is not known"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}}, "do not belong together"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet50d"}}, "resnet50d is not known"),
        ({"backbone_config": {"model_type": "resnet", "downsample_in_bottleneck": True}}, "downsample_in_bottleneck"),
        *(
            ({f"{part}_attention_heads": heads for part in ("encoder", "decoder")}, said)
            for heads, said in (
                (None, r"config\.json: cannot be used"),
                ("x", r"config\.json: cannot be used .*'x'"),
                ([8], r"config\.json: cannot be used"),
                (0, "0 heads do not divide"),
            )
        ),
        ({"encoder_ffn_dim": "x"}, r"config\.json: cannot be used"),
        ({"backbone_config": "resnet"}, r"config\.json: cannot be used"),
        ({"backbone_config": {"model_type": "resnet", "out_indices": 4}}, r"config\.json: cannot be used"),
        ({"category_ids": list("abcde")}, r"config\.json: cannot be used .*'a'"),
        ({"category_ids": [1] * 5}, r"config\.json: cannot be used .*given twice"),
    ],
)
def test_a_setting_that_we_do_not_build_is_refused(changes, said, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError, match=said):
        convert(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"rescale_factor": None}, {"rescale_factor": "x"}, {"image_mean": 3}, {"size": -5}, {"size": [3]}]
)
def test_a_preprocessor_that_cannot_be_used_is_refused(changes, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changes))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: "):
        convert(tmp_path)


def test_every_key_is_accounted_for(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    whole = load_file(folder / "model.safetensors")
    gone = "model.decoder.layers.1.fc1.bias"

    def said(state):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(InputError) as error:
            convert(tmp_path)
        return str(error.value)

    assert "model.extra.weight, model.mask_head.x" in said(
        whole | {"model.extra.weight": torch.zeros(1), "model.mask_head.x": torch.zeros(1)}
    )
    assert "1 missing: decoder.layers.1.feed_forward.expand.bias" in said(
        {name: tensor for name, tensor in whole.items() if name != gone}
    )
    assert "decoder.layers.1.feed_forward.expand.bias is 55, expected 56" in said(whole | {gone: torch.zeros(55)})
    counted = whole | {"model.backbone.conv_encoder.model.bn1.num_batches_tracked": torch.tensor(3)}
    save_file(counted, tmp_path / "model.safetensors")
    assert convert(tmp_path).state.keys() == convert(folder).state.keys()
