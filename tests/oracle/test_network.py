"""The fast network and the reference, both from one state: outputs, losses, gradients, running statistics."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject

from lucidetr.config import BackboneConfig, LossConfig, ModelConfig
from lucidetr.criterion import set_loss as fast_criterion
from lucidetr.criterion.matcher import matching_cost
from lucidetr.layers import dropout
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES
from lucidetr.reference import engine
from lucidetr.reference import set_loss as reference_criterion
from lucidetr.reference.backbone import BLOCKS
from lucidetr.reference.network import forward

from .drawn import (
    FITTING,
    TOLERANCE,
    Case,
    agree,
    all_agree,
    build,
    cases,
    examples,
    fitting_loss,
    image_batch,
    leaves,
    pairs,
    random_hints,
)

SMALL = ModelConfig(
    backbone=BackboneConfig(name="resnet18", width=8, norm="frozen_batch"),
    num_classes=3,
    d_model=16,
    num_heads=3,
    head_dim=4,
    feed_forward=24,
    encoder_layers=2,
    decoder_layers=2,
    position_table=9,
    num_queries=6,
    dropout=0.0,
)


def backbone(name: str, norm: str, dilation: bool = False, width: int = 8) -> ModelConfig:
    return replace(SMALL, backbone=BackboneConfig(name=name, width=width, norm=norm, dilation=dilation))


CONVNET = replace(SMALL, backbone=BackboneConfig(name="convnet", width=4, depths=(1, 0, 2), norm="batch"))
ANCHORS = replace(SMALL, queries="anchors", boxes="relative")
SELECTED = replace(SMALL, queries="selected", classification="sigmoid", boxes="refined_twice")

KNOWN = (*BLOCKS, "convnet")
KINDS = {
    "basic blocks, frozen batch norm": SMALL,
    "basic blocks, batch norm, DC5": backbone("resnet18", "batch", dilation=True),
    "basic blocks, group norm, DC5": backbone("resnet18", "group", dilation=True),
    "bottlenecks, batch norm": backbone("resnet50", "batch"),
    "bottlenecks, frozen batch norm, DC5": backbone("resnet50", "frozen_batch", dilation=True),
    "bottlenecks, group norm, deep": backbone("resnet101", "group", width=4),
    "pre-norm, learned positions": replace(
        SMALL, encoder_block="pre_norm", decoder_block="pre_norm", position="learned"
    ),
    "norm at the end of a block": replace(SMALL, encoder_block="end_norm", num_heads=1, head_dim=16),
    "no encoder, one layer, one query": replace(
        SMALL, encoder_block="pre_norm", encoder_layers=0, decoder_layers=1, num_queries=1
    ),
    "convnet, batch norm": CONVNET,
    "convnet, group norm, one stage": replace(
        SMALL, backbone=BackboneConfig(name="convnet", width=8, depths=(2,), norm="group")
    ),
    "fused, group norm beside frozen batch norm": replace(SMALL, fused=(16, 8)),
    "fused, batch norm, a stride skipped": replace(CONVNET, fused=(4,)),
    "fused, DC5": replace(backbone("resnet18", "group", dilation=True), fused=(8,)),
    "octaves": replace(SMALL, position="octaves"),
    "sigmoid": replace(SMALL, classification="sigmoid"),
    "heads of their own": replace(SMALL, shared_heads=False),
    "groups of learned queries": replace(SMALL, query_groups=3),
    "anchors, relative": ANCHORS,
    "anchors, refined, bells, pre-norm": replace(
        ANCHORS, boxes="refined", box_bias="gaussian", decoder_block="pre_norm"
    ),
    "anchors, refined twice, distances to the sides": replace(
        ANCHORS, boxes="refined_twice", box_bias="rpb", classification="sigmoid"
    ),
    "groups of anchors, bells": replace(ANCHORS, box_bias="gaussian", query_groups=2, num_queries=4),
    "selected, refined twice": SELECTED,
    "selected, relative, distances to the sides, narrow": replace(
        SELECTED, boxes="relative", box_bias="rpb", d_model=4, decoder_block="pre_norm"
    ),
    "groups of selected queries, bells, heads of their own": replace(
        SELECTED, box_bias="gaussian", query_groups=2, shared_heads=False, boxes="refined"
    ),
    "selected, tokens taught, batch norm": replace(
        SELECTED, backbone=CONVNET.backbone, fused=(8,), box_bias="gaussian", teach_tokens=True
    ),
    "groups of selected queries, tokens taught": replace(SELECTED, query_groups=2, teach_tokens=True),
    "scored queries, relative, distances to the sides, tokens taught, pre-norm": replace(
        SELECTED, queries="scored", boxes="relative", box_bias="rpb", teach_tokens=True, decoder_block="pre_norm"
    ),
    "groups of scored queries and hints": replace(SELECTED, queries="scored", query_groups=2, denoising=0.4),
    "anchors and hints, bells": replace(ANCHORS, box_bias="gaussian", boxes="refined", denoising=0.4),
    "no residual in the decoder": replace(SMALL, decoder_block="no_residual"),
    "no residual, anchors, refined, bells": replace(
        ANCHORS, boxes="refined", box_bias="gaussian", encoder_block="no_residual", decoder_block="no_residual"
    ),
    "shared norm": replace(SMALL, decoder_block="shared_norm"),
    "shared norm, selected, distances to the sides": replace(SELECTED, box_bias="rpb", decoder_block="shared_norm"),
    "no positions": replace(SMALL, position="none"),
    "positions at the input, learned": replace(SMALL, position="learned", position_at="input"),
    "positions at the input, fused, selected, bells": replace(
        SELECTED, position="octaves", position_at="input", fused=(16, 8), box_bias="gaussian"
    ),
    "positions at the input, no encoder": replace(SMALL, position_at="input", encoder_layers=0),
    "learned contents": replace(SMALL, queries="content"),
    "groups of learned contents": replace(SMALL, queries="content", query_groups=3),
    "no feed-forward": replace(SMALL, feed_forward=0),
    "no feed-forward, pre-norm, anchors": replace(
        ANCHORS, feed_forward=0, encoder_block="pre_norm", decoder_block="pre_norm"
    ),
    "no feed-forward, no norm, shared norm": replace(
        SMALL, feed_forward=0, encoder_block="end_norm", decoder_block="shared_norm"
    ),
    "no feed-forward, no residual, anchors": replace(
        ANCHORS, feed_forward=0, encoder_block="no_residual", decoder_block="no_residual"
    ),
    "positions at the input, end norm, learned contents, shared norm": replace(
        SMALL, position_at="input", encoder_block="end_norm", queries="content", decoder_block="shared_norm"
    ),
    "all at once, groups, hints, batch norm": replace(
        SELECTED,
        backbone=CONVNET.backbone,
        fused=(8,),
        position="octaves",
        encoder_block="pre_norm",
        decoder_block="pre_norm",
        box_bias="gaussian",
        query_groups=3,
        denoising=0.4,
        shared_heads=False,
        teach_tokens=True,
    ),
}
KINDS_AND_MODES = [(kind, mode) for kind in KINDS for mode in ("predicting", "training")]
# Only batch norm, groups, hints and taught tokens differ between the two modes where dropout is 0.
KINDS_AND_MODES = [
    (kind, mode)
    for kind, mode in KINDS_AND_MODES
    if mode == "predicting" or any(word in kind for word in ("batch norm", "groups", "hints", "taught"))
]
# These two cannot be compared to 1e-5 in float32. Statistics measured over a few cells divide by small numbers, layer
# after layer: in float64, rounding no more than the parameters to float32 moves their gradients by 2e-5 to 5e-5
# (the others' by 1e-7 to 2e-6), so no float32 arithmetic can meet it. In float64 they agree like all others.
ILL_CONDITIONED = [("bottlenecks, group norm, deep", "predicting"), ("bottlenecks, batch norm", "training")]


def place(losses) -> tuple[torch.Tensor, ...]:
    """Return where the matched pairs stand in a table of costs."""
    return losses.assignment.layer, losses.assignment.image, losses.assignment.query, losses.assignment.object


def unseen(name: str, config: ModelConfig, training: bool) -> bool:
    """Return whether a tensor belongs to queries or heads that only learn."""
    groups = [] if training or config.query_groups == 1 else range(1, config.query_groups)
    others = any(name.startswith(f"queries.{group}.") for group in groups)
    return others or (not training and ("hints." in name or ".taught_" in name))


def first_look(state: dict, case: Case, batch, training: bool) -> int:
    """Return how many queries a group has; draw another example where rounding could select other tokens."""
    predictions, trace = forward(
        {name: tensor.clone() for name, tensor in state.items()},  # running statistics move once, not twice
        case.model,
        batch.images,
        batch.padding,
        training=training,
        keep=["queries"],
    )
    for name, scores in trace.items():
        if name.endswith(".scores"):
            ordered = scores.detach().sort(dim=-1, descending=True).values[:, : case.model.num_queries + 1]
            gaps = -ordered.diff(dim=-1)
            if (gaps < TOLERANCE[scores.dtype] * ordered[ordered.isfinite()].abs().max()).any():
                reject()
    return predictions.logits.shape[2]


def check(case: Case, dtype: torch.dtype, training: bool) -> None:
    """Run both from the same state on the same batch, and compare everything that training would see."""
    model = build(case.model, case.seed, dtype).train(training)
    state = leaves(model)
    batch = image_batch(case.sizes, case.counts, case.model.num_classes, case.seed, dtype)
    queries, hints = first_look(state, case, batch, training), None
    if training and case.model.denoising:
        hints = random_hints(len(batch), queries, case.model.num_classes, case.seed, dtype)

    fast = model(batch.images, batch.padding, hints)
    slow = engine.predict(state, case.model, batch.images, batch.padding, training=training, hints=hints)
    agree(fast.logits, slow.logits, "logits")
    agree(fast.boxes_cxcywh, slow.boxes_cxcywh, "boxes")

    groups = case.model.query_groups + (hints is not None) if training else 1
    fast_norm = fast_criterion.normalisers(case.counts, case.model.num_queries, case.loss, groups=groups)
    slow_norm = reference_criterion.normalisers(case.counts, case.model.num_queries, case.loss, groups=groups)
    fast_losses = fast_criterion.set_loss(fast, batch, fast_norm, case.loss)
    slow_losses = engine.loss(slow, batch, slow_norm, case.loss)
    if pairs(fast_losses.assignment) != pairs(slow_losses.assignment):
        # Queries with equal boxes and objects with equal labels can be swapped at no cost: draw another example.
        cost = matching_cost(fast, batch, case.loss)
        agree(cost[place(fast_losses)].sum(), cost[place(slow_losses)].sum(), "cost of the matching")
        reject()
    for term in ("total", "classification", "l1", "giou", "tokens"):
        agree(getattr(fast_losses, term), getattr(slow_losses, term), term)

    fast_losses.total.backward()
    slow_losses.total.backward()
    fast_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    slow_gradients = {name: t.grad for name, t in state.items() if t.requires_grad and t.grad is not None}
    expected = {name for name, _ in model.named_parameters() if not unseen(name, case.model, training)}
    assert set(fast_gradients) == expected, set(fast_gradients) ^ expected
    all_agree(fast_gradients, slow_gradients)
    all_agree(dict(model.named_buffers()), {name: state[name] for name, _ in model.named_buffers()})


@examples(32)
@given(case=cases())
def test_drawn_networks_in_float64(case):
    check(case, torch.float64, training=False)
    check(case, torch.float64, training=True)


@pytest.mark.parametrize(("kind", "mode"), KINDS_AND_MODES)
def test_every_kind_in_float64(kind, mode):
    case = Case(KINDS[kind], fitting_loss(KINDS[kind]), sizes=((41, 70), (65, 33)), counts=(3, 1), seed=7)
    check(case, torch.float64, training=mode == "training")


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in KINDS_AND_MODES if pair not in ILL_CONDITIONED])
def test_every_kind_in_float32(kind, mode):
    case = Case(KINDS[kind], fitting_loss(KINDS[kind]), sizes=((41, 70), (65, 33)), counts=(3, 1), seed=7)
    check(case, torch.float32, training=mode == "training")


@pytest.mark.parametrize("loss", FITTING["sigmoid"])
@pytest.mark.parametrize("counts", [(0, 0), (7, 1)], ids=["no objects", "more than queries"])
def test_every_loss_of_a_sigmoid(loss, counts):
    model = KINDS["groups of selected queries, bells, heads of their own"]
    for training in (False, True):
        check(Case(model, LossConfig(loss), ((40, 40), (33, 64)), counts, seed=3), torch.float64, training)


@pytest.mark.parametrize(
    "kind", ["groups of selected queries, bells, heads of their own", "groups of scored queries and hints"]
)
def test_fewer_tokens_than_queries(kind):
    sizes = ((60, 30), (60, 30))  # 2 × 1 tokens for 6 queries
    for training in (False, True):
        model = KINDS[kind]
        check(Case(model, fitting_loss(model), sizes, (3, 1), seed=3), torch.float64, training)


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (1, 7)], ids=["no objects", "one object", "more than queries"])
def test_objects_from_none_to_too_many(counts):
    check(Case(SMALL, LossConfig(), ((40, 40), (33, 64)), counts, seed=3), torch.float64, training=False)


class Watched(dict[str, torch.Tensor]):
    """A state that remembers which of its tensors were asked for."""

    def __init__(self, state):
        super().__init__(state)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.model.backbone.name in KNOWN])
def test_recipes_are_read_to_the_last_tensor(name):
    config = RECIPES[name].model
    with torch.device("meta"):  # shapes without memory
        state = Watched(DETR(config).state_dict())
        predictions, _ = forward(state, config, torch.zeros(1, 3, 321, 300), torch.zeros(1, 321, 300, dtype=torch.bool))
    layers = config.decoder_layers + config.selects
    slots = config.num_classes + (config.classification == "softmax")
    assert predictions.logits.shape == (layers, 1, config.num_queries, slots)
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert state.read == {name for name in state if not unseen(name, config, training=False)} - counters


@pytest.mark.parametrize(("kind", "mode"), KINDS_AND_MODES)
def test_every_kind_is_read_to_the_last_tensor(kind, mode):
    config, training = KINDS[kind], mode == "training"
    state = Watched(DETR(config).state_dict())
    images, padding = torch.rand(1, 3, 70, 90), torch.zeros(1, 70, 90, dtype=torch.bool)  # more tokens than queries
    hints = random_hints(1, config.num_queries, config.num_classes, 1, torch.float32) if training else None
    forward(state, config, images, padding, hints=hints, training=training)
    expected = {name for name in state if not unseen(name, config, training)}
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert state.read == (expected if training else expected - counters)


def test_running_statistics_after_two_steps():
    config = KINDS["basic blocks, batch norm, DC5"]
    model = build(config, seed=1).train()
    state = leaves(model)
    for seed in (1, 2):
        batch = image_batch(((50, 40), (33, 45)), (0, 0), 3, seed, torch.float64)
        model(batch.images, batch.padding)
        engine.predict(state, config, batch.images, batch.padding)
    all_agree(dict(model.named_buffers()), {name: state[name] for name, _ in model.named_buffers()})
    assert state["backbone.stem.norm.num_batches_tracked"] == 2


def test_dropout_stands_at_the_same_places(monkeypatch):
    """Give both sides the same coins: the fast ones are replaced by ones that are drawn as the reference draws."""
    coins = torch.Generator()

    def factors(x, rate):
        return (torch.rand(x.shape, generator=coins, dtype=x.dtype) >= rate).to(x.dtype) / (1 - rate)

    monkeypatch.setattr(dropout, "factors", factors)
    batch = image_batch(((41, 70), (65, 33)), (3, 1), 3, 5, torch.float64)
    for kind in (
        "basic blocks, frozen batch norm",
        "pre-norm, learned positions",
        "norm at the end of a block",
        "anchors, refined, bells, pre-norm",
        "selected, relative, distances to the sides, narrow",
        "no residual in the decoder",
        "no feed-forward",
        "positions at the input, end norm, learned contents, shared norm",
    ):
        config = replace(KINDS[kind], dropout=0.3)
        model = build(config, seed=2)
        state = leaves(model)
        for training in (True, False):
            coins.manual_seed(11)
            fast = model.train(training)(batch.images, batch.padding)
            slow = engine.predict(
                state, config, batch.images, batch.padding, torch.Generator().manual_seed(11), training
            )
            agree(fast.logits, slow.logits, f"{kind}: logits")
            agree(fast.boxes_cxcywh, slow.boxes_cxcywh, f"{kind}: boxes")


def test_dropout_repeats_from_its_generator():
    config = replace(SMALL, dropout=0.5)
    state, batch = leaves(build(config, seed=2)), image_batch(((40, 40),), (0,), 3, 5, torch.float64)

    def logits(seed: int, training: bool = True):
        generator = torch.Generator().manual_seed(seed)
        return engine.predict(state, config, batch.images, batch.padding, generator, training).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert torch.equal(logits(1, training=False), logits(2, training=False))


def test_another_backbone_is_refused():
    config = replace(SMALL, backbone=BackboneConfig())
    object.__setattr__(config.backbone, "name", "vgg16")  # past the check of types
    with pytest.raises(ValueError, match=r"vgg16.*only resnet18, resnet34"):
        forward({}, config, torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))
