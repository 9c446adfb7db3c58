"""The fast network and the reference, both from one state: outputs, losses, gradients, running statistics."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject
from torch.nn import functional as F

from lucidetr.config import BackboneConfig, LossConfig, ModelConfig
from lucidetr.criterion import set_loss as fast_criterion
from lucidetr.criterion.matcher import matching_cost
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES
from lucidetr.reference import engine
from lucidetr.reference import set_loss as reference_criterion
from lucidetr.reference.network import forward

from .drawn import Case, agree, all_agree, build, cases, examples, image_batch, leaves, pairs

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
}
KINDS_AND_MODES = [(kind, mode) for kind in KINDS for mode in ("predicting", "training")]
# Only batch norm differs between the two modes where dropout is 0.
KINDS_AND_MODES = [(kind, mode) for kind, mode in KINDS_AND_MODES if mode == "predicting" or "batch norm" in kind]
# These two cannot be compared to 1e-5 in float32. Statistics measured over a few cells divide by small numbers, layer
# after layer: in float64, rounding no more than the parameters to float32 moves their gradients by 2e-5 to 5e-5
# (the others' by 1e-7 to 2e-6), so no float32 arithmetic can meet it. In float64 they agree like all others.
ILL_CONDITIONED = [("bottlenecks, group norm, deep", "predicting"), ("bottlenecks, batch norm", "training")]


def place(losses) -> tuple[torch.Tensor, ...]:
    """Return where the matched pairs stand in a table of costs."""
    return losses.assignment.layer, losses.assignment.image, losses.assignment.query, losses.assignment.object


def check(case: Case, dtype: torch.dtype, training: bool) -> None:
    """Run both from the same state on the same batch, and compare everything that training would see."""
    model = build(case.model, case.seed, dtype).train(training)
    state = leaves(model)
    batch = image_batch(case.sizes, case.counts, case.model.num_classes, case.seed, dtype)

    fast = model(batch.images, batch.padding)
    slow = engine.predict(state, case.model, batch.images, batch.padding, training=training)
    agree(fast.logits, slow.logits, "logits")
    agree(fast.boxes_cxcywh, slow.boxes_cxcywh, "boxes")

    fast_norm = fast_criterion.normalisers(case.counts, case.model.num_queries, case.loss)
    slow_norm = reference_criterion.normalisers(case.counts, case.model.num_queries, case.loss)
    fast_losses = fast_criterion.set_loss(fast, batch, fast_norm, case.loss)
    slow_losses = engine.loss(slow, batch, slow_norm, case.loss)
    if pairs(fast_losses.assignment) != pairs(slow_losses.assignment):
        # Queries with equal boxes and objects with equal labels can be swapped at no cost: draw another example.
        cost = matching_cost(fast, batch, case.loss)
        agree(cost[place(fast_losses)].sum(), cost[place(slow_losses)].sum(), "cost of the matching")
        reject()
    for term in ("total", "classification", "l1", "giou"):
        agree(getattr(fast_losses, term), getattr(slow_losses, term), term)

    fast_losses.total.backward()
    slow_losses.total.backward()
    fast_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    slow_gradients = {name: t.grad for name, t in state.items() if t.requires_grad and t.grad is not None}
    assert set(fast_gradients) == {name for name, _ in model.named_parameters()}
    all_agree(fast_gradients, slow_gradients)
    all_agree(dict(model.named_buffers()), {name: state[name] for name, _ in model.named_buffers()})


@examples(16)
@given(case=cases())
def test_drawn_networks_in_float64(case):
    check(case, torch.float64, training=False)
    check(case, torch.float64, training=True)


@pytest.mark.parametrize(("kind", "mode"), KINDS_AND_MODES)
def test_every_kind_in_float64(kind, mode):
    case = Case(KINDS[kind], LossConfig(), sizes=((41, 70), (65, 33)), counts=(3, 1), seed=7)
    check(case, torch.float64, training=mode == "training")


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in KINDS_AND_MODES if pair not in ILL_CONDITIONED])
def test_every_kind_in_float32(kind, mode):
    case = Case(KINDS[kind], LossConfig(), sizes=((41, 70), (65, 33)), counts=(3, 1), seed=7)
    check(case, torch.float32, training=mode == "training")


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


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if "resnet" in recipe.model.backbone.name])
def test_recipes_are_read_to_the_last_tensor(name):
    config = RECIPES[name].model
    with torch.device("meta"):  # shapes without memory
        state = Watched(DETR(config).state_dict())
        predictions, _ = forward(state, config, torch.zeros(1, 3, 129, 95), torch.zeros(1, 129, 95, dtype=torch.bool))
    assert predictions.logits.shape == (config.decoder_layers, 1, config.num_queries, config.num_classes + 1)
    assert state.read == set(state)


@pytest.mark.parametrize(("kind", "mode"), KINDS_AND_MODES)
def test_every_kind_is_read_to_the_last_tensor(kind, mode):
    config, training = KINDS[kind], mode == "training"
    state = Watched(DETR(config).state_dict())
    forward(state, config, torch.rand(1, 3, 40, 50), torch.zeros(1, 40, 50, dtype=torch.bool), training=training)
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert state.read == (set(state) if training else set(state) - counters)


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
    """Give both sides the same coins: the library's dropouts are replaced by ones that draw as the reference does."""
    coins = torch.Generator()

    def drop(x, p, training=True, inplace=False):
        return x * (torch.rand(x.shape, generator=coins, dtype=x.dtype) >= p) / (1 - p) if training and p else x

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, **_):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)
        return drop(scores.softmax(-1), dropout_p) @ value

    monkeypatch.setattr(F, "dropout", drop)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    batch = image_batch(((41, 70), (65, 33)), (3, 1), 3, 5, torch.float64)
    for kind in ("basic blocks, frozen batch norm", "pre-norm, learned positions", "norm at the end of a block"):
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
