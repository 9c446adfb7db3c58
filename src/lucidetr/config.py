"""Every setting of a model and of a run, as frozen dataclasses. Imports no torch.

A recipe is a value of `TrainConfig`; two recipes differ in data, never in code.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from lucidetr.categories import Categories
from lucidetr.errors import InputError
from lucidetr.fields import HUGE, check_ranges

CARD_SCHEMA = 1


@dataclass(frozen=True)
class BackboneConfig:
    """Choose the network that turns pixels into features."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "convnet", "efficientnet_lite0"] = "resnet50"
    """ResNet (He et al. 2015) by depth, a short convnet for small pictures and few cores, or the small
    EfficientNet-Lite0 whose ImageNet weights install by name."""
    width: int = 64
    """Channels of the stem. A ResNet's four stages have 1, 2, 4 and 8 times as many (four times that in a
    bottleneck), a convnet's 2, 4, 4 and 8 times."""
    depths: tuple[int, ...] = (1, 1, 1)
    """convnet: residual blocks of each stage, at strides 4, 8, 16 (and 32)."""
    norm: Literal["frozen_batch", "batch", "group"] = "frozen_batch"
    """frozen_batch only makes sense with pretrained weights."""
    dilation: bool = False
    """DC5: the last stage of a ResNet keeps stride 16 and dilates its convolutions instead."""
    zero_residual: bool = False
    """Start the last norm of every residual branch at zero, so that each block begins as the identity."""

    def __post_init__(self):
        check_ranges(self, "model.backbone.", {"width": (2, 4096), "depths": (0, 100)})
        if not 1 <= len(self.depths) <= 4:
            raise InputError(f"model.backbone.depths = {self.depths}: give 1 to 4 stages")
        if self.dilation and not self.name.startswith("resnet"):
            raise InputError(f"model.backbone.dilation = True: only ResNets are dilated, not {self.name}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Return the strides of the maps it makes, from fine to coarse."""
        if self.name == "convnet":
            return (4, 8, 16, 32)[: len(self.depths)]
        return (4, 8, 16) if self.dilation else (4, 8, 16, 32)


@dataclass(frozen=True)
class ModelConfig:
    """Describe a DETR (sections 3.1, 3.2 and A.4)."""

    backbone: BackboneConfig = BackboneConfig()
    num_classes: int = 91
    """Real classes only. `train` takes the number from the data."""
    classification: Literal["softmax", "sigmoid"] = "softmax"
    """softmax over the classes and a slot for no object (the paper), or one sigmoid for each class, no such slot."""
    d_model: int = 256
    """Width of the transformer."""
    num_heads: int = 8
    head_dim: int = 32
    """Width of one attention head; num_heads × head_dim need not equal d_model."""
    feed_forward: int = 2048
    """Hidden width of the feed-forward blocks. 0: the layers have none."""
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_block: Literal["post_norm", "pre_norm", "end_norm", "no_residual"] = "post_norm"
    """Where layer norm stands: after each sum (the paper), before each part, or once at the block's end.
    no_residual: after each part, whose input is not added."""
    decoder_block: Literal["post_norm", "pre_norm", "no_residual", "shared_norm"] = "post_norm"
    """shared_norm: one norm for the sums of both attentions, none for that of the feed-forward, and none before the
    heads."""
    initialisation: Literal["default", "uniform", "uniform_scaled", "xavier", "he_in", "he_out", "t_fixup"] = "default"
    """How all matrices start: each part by its own rule (the paper), uniform in ±0.02, the same with smaller queries,
    keys and values, Xavier's, He's by inputs or by outputs, or T-Fixup's."""
    residual_start: Literal["xavier", "zero", "scaled"] = "xavier"
    """How the last layer of each residual branch starts: as any other, at zero, or divided by √(2 · layers)."""
    fused: tuple[int, ...] = ()
    """Strides of finer backbone maps, coarse to fine, that the encoder's map is fused into; the decoder reads the
    last. Empty: it reads the encoder's own map."""
    position: Literal["sine", "learned", "octaves", "none"] = "sine"
    """2-D position encoding. sine: the paper's waves, most of them far longer than the picture; octaves: 1 to 32 waves
    over the picture; none: tokens do not know where they lie."""
    position_at: Literal["attention", "input"] = "attention"
    """Where it is added: to queries and keys of the encoder and keys of the decoder, at every attention (the paper), or
    once to the tokens that enter the encoder."""
    position_table: int = 50
    """Rows and columns that a learned position encoding knows (the grid's largest side)."""
    num_queries: int = 100
    """Object queries N: the most objects that can be found in one image."""
    queries: Literal["learned", "content", "anchors", "selected", "scored"] = "learned"
    """What queries start from. learned: a position each and no content (the paper); content: a content each and no
    position; anchors: a box and a content each; selected: the tokens of the memory that look most like objects, whose
    guesses are supervised as a layer of their own; scored: of these boxes and scores alone, not what they are."""
    query_groups: int = 1
    """Sets of queries that learn side by side, unseen by each other; only the first is left after training."""
    denoising: float = 0.0
    """Noise of the hints, as a share of a box: one more group of queries that starts from noised truths when training
    (Li et al. 2022; Zhang et al. 2023). 0: no hints."""
    boxes: Literal["absolute", "relative", "refined", "refined_twice"] = "absolute"
    """absolute: each layer says a whole box (the paper). relative: it moves the query's first box, in units of its
    size. refined: it moves the box of the layer before. refined_twice: the same, and each layer also learns from the
    next layer's box."""
    teach_tokens: bool = False
    """In training, let every token say a class and a box, and not only those that are selected; each object teaches
    loss.tokens_per_object of them (one to many: Jia et al. 2023; Zong et al. 2023)."""
    box_bias: Literal["none", "gaussian", "rpb"] = "none"
    """What cross-attention knows of a query's box. none: nothing (the paper); gaussian: for each head a bell around
    learned points of it; rpb: a learned function of the distances to its four sides. Attention stays dense."""
    shared_heads: bool = True
    """One class and box head for all decoder layers (the paper), or one for each."""
    dropout: float = 0.1

    def __post_init__(self):
        at_least_one = ("num_classes", "d_model", "num_heads", "head_dim")
        at_least_one += ("decoder_layers", "num_queries", "query_groups")
        ranges = dict.fromkeys((*at_least_one, "position_table"), (1, HUGE))
        ranges |= dict.fromkeys(("encoder_layers", "feed_forward"), (0, HUGE))
        check_ranges(self, "model.", ranges | {"dropout": (0, 0.99), "denoising": (0, 1)})
        if self.d_model % 4:
            raise InputError(f"model.d_model = {self.d_model}: choose a multiple of 4 (sine and cosine of two axes)")
        finer = self.backbone.strides[:-1]
        if list(self.fused) != sorted(set(self.fused) & set(finer), reverse=True):
            fit = f"choose from {', '.join(map(str, reversed(finer)))}, each once, coarse to fine"
            raise InputError(
                f"model.fused = {self.fused}: {fit if finer else 'this backbone has one map, leave it empty'}"
            )
        self._check_boxes()

    def _check_boxes(self) -> None:
        """Refuse settings that need each other's absence or presence."""
        asked = f"model.queries = {self.queries}"
        if (self.queries in ("learned", "content")) != (self.boxes == "absolute"):
            raise InputError(
                f"{asked} and model.boxes = {self.boxes}: learned and content queries say absolute boxes; all "
                "others start from a box, which relative, refined and refined_twice move"
            )
        needs_box = f"model.box_bias = {self.box_bias}" if self.box_bias != "none" else "model.denoising"
        if self.boxes == "absolute" and (self.box_bias != "none" or self.denoising):
            raise InputError(f"{needs_box} needs queries that start from a box: anchors, selected, scored")
        if self.selects and self.classification == "softmax":
            raise InputError(f"{asked} needs model.classification sigmoid: tokens are ranked by it")
        if self.teach_tokens and not self.selects:
            raise InputError(f"model.teach_tokens needs queries that are tokens: selected, scored; not {self.queries}")

    @property
    def selects(self) -> bool:
        """Whether queries are chosen among the tokens of the memory, whose guesses are a layer of predictions."""
        return self.queries in ("selected", "scored")


@dataclass(frozen=True)
class LossConfig:
    """Weigh the matching cost and the set loss (section 3.1, A.4)."""

    classification: Literal["cross_entropy", "focal", "varifocal", "ia_bce", "mal"] = "cross_entropy"
    """cross_entropy belongs to softmax (the paper), the others to sigmoid: focal (Lin et al. 2017), and three that
    ask the score of a match to follow its overlap: varifocal (Zhang et al. 2021), ia_bce (Cai et al. 2023), mal
    (Huang et al. 2024)."""
    cost_class: float = 1.0
    cost_l1: float = 5.0
    cost_giou: float = 2.0
    weight_class: float = 1.0
    weight_l1: float = 5.0
    weight_giou: float = 2.0
    no_object: float = 0.1
    """Weight of the no-object class in the log-likelihood."""
    tokens_per_object: int = 4
    """How many tokens each object teaches where model.teach_tokens is on."""
    weight_tokens: float = 4.0
    """Factor on the whole loss of taught tokens; with 1 they count like a decoder layer."""

    def __post_init__(self):
        weights = [f.name for f in dataclasses.fields(self) if isinstance(f.default, float)]
        check_ranges(self, "loss.", dict.fromkeys(weights, (0, HUGE)) | {"tokens_per_object": (1, HUGE)})


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
        sides = {"size": (8, 20_000), "max_size": (8, 40_000)}
        check_ranges(self, "images.", sides | {"mean": (-1, 2), "std": (1e-3, 10)})


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
    flip_vertical: float = 0.0
    """Probability of a top-bottom mirror: for pictures without an up, such as those of a microscope."""
    turn: float = 0.0
    """Probability of a quarter turn."""
    mosaic: float = 0.0
    """Probability that a sample is four images, each at half its size, side by side."""
    mosaic_from: float = 0.0
    mosaic_until: float = 0.5
    """Mosaics are made between these shares of the run."""
    until: float = 1.0
    """Share of the run after which nothing is changed any more: the last images are as those to come."""
    start_size: float = 1.0
    """Progressive resolution: the run starts at this share of images.size (square images only)."""
    full_size_at: float = 0.5
    """Share of the run at which the images have reached their full size."""

    def __post_init__(self):
        parts = ("flip", "crop", "shift", "colour", "flip_vertical", "turn")
        parts += ("mosaic", "mosaic_from", "mosaic_until", "until", "full_size_at")
        shares = dict.fromkeys(parts, (0, 1))
        sides = dict.fromkeys(("scales", "crop_scales", "crop_sides"), (8, 20_000))
        check_ranges(self, "augmentation.", shares | sides | {"zoom": (0, 0.9), "start_size": (0.1, 1)})
        smallest, largest = self.crop_sides
        if smallest > largest:
            fit = f"give the smallest side first, {largest} {smallest}"
            raise InputError(f"augmentation.crop_sides = {self.crop_sides}: {fit}")
        if self.crop and not self.crop_scales:
            raise InputError(
                "augmentation.crop_scales = (): name the short sides to choose from before a crop, or make no crops by "
                "augmentation.crop 0"
            )
        if self.mosaic_from > self.mosaic_until:
            raise InputError(
                f"augmentation.mosaic_from = {self.mosaic_from}: choose at most augmentation.mosaic_until, which is "
                f"{self.mosaic_until}, or raise that"
            )


@dataclass(frozen=True)
class OptimiserConfig:
    """Set the optimiser and what happens to its rate; every horizon is a fraction of the run."""

    lr: float = 1e-4
    backbone_lr: float = 1e-5
    matrices: Literal["adamw", "muon"] = "adamw"
    """How matrices and kernels between features step. muon: along orthogonal matrices (Jordan et al. 2024), scaled so
    that an entry's change, in root mean square, is about the rate."""
    weight_decay: float = 1e-4
    clip: float = 0.1
    """Largest norm of all gradients together; 0: no clip."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step: falls once, to a tenth, at drop_at. cosine: falls along a cosine after `flat`. constant: stays."""
    warmup: float = 0.0
    """Share of the run over which the rate rises, from a hundredth of its peak."""
    drop_at: float = 2 / 3
    """step: the rate falls to a tenth here (the paper: epoch 200 of 300; of its 500 epochs at 400, 0.8)."""
    flat: float = 0.0
    """cosine: the rate stays at its peak until this share of the run."""
    final: float = 0.02
    """cosine: the rate ends at this share of its peak."""
    ema: float = 0.0
    """Averaging horizon of the weights' moving average, as a share of the run; 0: none."""

    def __post_init__(self):
        unbounded = dict.fromkeys(("lr", "backbone_lr", "weight_decay", "clip"), (0, HUGE))
        shares = dict.fromkeys(("drop_at", "final", "ema"), (0, 1))
        open_shares = dict.fromkeys(("warmup", "flat"), (0, 0.99))
        check_ranges(self, "optimiser.", unbounded | shares | open_shares)


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
    """A COCO, YOLO or Pascal VOC folder, or generated:digits."""
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
    bad_pictures: Literal["stop", "skip"] = "stop"
    """skip: in place of a training picture that cannot be decoded, or has another size than is said, take the next one
    and say so, instead of stopping the run."""
    out: str = ""
    """Folder of this run."""
    epochs: float = 0.0
    """How long: one of epochs, steps or minutes."""
    steps: int = 0
    minutes: float = 0.0
    """Training time only: start-up and evaluation do not count."""
    clock: Literal["wall", "processor"] = "wall"
    """What minutes count. processor: the time that the processor gave to this run, on one thread; other jobs beside
    it cannot shorten the run then, so studies on a shared machine can be compared."""
    batch: int = 16
    """Images per optimiser step, over all machines. The number of processes must divide it."""
    micro_batch: int = 2
    """Images per forward pass of one process; the batch is reached by accumulating gradients. 0: as many as fit into
    the memory."""
    recompute: bool = False
    """Keep only the input of each stage and layer for the backward pass: several times less memory for a third more
    time."""
    compile: bool = False
    """Let torch.compile write the network's code: minutes at the start, faster steps on a GPU."""
    replay: bool = False
    """On one GPU, record forward and backward once and replay them in every step (CUDA graphs): half the time for
    lucid-xs in one measurement, more memory. Only where all batches are squares of one size (no scales, no start_size)
    and go through in one part (--micro-batch as --batch), without hints, --compile, --recompute and the reference
    engine."""
    weights: str = ""
    """Start from these: a run or model of ours, a facebookresearch or torchvision .pth, a Hugging Face folder, the
    word efficientnet-lite0 (extra "pretrained"), or an https address (with --weights-sha256). Full detectors and
    backbones both do."""
    weights_sha256: str = ""
    freeze: tuple[str, ...] = ()
    """Parts that do not learn, by name: backbone.stem backbone.stages.0 encoder …"""
    evaluations: int = 10
    """How often the validation split is evaluated, evenly over the run; the end is always one of them."""
    statistics: int = 24
    """How often weights, gradients and matching are written down, evenly over the run, the first step and the last
    included; 0: never."""
    save_minutes: float = 10.0
    """Save what --resume needs at least this often, besides at every evaluation and on Ctrl-C."""
    preflight: Literal["off", "quick", "full"] = "quick"
    """Before the first step of a new run: draw the first batch, try the largest, see whether the picture reaches the
    predictions and a gradient every parameter. full: learn a few images by heart, too. Leaves no trace in the run."""
    overfit: int = 0
    """Take only the first N training images, evaluate on the same, augment nothing: AP must go to 1."""
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """auto: bf16 where the machine multiplies it: a GPU, or a CPU with AMX or AVX512-BF16."""
    engine: Literal["fast", "reference"] = "fast"
    """reference: the model written out in plain arithmetic; same numbers, many times slower."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    workers: int = 0
    """Processes that read and augment images beside the training."""
    cache_gb: float = 2.0
    """Keep the decoded images in memory when the split fits into this."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others of its run before it gives up and says which of them is missing."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (or start when there is none)."""

    def __post_init__(self):
        counts = dict.fromkeys(("batch", "evaluations"), (1, HUGE))
        rest = dict.fromkeys(("overfit", "seed", "workers", "statistics", "micro_batch"), (0, 2**31 - 1))
        rest |= {"cache_gb": (0, HUGE), "save_minutes": (0, HUGE), "timeout_minutes": (0.01, HUGE)}
        check_ranges(self, "--", counts | rest)
        softmax = self.model.classification == "softmax"
        if softmax != (self.loss.classification == "cross_entropy"):
            fit = "cross_entropy" if softmax else "focal, varifocal, ia_bce or mal"
            raise InputError(
                f"loss.classification = {self.loss.classification} does not fit model.classification = "
                f"{self.model.classification}: choose {fit}"
            )


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

    def __post_init__(self):
        if (named := len(self.categories)) not in (0, self.model.num_classes):  # a backbone alone has none
            raise InputError(f"the card names {named} categories for a model of {self.model.num_classes} classes")
