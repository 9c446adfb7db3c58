"""Every setting of a model and of a run, as frozen dataclasses; JSON in and out. Imports no torch.

A recipe is a value of `TrainConfig`; two recipes differ in data, never in code.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from lucidetr.categories import Categories
from lucidetr.errors import InputError, did_you_mean

CARD_SCHEMA = 1
HUGE = 1_000_000


def check_ranges(config: Any, place: str, ranges: dict[str, tuple[float, float]]) -> None:
    """Refuse a field outside its range (both ends belong to it), be it one number or several; nan is always outside."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if any(not low <= each <= high for each in (value if isinstance(value, tuple) else (value,))):
            upper = "" if high >= HUGE else f" and at most {high:g}"
            raise InputError(f"{place}{name} = {value}: choose at least {low:g}{upper}")


@dataclass(frozen=True)
class BackboneConfig:
    """Choose the network that turns pixels into features."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_lite0"] = "resnet50"
    """ResNet (He et al. 2015) by depth, or the small EfficientNet-Lite0 whose ImageNet weights install by name."""
    width: int = 64
    """Channels of the stem; the four stages have 1, 2, 4 and 8 times as many (four times that in a bottleneck)."""
    norm: Literal["frozen_batch", "batch", "group"] = "frozen_batch"
    """frozen_batch only makes sense with pretrained weights."""
    dilation: bool = False
    """DC5: the last stage keeps stride 16 and dilates its convolutions instead."""

    def __post_init__(self):
        check_ranges(self, "model.backbone.", {"width": (2, 4096)})


@dataclass(frozen=True)
class ModelConfig:
    """Describe a DETR (sections 3.1, 3.2 and A.4)."""

    backbone: BackboneConfig = BackboneConfig()
    num_classes: int = 91
    """Real classes only; the slot for no object comes on top. `train` takes the number from the data."""
    d_model: int = 256
    """Width of the transformer."""
    num_heads: int = 8
    head_dim: int = 32
    """Width of one attention head; num_heads × head_dim need not equal d_model."""
    feed_forward: int = 2048
    """Hidden width of the feed-forward blocks."""
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_block: Literal["post_norm", "pre_norm", "end_norm"] = "post_norm"
    """Where layer norm stands: after each sum (the paper), before each part, or once at the block's end."""
    decoder_block: Literal["post_norm", "pre_norm"] = "post_norm"
    position: Literal["sine", "learned"] = "sine"
    """2-D position encoding, added to queries and keys at every attention."""
    position_table: int = 50
    """Rows and columns that a learned position encoding knows (the grid's largest side)."""
    num_queries: int = 100
    """Object queries N: the most objects that can be found in one image."""
    dropout: float = 0.1

    def __post_init__(self):
        at_least_one = (
            "num_classes",
            "d_model",
            "num_heads",
            "head_dim",
            "feed_forward",
            "decoder_layers",
            "num_queries",
        )
        ranges: dict[str, tuple[float, float]] = dict.fromkeys((*at_least_one, "position_table"), (1, HUGE))
        check_ranges(self, "model.", ranges | {"encoder_layers": (0, HUGE), "dropout": (0, 0.99)})
        if self.d_model % 4:
            raise InputError(f"model.d_model = {self.d_model}: choose a multiple of 4 (sine and cosine of two axes)")


