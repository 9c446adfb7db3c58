"""facebookresearch/detr files with random weights: same outputs as their layout computed with torch's own parts."""

import argparse
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, ModelCard, ModelConfig
from lucidetr.conversion.coco_names import coco_categories
from lucidetr.conversion.convert import convert, export_facebook
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR

TOLERANCE = 1e-4


class Layer(nn.Module):
    """An encoder or decoder layer whose parameters have the paper's names; torch's own attention is packed as there."""

    def __init__(self, d_model, heads, hidden, attentions, pre_norm):
        super().__init__()
        for name in attentions:
            setattr(self, name, nn.MultiheadAttention(d_model, heads, batch_first=True))
        for i in range(len(attentions) + 1):
            setattr(self, f"norm{i + 1}", nn.LayerNorm(d_model))
        self.linear1, self.linear2 = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)
        self.pre_norm = pre_norm

    def residual(self, number, x, part):
        norm = getattr(self, f"norm{number}")
        return x + part(norm(x)) if self.pre_norm else norm(x + part(x))

    def feed_forward(self, x):
        return self.linear2(F.relu(self.linear1(x)))


class Encode(Layer):
    def forward(self, x, position, padding):
        def attend(y):
            return self.self_attn(y + position, y + position, y, key_padding_mask=padding)[0]

        return self.residual(2, self.residual(1, x, attend), self.feed_forward)


class Decode(Layer):
    def forward(self, x, query, memory, position, padding):
        def agree(y):
            return self.self_attn(y + query, y + query, y)[0]

        def look(y):
            return self.multihead_attn(y + query, memory + position, memory, key_padding_mask=padding)[0]

        x = self.residual(2, self.residual(1, x, agree), look)
        return self.residual(3, x, self.feed_forward)


