"""What the oracle tests share: drawn configs, states without a tensor at its default, batches, and what agrees."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from lucidetr.config import BackboneConfig, LossConfig, ModelConfig
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch, Hints, Predictions

FITTING = {"softmax": ["cross_entropy"], "sigmoid": ["focal", "varifocal", "mal", "ia_bce"]}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def examples(number: int) -> settings:
    """Draw the same few examples every time; a failing one is small already, so none is shrunk."""
    return settings(
        max_examples=number, derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
    )


def unnoticed(draws: Callable) -> Callable:
    """Return the same drawing function, leaving Python's own random numbers as they were.

    The check of shapes and types looks into random places of a tuple, which hypothesis would take for our doing.
    """

    @wraps(draws)
    def drawing(*args, **kwargs):
        state = random.getstate()
        try:
            return draws(*args, **kwargs)
        finally:
            random.setstate(state)

    return drawing


@st.composite
@unnoticed
def backbone_configs(draw) -> BackboneConfig:
    """Draw a ResNet or a convnet."""
    name = draw(st.sampled_from(["resnet18", "convnet", "resnet34", "resnet50", "convnet", "resnet18", "resnet50"]))
    return BackboneConfig(
        name=name,
        width=draw(st.sampled_from([4, 8])),
        depths=tuple(draw(st.lists(st.integers(0, 2), min_size=2, max_size=4))),
        norm=draw(st.sampled_from(["frozen_batch", "batch", "group"])),
        dilation=name != "convnet" and draw(st.booleans()),
    )


@st.composite
def choices(draw) -> dict:
    """Draw what depends on each other: how queries start, what they say, and how they look."""
    queries = draw(st.sampled_from(["learned", "anchors", "selected", "scored", "content"]))
    selects = queries in ("selected", "scored")
    from_a_box = queries == "anchors" or selects
    return {
        "queries": queries,
        "classification": "sigmoid" if selects else draw(st.sampled_from(["softmax", "sigmoid"])),
        "boxes": draw(st.sampled_from(["relative", "refined", "refined_twice"])) if from_a_box else "absolute",
        "box_bias": draw(st.sampled_from(["gaussian", "rpb", "none"])) if from_a_box else "none",
        "denoising": draw(st.sampled_from([0.0, 0.4])) if from_a_box else 0.0,
        "teach_tokens": draw(st.booleans()) if selects else False,
    }


@st.composite
@unnoticed
def model_configs(draw) -> ModelConfig:
    """Draw a small DETR of any kind, the lucid ones included."""
    backbone = draw(backbone_configs())
    finer = st.lists(st.sampled_from(backbone.strides[:-1]), unique=True, max_size=2)
    return ModelConfig(
        backbone=backbone,
        num_classes=draw(st.integers(1, 4)),
        d_model=draw(st.sampled_from([8, 12, 20])),
        num_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 5)),
        feed_forward=draw(st.sampled_from([16, 0, 5, 1])),
        encoder_layers=draw(st.integers(0, 2)),
        decoder_layers=draw(st.integers(1, 3)),
        encoder_block=draw(st.sampled_from(["post_norm", "pre_norm", "end_norm", "no_residual"])),
        decoder_block=draw(st.sampled_from(["post_norm", "pre_norm", "shared_norm", "no_residual"])),
        fused=tuple(sorted(draw(finer), reverse=True)),
        position=draw(st.sampled_from(["sine", "learned", "octaves", "none"])),
        position_at=draw(st.sampled_from(["attention", "input"])),
        position_table=25,
        num_queries=draw(st.integers(1, 6)),
        query_groups=draw(st.integers(1, 3)),
        shared_heads=draw(st.booleans()),
        dropout=0.0,
        **draw(choices()),
    )


@dataclass(frozen=True)
class Case:
    """Hold a config, the sizes of the pictures of one batch, the objects in each, and a seed for all values."""

    model: ModelConfig
    loss: LossConfig
    sizes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    seed: int


@st.composite
@unnoticed
def cases(draw) -> Case:
    """Draw a model and one to three pictures of odd sizes; some hold nothing, one, or more than there are queries."""
    model, images = draw(model_configs()), draw(st.integers(1, 3))
    side = st.sampled_from([100, 33, 64, 75, 41])  # far enough apart for whole cells of padding
    sizes = tuple((draw(side), draw(side)) for _ in range(images))
    if model.selects:
        queries = min(model.num_queries, most_selected(model, sizes))
        model = replace(model, num_queries=queries)
    return Case(
        model=model,
        loss=draw(loss_configs(model.classification)),
        sizes=sizes,
        counts=tuple(draw(st.integers(0, 7)) for _ in range(images)),
        seed=draw(st.integers(0, 2**16)),
    )


def most_selected(model: ModelConfig, sizes: tuple[tuple[int, int], ...]) -> int:
    """Return how many queries a batch can select without touching padded tokens, all of which score equally.

    Pictures of one size have no padding: there, more may be asked for than there are tokens.
    """
    if len(set(sizes)) == 1:
        return 1000
    stride = (*model.backbone.strides[-1:], *model.fused)[-1]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    grid_h, grid_w = -(-height // stride), -(-width // stride)
    return min(-(-h * grid_h // height) * -(-w * grid_w // width) for h, w in sizes)


def loss_configs(classification: str = "softmax"):
    """Draw every weight by itself, so that no two can be mistaken for each other, and a loss that fits."""
    weight = st.floats(0.1, 5.0)
    return st.builds(
        LossConfig,
        st.sampled_from(FITTING[classification]),
        *[weight] * 6,
        no_object=st.floats(0.05, 1.0),
        tokens_per_object=st.integers(1, 5),
        weight_tokens=weight,
    )


def fitting_loss(model: ModelConfig) -> LossConfig:
    """Return the default weights with a classification loss that fits the model."""
    return LossConfig(classification=FITTING[model.classification][-1])


def build(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64) -> DETR:
    """Return the fast model with every tensor moved off its initial value, batch-norm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = DETR(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(2 + 2 * torch.rand(tensor.shape, generator=generator))  # keeps activations near 1
            elif tensor.is_floating_point():
                scale = tensor.square().mean().sqrt().item() or 0.5  # zeros are biases
                tensor.add_(0.2 * scale * torch.randn(tensor.shape, generator=generator))
    return model.to(dtype)


def image_batch(
    sizes: tuple[tuple[int, int], ...], counts: tuple[int, ...], num_classes: int, seed: int, dtype: torch.dtype
) -> Batch:
    """Return random pictures, padded to the largest, with random objects, padded to the most."""
    generator = torch.Generator().manual_seed(seed + 1)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    images = torch.zeros(len(sizes), 3, height, width, dtype=dtype)
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator).to(dtype)
        padding[i, :h, :w] = False
    return Batch(images=images, padding=padding, **objects(counts, num_classes, generator, dtype), sizes=sizes)