@dataclass(frozen=True)
class LossConfig:
    """Weigh the matching cost and the set loss (section 3.1, A.4)."""

    cost_class: float = 1.0
    cost_l1: float = 5.0
    cost_giou: float = 2.0
    weight_class: float = 1.0
    weight_l1: float = 5.0
    weight_giou: float = 2.0
    no_object: float = 0.1
    """Weight of the no-object class in the log-likelihood."""

    def __post_init__(self):
        check_ranges(self, "loss.", {f.name: (0, HUGE) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class ImageConfig:
    """Say how a picture becomes the model's input: the same for training, evaluation and prediction."""

    resize: Literal["shortest", "square"] = "shortest"
    """shortest: scale the short side to `size`, the long one to at most `max_size`; square: size × size."""
    size: int = 800
    max_size: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from red, green, blue in 0…1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        check_ranges(
            self, "images.", {"size": (8, 20_000), "max_size": (8, 40_000), "mean": (-1, 2), "std": (1e-3, 10)}
        )


@dataclass(frozen=True)
class AugmentationConfig:
    """List the random changes of a training image; the boxes follow. A zero or an empty list turns one off."""

    flip: float = 0.5
    """Probability of a left-right mirror. Turn off where left and right differ (digits, text)."""
    scales: tuple[int, ...] = tuple(range(480, 801, 32))
    """Short sides to choose from; empty: always images.size."""
    crop: float = 0.5
    """Probability of a random crop before the resize (the paper's)."""
    crop_scales: tuple[int, ...] = (400, 500, 600)
    """Short sides to choose from before the crop."""
    crop_sides: tuple[int, int] = (384, 600)
    """Smallest and largest side of the crop, in pixels after the resize to one of crop_scales."""
    zoom: float = 0.0
    """0.3: scale the picture by 0.7…1.3 about its centre."""
    shift: float = 0.0
    """0.1: move the picture by up to a tenth of each side."""
    colour: float = 0.0
    """0.3: brightness, contrast and saturation times 0.7…1.3."""

    def __post_init__(self):
        shares: dict[str, tuple[float, float]] = dict.fromkeys(("flip", "crop", "shift", "colour"), (0, 1))
        sides: dict[str, tuple[float, float]] = dict.fromkeys(("scales", "crop_scales", "crop_sides"), (8, 20_000))
        check_ranges(self, "augmentation.", shares | sides | {"zoom": (0, 0.9)})


@dataclass(frozen=True)
class OptimiserConfig:
    """Set AdamW and what happens to its rate; every horizon is a fraction of the run."""

    lr: float = 1e-4
    backbone_lr: float = 1e-5
    weight_decay: float = 1e-4
    clip: float = 0.1
    """Largest norm of all gradients together; 0: no clip."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    warmup: float = 0.0
    """Share of the run over which the rate rises from 0."""
    drop_at: float = 2 / 3
    """step: the rate falls to a tenth here (epoch 200 of 300 in the paper)."""
    final: float = 0.02
    """cosine: the rate ends at this share of its peak."""
    ema: float = 0.0
    """Averaging horizon of the weights' moving average, as a share of the run; 0: none."""

    def __post_init__(self):
        unbounded: dict[str, tuple[float, float]] = dict.fromkeys(
            ("lr", "backbone_lr", "weight_decay", "clip"), (0, HUGE)
        )
        shares: dict[str, tuple[float, float]] = dict.fromkeys(("drop_at", "final", "ema"), (0, 1))
        check_ranges(self, "optimiser.", unbounded | shares | {"warmup": (0, 0.99)})


@dataclass(frozen=True)
class TrainConfig:
    """Train a detector."""

    recipe: str = "detr-r50"
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    images: ImageConfig = ImageConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    data: str = ""
    """A folder with COCO json files, or generated:digits."""
    train_json: str = ""
    """Explicit COCO file of the training split, instead of searching --data."""
    train_images: str = ""
    """Folder of its images."""
    val_json: str = ""
    val_images: str = ""
    val_fraction: float = 0.2
    """Share of the training images set aside when the data has no validation split."""
    bad_boxes: Literal["refuse", "drop"] = "refuse"
    """drop: leave out boxes without area and cut boxes over the picture's edge, instead of refusing the file."""
    out: str = ""
    """Folder of this run."""
    epochs: float = 0.0
    """How long: one of epochs, steps or minutes."""
    steps: int = 0
    minutes: float = 0.0
    """Training time only: start-up and evaluation do not count."""
    batch: int = 16
    """Images per optimiser step, over everything."""
    micro_batch: int = 2
    """Images per forward pass; the batch is reached by accumulating gradients."""
    weights: str = ""
    """Start from these: a run or model of ours, a facebookresearch or torchvision .pth, a Hugging Face folder, the
    word efficientnet-lite0 (extra "pretrained"), or an https address (with --weights-sha256). Full detectors and
    backbones both do."""
    weights_sha256: str = ""
    freeze: tuple[str, ...] = ()
    """Parts that do not learn, by name: backbone.stem backbone.stages.0 encoder …"""
    evaluations: int = 10
    """How often the validation split is evaluated, evenly over the run; the end is always one of them."""
    save_minutes: float = 10.0
    """Save what --resume needs at least this often, besides at every evaluation and on Ctrl-C."""
    overfit: int = 0
    """Take only the first N training images, evaluate on the same, augment nothing: AP must go to 1."""
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """auto: bf16 where the machine has matrix units for it."""
    engine: Literal["fast", "reference"] = "fast"
    """reference: the model written out in plain arithmetic; same numbers, many times slower."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    workers: int = 0
    """Processes that read and augment images beside the training."""
    cache_gb: float = 2.0
    """Keep the decoded images in memory when the split fits into this."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (or start when there is none)."""

    def __post_init__(self):
        counts: dict[str, tuple[float, float]] = dict.fromkeys(("batch", "micro_batch", "evaluations"), (1, HUGE))
        rest: dict[str, tuple[float, float]] = dict.fromkeys(("overfit", "seed", "workers"), (0, 2**31 - 1))
        check_ranges(self, "--", counts | rest | {"cache_gb": (0, HUGE), "save_minutes": (0, HUGE)})


@dataclass(frozen=True)
class ModelCard:
    """Travel with the weights: all that is needed to build the model and to speak the user's category names."""

    model: ModelConfig
    images: ImageConfig
    categories: Categories
    recipe: str
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    schema: int = CARD_SCHEMA


T = typing.TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain dictionaries, lists, numbers and strings."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Any, place: str = "") -> T:
    """Build a config dataclass from plain values; an unknown field or a wrong type is an InputError.

    >>> from_dict(OptimiserConfig, {"lr": 0.001}).lr
    0.001
    >>> from_dict(OptimiserConfig, {"lrr": 0.001})
    Traceback (most recent call last):
    lucidetr.errors.InputError: unknown field lrr: did you mean lr? Known: backbone_lr, clip, drop_at, ema, \
final, lr, schedule, warmup, weight_decay
    """
    if not isinstance(values, dict):
        raise InputError(f"{place or kind.__name__}: expected an object with fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise InputError(f"unknown field {place}{name}: {did_you_mean(name, hints)}")
    parsed = {name: _parse(hints[name], value, f"{place}{name}") for name, value in values.items()}
    missing = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, kind))
        if f.name not in parsed and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{place or kind.__name__}: the field {missing[0]} is missing")
    return kind(**parsed)


def _parse(hint: Any, value: Any, place: str) -> Any:
    """Check one JSON value against the type of its field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, f"{place}.")
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{place} = {value!r}: choose one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, list):
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(each) != len(value):
            raise InputError(f"{place} = {value!r}: expected {len(each)} values")
        return tuple(_parse(h, v, f"{place}[{i}]") for i, (h, v) in enumerate(zip(each, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not (origin or hint):
        raise InputError(f"{place} = {value!r}: expected {getattr(hint, '__name__', hint)}")
    return value


def difference(config: Any, other: Any, place: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {field: (value here, value there)} of two configs of one kind, nested fields joined by dots.

    >>> difference(OptimiserConfig(lr=0.01), OptimiserConfig())
    {'lr': (0.01, 0.0001)}
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(config):
        here, there = getattr(config, f.name), getattr(other, f.name)
        if dataclasses.is_dataclass(here):
            changes |= difference(here, there, f"{place}{f.name}.")
        elif here != there:
            changes[f"{place}{f.name}"] = (here, there)
    return changes