def sine(padding, channels):
    """The paper's position encoding, one channel at a time."""
    seen = (~padding).float()
    planes = []
    for axis in (1, 2):
        count = seen.cumsum(axis)
        angle = count / (count.amax(axis, keepdim=True) + 1e-6) * 2 * torch.pi
        for channel in range(channels // 2):
            wave = torch.cos if channel % 2 else torch.sin
            planes.append(wave(angle / 10000 ** (2 * (channel // 2) / (channels // 2))))
    return torch.stack(planes, dim=-1).flatten(1, 2)


class PaperDETR(nn.Module):
    """The paper's network in torchvision's and torch's parts, laid out so that its state_dict has the file's keys."""

    def __init__(self, backbone, dilation, args):
        super().__init__()
        body = getattr(torchvision.models, backbone)(
            weights=None,
            norm_layer=torchvision.ops.FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        features = body.fc.in_features
        del body.fc
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        d_model, common = args.hidden_dim, (args.hidden_dim, args.nheads, args.dim_feedforward)
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = nn.Module(), nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            Encode(*common, ["self_attn"], args.pre_norm) for _ in range(args.enc_layers)
        )
        if args.pre_norm:
            self.transformer.encoder.norm = nn.LayerNorm(d_model)
        self.transformer.decoder.layers = nn.ModuleList(
            Decode(*common, ["self_attn", "multihead_attn"], args.pre_norm) for _ in range(args.dec_layers)
        )
        self.transformer.decoder.norm = nn.LayerNorm(d_model)
        self.class_embed = nn.Linear(d_model, args.num_classes + 1)
        self.bbox_embed = nn.Module()
        self.bbox_embed.layers = nn.ModuleList(
            [nn.Linear(d_model, d_model) for _ in range(2)] + [nn.Linear(d_model, 4)]
        )
        self.query_embed = nn.Embedding(args.num_queries, d_model)
        self.input_proj = nn.Conv2d(features, d_model, kernel_size=1)

    def forward(self, images, padding):
        body, transformer = self.backbone[0]["body"], self.transformer
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        x = self.input_proj(body.layer4(body.layer3(body.layer2(body.layer1(x)))))
        padding = F.interpolate(padding[:, None].float(), x.shape[-2:])[:, 0].bool()
        position, x = sine(padding, x.shape[1]), x.flatten(2).transpose(1, 2)
        for layer in transformer.encoder.layers:
            x = layer(x, position, padding.flatten(1))
        if hasattr(transformer.encoder, "norm"):
            x = transformer.encoder.norm(x)
        query = self.query_embed.weight.expand(len(x), -1, -1)
        content, hidden = torch.zeros_like(query), []
        for layer in transformer.decoder.layers:
            content = layer(content, query, x, position, padding.flatten(1))
            hidden.append(transformer.decoder.norm(content))
        hidden = torch.stack(hidden)
        first, second, last = self.bbox_embed.layers
        return self.class_embed(hidden), last(F.relu(second(F.relu(first(hidden))))).sigmoid()


def options(**changes) -> argparse.Namespace:
    """What the training script keeps in its files, made small, and three of the settings that we do not read."""
    small = {
        "hidden_dim": 48,
        "nheads": 4,
        "dim_feedforward": 56,
        "enc_layers": 2,
        "dec_layers": 3,
        "num_queries": 13,
        "num_classes": 91,
        "dropout": 0.0,
        "dilation": False,
        "pre_norm": False,
        "lr": 1e-4,
        "resume": "",
        "frozen_weights": None,
    }
    return argparse.Namespace(**(small | changes))


PAPER = {"hidden_dim": 256, "nheads": 8, "dim_feedforward": 2048, "enc_layers": 6, "dec_layers": 6, "num_queries": 100}


@torch.no_grad()
def assert_same(theirs, converted, pictures):
    with torch.device("meta"):
        ours = DETR(converted.card.model).eval()
    ours.load_state_dict(converted.state, assign=True)
    for images, padding in pictures:
        found = ours(images, padding)
        logits, boxes = theirs(images, padding)
        difference = (found.logits - logits).abs().max().item(), (found.boxes_cxcywh - boxes).abs().max().item()
        print(f"{tuple(images.shape)}: largest difference of logits {difference[0]:.1e}, of boxes {difference[1]:.1e}")
        assert boxes.std(dim=2).mean() > 1e-2, "queries that all say the same would prove little"
        assert max(difference) <= TOLERANCE


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("resnet18", {}),
        ("resnet18", {"pre_norm": True}),
        pytest.param("resnet50", {"dilation": True}, marks=pytest.mark.slow),
    ],
    ids=["r18", "r18-pre-norm", "r50-dc5"],
)
def test_every_layer_gives_the_same(backbone, changes, randomised, pictures, tmp_path):
    args = options(**changes)
    theirs = randomised(lambda: PaperDETR(backbone, args.dilation, args))
    training = {"model": theirs.state_dict(), "optimizer": {"state": {}}, "epoch": 3, "args": args}
    torch.save(training, tmp_path / "checkpoint.pth")
    converted = convert(tmp_path / "checkpoint.pth")
    assert converted.card.model.backbone == BackboneConfig(name=backbone, dilation=args.dilation)
    assert_same(theirs, converted, pictures)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "backbone", "dilation"),
    [
        ("detr-r50-e632da11.pth", "resnet50", False),
        ("detr-r50-dc5-f0fb7ef5.pth", "resnet50", True),
        ("detr-r101-2c7b67e5.pth", "resnet101", False),
        ("detr-r101-dc5-a2e86def.pth", "resnet101", True),
    ],
)
def test_published_size(file, backbone, dilation, randomised, larger_pictures, tmp_path):
    theirs = randomised(lambda: PaperDETR(backbone, dilation, options(**PAPER)))
    torch.save({"model": theirs.state_dict()}, tmp_path / file)
    converted = convert(tmp_path / file)
    assert converted.card.recipe == re.match(r"detr-r\d+(-dc5)?", file)[0]
    assert_same(theirs, converted, larger_pictures)


@pytest.fixture(scope="module")
def tensors(randomised):
    return randomised(lambda: PaperDETR("resnet18", False, options())).state_dict()


def test_coco_head_is_kept_with_ids_and_names(tensors, tmp_path):
    torch.save({"model": tensors}, tmp_path / "file.pth")
    converted = convert(tmp_path / "file.pth", dilation=False, num_heads=4)
    assert torch.equal(converted.state["heads.category.weight"], tensors["class_embed.weight"])
    assert len(converted.state["heads.category.weight"]) == 92
    categories = converted.card.categories
    assert categories == coco_categories()
    assert [categories.ids[categories.names.index(name)] for name in ("person", "stop sign", "toothbrush")] == [
        1,
        13,
        90,
    ]
    unused = [i for i, name in zip(categories.ids, categories.names, strict=True) if name.startswith("N/A ")]
    assert unused == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


def test_what_tensors_do_not_show_must_be_said_once(tensors, tmp_path):
    file = tmp_path / "file.pth"
    torch.save({"model": tensors}, file)
    with pytest.raises(InputError, match="does not say its dilation"):
        convert(file)
    with pytest.raises(InputError, match="does not say its num_heads"):
        convert(file, dilation=True)
    torch.save({"model": tensors, "args": options()}, file)
    with pytest.raises(InputError, match="num_heads is 4 in the file, not 8"):
        convert(file, num_heads=8)


def test_other_classes_get_names_and_say_so(randomised, tmp_path):
    theirs = randomised(lambda: PaperDETR("resnet18", False, options(num_classes=3)))
    torch.save({"model": theirs.state_dict(), "args": options(num_classes=3)}, tmp_path / "file.pth")
    converted = convert(tmp_path / "file.pth")
    assert converted.card.categories == Categories(ids=(0, 1, 2), names=("class 0", "class 1", "class 2"))
    assert "names no classes" in converted.notes[0]


def test_every_key_is_accounted_for(tensors, tmp_path):
    def said(state):
        torch.save({"model": state, "args": options()}, tmp_path / "file.pth")
        with pytest.raises(InputError) as error:
            convert(tmp_path / "file.pth")
        return str(error.value)

    assert "2 names have no place in the other model: mask_head.lay1.weight, extra" in said(
        tensors | {"mask_head.lay1.weight": torch.zeros(1), "extra": torch.zeros(1)}
    )
    gone = "transformer.decoder.layers.2.self_attn.in_proj_bias"
    message = said({name: tensor for name, tensor in tensors.items() if name != gone})
    assert "3 missing" in message
    assert "decoder.layers.2.self_attention.key.bias" in message
    name = "backbone.0.body.layer2.0.bn1.running_var"
    assert "backbone.stages.1.0.norm1.running_var is 3, expected 128" in said(tensors | {name: torch.zeros(3)})
    half = {"backbone.1.row_embed.weight": torch.zeros(50, 24)}
    assert "position.column" in said(tensors | half)
    counted = tensors | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}
    torch.save({"model": counted, "args": options()}, tmp_path / "file.pth")
    convert(tmp_path / "file.pth")