def objects(counts: tuple[int, ...], num_classes: int, generator: torch.Generator, dtype: torch.dtype) -> dict:
    """Return the objects' part of a `Batch`."""
    most = max((*counts, 0))
    boxes = torch.rand(len(counts), most, 4, generator=generator, dtype=torch.float64)
    boxes[..., :2] = 0.2 + 0.6 * boxes[..., :2]
    boxes[..., 2:] = 0.02 + 0.4 * boxes[..., 2:]
    labels = torch.randint(num_classes, (len(counts), most), generator=generator)
    for i, count in enumerate(counts):
        boxes[i, count:], labels[i, count:] = 0, 0
    return {
        "boxes_cxcywh": boxes.to(dtype),
        "labels": labels,
        "counts": torch.tensor(counts),
        "image_ids": tuple(range(len(counts))),
    }


def random_hints(images: int, queries: int, num_classes: int, seed: int, dtype: torch.dtype) -> Hints:
    """Return boxes anywhere and any labels: where they come from does not matter to the network."""
    generator = torch.Generator().manual_seed(seed + 2)
    boxes = 0.05 + 0.9 * torch.rand(images, queries, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (images, queries), generator=generator)
    return Hints(boxes_cxcywh=boxes.to(dtype), labels=labels)


def random_predictions(
    layers: int, images: int, queries: int, slots: int, seed: int, dtype: torch.dtype = torch.float64
) -> Predictions:
    """Return predictions as a network might make them, with gradients wanted."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, images, queries)
    logits = 2 * torch.randn(*shape, slots, generator=generator, dtype=torch.float64)
    boxes = torch.rand(*shape, 4, generator=generator, dtype=torch.float64)
    return Predictions(logits=logits.to(dtype).requires_grad_(), boxes_cxcywh=boxes.to(dtype).requires_grad_())


def leaves(model: DETR) -> dict[str, Tensor]:
    """Return the model's state as new tensors, those of the parameters asking for gradients."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    return state


def agree(fast: Tensor, reference: Tensor, what: str) -> None:
    """Assert equal shapes and types, and values within the tolerance of the type times the largest of them."""
    assert fast.shape == reference.shape, f"{what}: {tuple(fast.shape)} and {tuple(reference.shape)}"
    assert fast.dtype == reference.dtype, f"{what}: {fast.dtype} and {reference.dtype}"
    if not fast.is_floating_point():
        assert torch.equal(fast, reference), f"{what} differs"
    elif fast.numel():
        assert fast.isfinite().all(), f"{what} is not finite"
        largest = max(1.0, fast.detach().abs().max().item())
        apart = (fast - reference).detach().abs().max().item()
        assert apart <= TOLERANCE[fast.dtype] * largest, f"{what}: {apart:.1e} apart, values up to {largest:.1e}"


def all_agree(fast: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    """Assert the same names on both sides, then the same values under each."""
    assert set(fast) == set(reference), set(fast) ^ set(reference)
    for name in fast:
        agree(fast[name], reference[name], name)


def pairs(assignment) -> set[tuple[int, int, int, int]]:
    """Return the matched (layer, image, query, object), each asserted to stand there once."""
    columns = (assignment.layer, assignment.image, assignment.query, assignment.object)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(rows) == len(set(rows))
    return set(rows)
