"""The network as a whole: sizes to the digit, shapes for every picture, gradients everywhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lucidetr import recipes
from lucidetr.config import BackboneConfig, ModelConfig, TrainConfig
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.fields import difference, with_fields
from lucidetr.layers.box_bias import Grid
from lucidetr.models.backbones import ResNet
from lucidetr.models.decoder import DecoderLayer
from lucidetr.models.detr import DETR
from lucidetr.models.encoder import EncoderLayer
from lucidetr.models.memory import Memory, shrink_padding
from lucidetr.models.size import measure, parameters_by_part, parts_table
from lucidetr.recipes import DETR_222M, DETR_R50, RECIPES, fine_tuned, from_scratch, recipe
from lucidetr.structures import Batch
from lucidetr.training.optimiser import build_optimiser

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


def test_without_pretrained_weights_what_was_asked_for_stays():
    asked = with_fields(recipe("lucid-s"), {"optimiser.backbone_lr": 1e-5, "freeze": ["backbone.stem"]})
    assert from_scratch(asked) == (asked, [])
    asked = with_fields(recipe("detr-r50"), {"optimiser.backbone_lr": 3e-5, "freeze": ["backbone.stem", "encoder"]})
    config, notes = from_scratch(asked)
    assert difference(config, asked) == {"model.backbone.norm": ("group", "frozen_batch")}
    assert len(notes) == 1
    faster = with_fields(recipe("lucid-s"), {"optimiser.lr": 3e-3})
    assert from_scratch(faster)[0].optimiser.backbone_lr == 3e-3, "a rate alone takes the backbone along"
    assert len(from_scratch(replace(recipe("detr-r50"), recipe="mine"))[1]) == 3


@pytest.mark.parametrize(
    ("name", "changes", "detector", "backbone"),
    [
        ("lucid-m", {}, (1e-4, 2e-5), (5e-4, 5e-4)),
        ("lucid-s-lite0", {}, (3e-4, 6e-5), (1.5e-3, 1.5e-3)),
        ("lucid-m", {"optimiser.lr": 1e-3}, (1e-3, 2e-4), (1e-3, 1e-3)),
        ("lucid-s-lite0", {"optimiser.lr": 3e-4}, (3e-4, 6e-5), (3e-4, 3e-4)),
        ("lucid-m", {"optimiser.backbone_lr": 7e-6}, (1e-4, 7e-6), (5e-4, 7e-6)),
        ("detr-r50", {}, (1e-4, 1e-5), (1e-4, 1e-5)),
        ("detr-r50", {"optimiser.lr": 1e-3}, (1e-3, 1e-5), (1e-3, 1e-5)),
    ],
)
def test_a_detector_goes_on_slower_and_what_has_a_trained_backbone_alone_does_not(name, changes, detector, backbone):
    config = with_fields(recipe(name), changes)
    for alone, rates in ((False, detector), (True, backbone)):
        tuned = fine_tuned(config, alone)
        assert (tuned.optimiser.lr, tuned.optimiser.backbone_lr) == pytest.approx(rates)
        assert tuned.optimiser.matrices == (config.optimiser.matrices if alone else "adamw")
        assert replace(tuned, optimiser=config.optimiser) == config
        assert fine_tuned(tuned, alone) == tuned


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize(("dilation", "stride"), [(False, 32), (True, 16)])
def test_backbones_take_any_size(name, dilation, stride):
    backbone = ResNet(BackboneConfig(name=name, width=4, norm="group", dilation=dilation))
    for height, width in ((64, 96), (65, 33), (1, 1)):
        maps = backbone(torch.randn(1, 3, height, width))
        assert len(maps) == len(backbone.channels) == len(BackboneConfig(name=name, dilation=dilation).strides)
        assert maps[-1].shape == (1, backbone.channels[-1], -(-height // stride), -(-width // stride))


ENCODER_BLOCKS = ("post_norm", "pre_norm", "end_norm", "no_residual")
DECODER_BLOCKS = ("post_norm", "pre_norm", "no_residual", "shared_norm")
BLOCKS = [{"encoder_block": e, "decoder_block": d} for e in ENCODER_BLOCKS for d in DECODER_BLOCKS]
OTHERS = [
    *({"position": position} for position in ("learned", "octaves", "none")),
    *({"position": position, "position_at": "input"} for position in ("sine", "learned", "none")),
    {"queries": "content"},
    {"feed_forward": 0},
    {"position_at": "input", "queries": "content", "feed_forward": 0},
    *({"backbone": replace(TINY.backbone, norm=norm)} for norm in ("batch", "frozen_batch")),
]
FORMS = BLOCKS + OTHERS + [{"encoder_block": "end_norm", "decoder_block": "shared_norm"} | other for other in OTHERS]


@pytest.mark.parametrize("changes", FORMS, ids=lambda changes: " ".join(map(str, changes.values())))
def test_every_form_predicts_and_learns(changes):
    torch.manual_seed(0)
    model = DETR(replace(TINY, **changes))
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


def names(**changes):
    """Return the names in the state of a tiny model, without the numbers of layers."""
    return {
        name.replace("layers.0", "layers.1") for name in DETR(replace(TINY, encoder_layers=2, **changes)).state_dict()
    }


def test_what_is_not_there_has_no_name_in_the_state():
    papers = names()
    for changes in (
        {"encoder_block": "no_residual", "decoder_block": "no_residual"},
        {"position": "none"},
        {"position_at": "input"},
    ):
        assert names(**changes) == papers
    unshared = {"cross_attention_path.norm", "feed_forward_path.norm"}
    gone = {f"decoder.layers.1.{norm}" for norm in unshared} | {"decoder.norm"}
    assert papers - names(decoder_block="shared_norm") == {
        f"{each}.{leaf}" for each in gone for leaf in ("weight", "bias")
    }
    assert names(feed_forward=0) == {name for name in papers if ".feed_forward" not in name}
    assert names(queries="content") == papers - {"queries.position"} | {"queries.content"}
    ended = names(encoder_block="end_norm", feed_forward=0)
    assert not any("norm" in name for name in ended if name.startswith("encoder."))


def build(kind, **changes):
    """Return an encoder or decoder layer whose norms are not the identity, tokens, and positions."""
    torch.manual_seed(0)
    layer = kind(replace(TINY, dropout=0.0, **changes))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer, torch.randn(2, 6, 16), torch.randn(2, 6, 16)


def test_encoder_blocks_without_residual_or_feed_forward_are_what_they_say():
    padding = torch.zeros(2, 6, dtype=torch.bool)
    layer, x, position = build(EncoderLayer, encoder_block="no_residual")
    attended = layer.attention_path.norm(layer.attention(x + position, x + position, x))
    expected = layer.feed_forward_path.norm(layer.feed_forward(attended))
    torch.testing.assert_close(layer(x, position, padding), expected)
    layer, x, position = build(EncoderLayer, encoder_block="end_norm", feed_forward=0)
    torch.testing.assert_close(layer(x, position, padding), x + layer.attention(x + position, x + position, x))
    layer, x, position = build(EncoderLayer, feed_forward=0)
    attended = layer.attention_path.norm(x + layer.attention(x + position, x + position, x))
    torch.testing.assert_close(layer(x, position, padding), attended)


@pytest.mark.parametrize("feed_forward", [0, 32])
@pytest.mark.parametrize("block", ["no_residual", "shared_norm"])
def test_decoder_blocks_are_what_they_say(block, feed_forward):
    layer, x, position = build(DecoderLayer, decoder_block=block, feed_forward=feed_forward)
    tokens, keys = torch.randn(2, 4, 16), torch.randn(2, 4, 16)
    grid = Grid(torch.tensor([[0.25, 0.75]] * 2), torch.tensor([[0.25, 0.75]] * 2))
    memory = Memory(tokens, keys, torch.zeros(2, 4, dtype=torch.bool), grid)
    result = layer(x, position, None, memory, 1)
    shared = block == "shared_norm"
    first = layer.self_attention_path.norm
    second = first if shared else layer.cross_attention_path.norm
    x = first(shared * x + layer.self_attention(x + position, x + position, x))
    x = second(shared * x + layer.cross_attention(x + position, keys, tokens))
    if feed_forward:
        x = x + layer.feed_forward(x) if shared else layer.feed_forward_path.norm(layer.feed_forward(x))
    torch.testing.assert_close(result, x)


def test_heads_read_the_sum_of_a_shared_norm_s_block_as_it_is():
    torch.manual_seed(0)
    model = DETR(replace(TINY, decoder_block="shared_norm")).eval()
    contents = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: contents.append(output))
    predictions = model(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    assert torch.equal(predictions.logits, model.heads.category(torch.stack(contents)))
    assert contents[-1].std(-1).max() > 1.05  # no norm has touched it


@pytest.mark.parametrize("fused", [(), (16,)])
def test_positions_reach_the_encoder_s_input_alone_or_every_attention(fused):
    images, padding = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)

    def encode(**changes):
        torch.manual_seed(0)
        model = DETR(replace(TINY, encoder_layers=0, fused=fused, **changes)).eval()
        maps = model.backbone(images)
        memory = model.encode(maps, padding)
        features = model.projection(maps[-1])
        _, position, _ = model.locate(features, padding)
        return memory, model.fusion(features, maps), model.fusion(features + position, maps)

    memory, bare, _ = encode()
    torch.testing.assert_close(memory.tokens, bare.flatten(2).transpose(1, 2))
    assert not torch.allclose(memory.keys, memory.tokens)
    memory, bare, placed = encode(position_at="input")
    torch.testing.assert_close(memory.tokens, placed.flatten(2).transpose(1, 2))
    assert not torch.allclose(bare, placed)
    assert torch.equal(memory.keys, memory.tokens)
    memory, bare, placed = encode(position="none")
    assert torch.equal(bare, placed) and torch.equal(memory.keys, memory.tokens)


def test_encoder_layers_get_no_position_where_it_is_in_the_input():
    model, seen = DETR(replace(TINY, position_at="input", encoder_layers=2)).eval(), []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    model(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    assert len(seen) == 2 and not any(position.any() for position in seen)


def test_queries_of_learned_content_have_no_position():
    torch.manual_seed(0)
    model = DETR(replace(TINY, queries="content", num_queries=200, query_groups=2))
    memory = model.encode(model.backbone(torch.randn(2, 3, 64, 64)), torch.zeros(2, 64, 64, dtype=torch.bool))
    start = model.queries(memory)
    assert torch.equal(start.content[1], torch.cat([model.queries[0].content, model.queries[1].content]))
    assert start.position.shape == (2, 400, 16) and not start.position.any()
    assert start.boxes_cxcywh is None and start.proposals is None
    assert start.content.std().item() == pytest.approx(1, rel=0.05)
    assert model.eval().queries(memory).content.shape == (2, 200, 16)


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


def test_the_page_on_detr_222m_counts_as_the_code_does():
    page = (Path(__file__).parents[2] / "docs" / "detr-222m.md").read_text()
    shown = page.split("<!-- parts -->")[1].split("<!-- /parts -->")[0]
    assert shown.strip() == parts_table(DETR_222M, DETR_R50), "paste what models.size.parts_table returns for the two"


@pytest.mark.parametrize("name", ["detr-r50", "detr-222m", "lucid-xs", "lucid-l"])
def test_parts_are_counted_once_each(name):
    with torch.device("meta"):
        whole = sum(p.numel() for p in DETR(recipe(name).model).parameters())
    assert sum(parameters_by_part(recipe(name).model).values()) == whole


def test_every_option_belongs_to_a_part():
    lucid = replace(recipe("lucid-xs").model, box_bias="rpb", denoising=0.4, query_groups=2, shared_heads=False)
    parts = [part for _, part in parameters_by_part(replace(lucid, position="learned"))]
    assert {"positions of tokens", "fused map", "hints", "decoder, box bias", "positions of boxes"} < set(parts)
    assert parts[0] == "backbone, stem" and parts[-1] == "box head"


def test_detr_222m_has_222_million_parameters_and_asks_for_nothing_pretrained():
    parts = parameters_by_part(DETR_222M.model)
    assert sum(parts.values()) == pytest.approx(222e6, rel=0.005)
    model = DETR_222M.model
    attention = 4 * 256 * 11 * model.head_dim + 3 * 11 * model.head_dim + 256
    assert {part: count for (_, part), count in parts.items() if "attention" in part} == {
        "encoder, self-attention": 6 * attention,
        "decoder, self-attention": 6 * attention,
        "decoder, cross-attention": 6 * attention,
    }
    assert from_scratch(DETR_222M) == (DETR_222M, [])


@pytest.mark.slow
def test_detr_222m_learns_and_predicts():
    """Two steps make the loss of one small picture fall, and boxes come out."""
    torch.manual_seed(0)
    config = replace(DETR_222M, model=replace(DETR_222M.model, dropout=0.0))
    model = DETR(config.model)
    batch = Batch(
        images=torch.randn(1, 3, 64, 64),
        padding=torch.zeros(1, 64, 64, dtype=torch.bool),
        boxes_cxcywh=torch.tensor([[[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.3, 0.2]]]),
        labels=torch.tensor([[3, 50]]),
        counts=torch.tensor([2]),
        image_ids=(1,),
        sizes=((64, 64),),
    )
    norm = normalisers([2], config.model.num_queries, config.loss)
    optimiser = build_optimiser(model, config.optimiser)
    losses = []
    for _ in range(2):
        losses.append(set_loss(model(batch.images, batch.padding), batch, norm, config.loss).total)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        predictions = model.eval()(batch.images, batch.padding)
    losses.append(set_loss(predictions, batch, norm, config.loss).total)
    assert losses[2] < losses[1] < losses[0]
    assert predictions.logits.shape == (6, 1, 100, 92)
    assert ((predictions.boxes_cxcywh > 0) & (predictions.boxes_cxcywh < 1)).all()