def test_learned_positions_keep_their_order(tmp_path):
    """The paper's code puts the column's half first, its waves the row's."""
    model = ModelConfig(
        backbone=BackboneConfig(name="resnet18"), d_model=8, num_heads=1, head_dim=8, position="learned"
    )
    card = ModelCard(model, ImageConfig(), Categories(tuple(range(91)), tuple(f"c{i}" for i in range(91))), "converted")
    ours = DETR(model)
    export_facebook(ours.state_dict(), card, tmp_path / "ours.pth")
    payload = torch.load(tmp_path / "ours.pth", weights_only=False)["model"]
    cell = torch.cat([payload["backbone.1.col_embed.weight"][3], payload["backbone.1.row_embed.weight"][2]])
    encoding = ours.position(torch.zeros(1, 5, 6, dtype=torch.bool), torch.float32)
    assert torch.equal(encoding[0, :, 2, 3], cell)
    back = convert(tmp_path / "ours.pth")
    assert back.card == card
    assert torch.equal(back.state["position.row"], ours.state_dict()["position.row"])


def test_round_trip(randomised, pictures, tmp_path):
    model = ModelConfig(
        backbone=BackboneConfig(name="resnet18"),
        num_classes=3,
        d_model=48,
        num_heads=4,
        head_dim=12,
        feed_forward=56,
        encoder_layers=2,
        decoder_layers=3,
        num_queries=13,
        dropout=0.0,
    )
    images = ImageConfig(resize="square", size=320, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    card = ModelCard(model, images, Categories(ids=(3, 1, 7), names=("red", "white", "blue")), "converted")
    state = randomised(lambda: DETR(model)).state_dict()
    export_facebook(state, card, tmp_path / "ours.pth")
    back = convert(tmp_path / "ours.pth")
    assert back.card == card
    assert not back.notes
    assert back.state.keys() == state.keys()
    assert all(torch.equal(back.state[name], tensor) for name, tensor in state.items())
    payload = torch.load(tmp_path / "ours.pth", weights_only=False)  # as their code reads it; we have just written it
    theirs = PaperDETR("resnet18", False, argparse.Namespace(**(vars(payload["args"]) | {"num_classes": 3})))
    theirs.load_state_dict(payload["model"])
    assert_same(theirs.eval(), back, pictures[-1:])
    group = replace(card, model=replace(model, backbone=BackboneConfig(name="resnet18", norm="group")))
    with pytest.raises(InputError, match=r"backbone\.norm is group"):
        export_facebook(DETR(group.model).state_dict(), group, tmp_path / "group.pth")


def test_a_file_without_sizes_says_what_is_assumed(tensors, tmp_path):
    torch.save({"model": tensors, "args": options()}, tmp_path / "file.pth")
    converted = convert(tmp_path / "file.pth")
    assert converted.card.images == ImageConfig()
    assert "the paper's sizes and normalisation are assumed" in converted.notes[-1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nheads": 0}, r"file\.pth: 0 heads do not divide"),
        ({"images": {"size": "large"}}, r"file\.pth: images: cannot be used"),
        ({"images": {"sise": 320}}, r"file\.pth: images: cannot be used .*did you mean size"),
        (
            {"category_names": ["a"] * 91, "category_ids": ["x"] * 91},
            r"file\.pth: category_ids: cannot be used .*'x'",
        ),
    ],
)
def test_options_that_cannot_be_used_are_refused(tensors, tmp_path, changes, said):
    torch.save({"model": tensors, "args": options(**changes)}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=said):
        convert(tmp_path / "file.pth")


class Payload:
    """Pickled, it is a program that creates a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def as_archive(content, path):
    torch.save(content, path)


def as_old_torch_file(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def as_old_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [as_archive, as_old_torch_file, as_pickle, as_old_pickle])
@pytest.mark.parametrize("hidden", ["model", "args"])
def test_a_file_that_wants_to_run_code_is_refused(write, hidden, tmp_path):
    canary = tmp_path / "canary"
    payload = Payload(canary) if hidden == "model" else argparse.Namespace(nheads=Payload(canary))
    write({hidden: payload, "query_embed.weight": 1}, tmp_path / "evil.pth")
    with pytest.raises(
        InputError, match=r"evil\.pth: (refused\. Reading it would run code|not a weight file)"
    ) as error:
        convert(tmp_path / "evil.pth")
    if write in (as_archive, as_old_torch_file):
        assert "(open)" in str(error.value) or "io.open" in str(error.value)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary))).close()  # noqa: S301 - the proof that the payload is a real one
    assert canary.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off", bytes(range(256))])
def test_a_file_that_is_no_weight_file_says_so(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"file\.pth: not a .*weight file"):
        convert(tmp_path / "file.pth")


def test_unknown_kinds_say_what_is_known(tmp_path):
    for content in ({"a.weight": torch.zeros(1)}, {"model": torch.zeros(1)}, {"epoch": 3}, torch.zeros(1), {}):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(InputError, match=r"file\.pth: "):
            convert(tmp_path / "file.pth")
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "none.pth")
