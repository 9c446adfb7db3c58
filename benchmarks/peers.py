"""Three detectors built by transformers from random weights, DETR, RT-DETRv2 and D-FINE, and how they are trained.

Each has the size of the small recipes and is given what it learns fastest with. transformers builds for weights that
are downloaded; what it does on that account, and no random start can learn with, is undone in `build`.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate
from lucidetr.config import TrainConfig
from lucidetr.data.batching import CountFrom, build_augmentation, evaluation_batches, training_steps
from lucidetr.data.dataset import Dataset, open_training_data
from lucidetr.errors import InputError, did_you_mean
from lucidetr.evaluation.coco import Metrics, evaluate
from lucidetr.structures import Batch, Detections
from lucidetr.training.clock import Clock, stopwatch
from lucidetr.training.ema import MovingAverage
from lucidetr.training.optimiser import build_optimiser, rate, set_rate
from lucidetr.training.precision import autocast, choose_device

D_MODEL, HEADS, LAYERS = 128, 4, 3
QUERIES = 30  # where nothing else is asked
RESNET: dict[str, Any] = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
}
SHARED: dict[str, Any] = {
    "d_model": D_MODEL,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "decoder_layers": LAYERS,
    "attn_implementation": "eager",  # on a CPU never slower than fused attention, in bf16 faster
}
TWO_STAGE = SHARED | {
    "freeze_backbone_batch_norms": False,
    "encoder_hidden_dim": D_MODEL,
    "decoder_in_channels": [D_MODEL] * 3,
    "num_denoising": 0,  # denoising costs more than it gives: half the AP after a minute
    "tie_word_embeddings": False,  # a class and a box head for each decoder layer, as published
}


def build_detr(classes: int, queries: int) -> nn.Module:
    """Return DETR with a ResNet-18 of half its width whose last stage is dilated, 4.3 million parameters."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage4"], **RESNET)
    sizes = {"encoder_layers": LAYERS, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    config = DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        num_labels=classes,
        num_queries=queries,
        auxiliary_loss=True,
        **SHARED,
        **sizes,
    )
    peer = DetrForObjectDetection(config).requires_grad_(True)
    resnet = peer.model.backbone.model
    learn_statistics(resnet)
    dilate(resnet.encoder.stages[3])
    start_linear(peer)
    for part in (peer.model.encoder, peer.model.decoder):
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    return peer


def build_rtdetrv2(classes: int, queries: int) -> nn.Module:
    """Return RT-DETRv2 with a ResNet-18 of half its width, 4.8 million parameters."""
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    sizes = {"encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "hidden_expansion": 0.5}
    config = RTDetrV2Config(**three_maps(), num_labels=classes, num_queries=queries, **TWO_STAGE, **sizes)
    return start_two_stage(RTDetrV2ForObjectDetection(config))


def build_dfine(classes: int, queries: int) -> nn.Module:
    """Return D-FINE of about its published size N on RT-DETR's ResNet, 4.8 million parameters.

    From random weights that backbone gave several times the AP of its own HGNetV2-B0 in the first minute. The loss is
    transformers' own, which pairs each layer's corner distributions with the boxes of the layer before; pairing them
    rightly gave no more AP in that minute.
    """
    from transformers import DFineConfig, DFineForObjectDetection

    sizes = {"encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "hidden_expansion": 0.34, "depth_mult": 0.5}
    config = DFineConfig(**three_maps(), num_labels=classes, num_queries=queries, **TWO_STAGE, **sizes)
    return start_two_stage(DFineForObjectDetection(config))


def three_maps() -> dict[str, Any]:
    """Return the settings of a ResNet-18 of half its width whose last three maps are read."""
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(out_features=["stage2", "stage3", "stage4"], **RESNET)
    return {"backbone_config": backbone, "encoder_in_channels": RESNET["hidden_sizes"][1:]}


PEERS: dict[str, Callable[[int, int], nn.Module]] = {
    "transformers-detr": build_detr,
    "transformers-rtdetrv2": build_rtdetrv2,
    "transformers-dfine": build_dfine,
}
PUBLISHED = tuple(PEERS)
# behind a peer's name: its matrices and kernels of 16 inputs and outputs or more step by Muon, not AdamW as published;
# among them D-FINE's box heads, sampling offsets, and class layers of that many classes
MUON = "+muon"
PEERS |= {name + MUON: builder for name, builder in PEERS.items()}


def build(name: str, classes: int, queries: int = QUERIES) -> nn.Module:
    """Return the peer of that name with random weights, its loss computed in float32 whatever the autocast."""
    if name not in PEERS:
        raise InputError(f"unknown peer {name}: {did_you_mean(name, PEERS)}")
    from transformers import logging

    logging.set_verbosity_error()  # of the config's rarer fields
    peer = PEERS[name](classes, queries)
    peer.loss_function = in_full_precision(peer.loss_function)
    return peer


def learn_statistics(module: nn.Module) -> None:
    """Put batch norms back where transformers put frozen ones, which normalise nothing before statistics exist."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            setattr(module, name, nn.BatchNorm2d(len(child.weight)))
        else:
            learn_statistics(child)


def dilate(stage: nn.Module) -> None:
    """Make a ResNet stage keep its resolution (DC5), which transformers offers with timm's ResNets alone."""
    for convolution in [module for module in stage.modules() if isinstance(module, nn.Conv2d)]:
        if convolution.stride != (1, 1):
            convolution.stride = (1, 1)
        elif convolution.kernel_size == (3, 3):
            convolution.dilation = convolution.padding = (2, 2)


def start_linear(peer: nn.Module) -> None:
    """Start linear layers and batch norms as torch does, as the published codes leave them.

    transformers draws linear weights from a normal distribution of deviation 0.01 or 0.02, and RT-DETR's batch-norm
    weights from one around 0. Weights that are zero or wider were set on purpose.
    """
    for module in peer.modules():
        if isinstance(module, nn.Linear) and 0 < module.weight.std() < 0.03:
            module.reset_parameters()
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def start_two_stage(peer: nn.Module) -> nn.Module:
    """Start RT-DETR or D-FINE as published: the first guess of a box is its anchor."""
    del peer.class_embed, peer.bbox_embed  # second names of the decoder's own heads, never called
    for head in (peer.model.enc_bbox_head, getattr(peer.model.decoder, "pre_bbox_head", None)):
        if head is not None:
            nn.init.zeros_(head.layers[-1].weight)
    for module in peer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    start_linear(peer)
    return peer


def in_full_precision(loss: Callable) -> Callable:
    """Return the same loss computed in float32."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def computed(*values: Any, **named: Any) -> Any:
        with torch.autocast(values[0].device.type, enabled=False):
            return loss(*map(wide, values), **{name: wide(value) for name, value in named.items()})

    return computed


@dataclass(frozen=True)
class Way:
    """Say how a peer computes."""

    precision: str
    channels_last: bool

    def prepare(self, peer: Any, device: torch.device) -> nn.Module:
        """Return the peer in its memory format on a device, a GPU's attention fused."""
        if device.type != "cpu":
            peer.set_attn_implementation({"": "sdpa"})  # of the detector; its ResNet knows no attention
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return peer.to(device).to(memory_format=layout).train()


WAYS = tuple(Way(precision, channels_last) for precision in ("fp32", "bf16") for channels_last in (False, True))


@dataclass(frozen=True)
class Course:
    """Hold how a training went: seconds of training, AP and AP50 of every evaluation, and what took how long."""

    points: list[tuple[float, float, float]]
    images_per_second: float
    parameters: int
    other_split: dict[str, float] | None = None

    def as_line(self) -> dict[str, Any]:
        """Return what a results file keeps of it, the AP at the end by its name."""
        return asdict(self) | {"AP": self.points[-1][1]}


def optimiser_step(
    peer: nn.Module, batch: Batch, optimiser: torch.optim.Optimizer, precision: str, clip: float
) -> None:
    """Take one optimiser step."""
    batch = batch.to(device_of(peer))
    labels = [
        {"class_labels": batch.labels[i, :count], "boxes": batch.boxes_cxcywh[i, :count]}
        for i, count in enumerate(batch.counts.tolist())
    ]
    with autocast(precision, batch.images.device)():
        loss = peer(pixel_values=batch.images, pixel_mask=(~batch.padding).long(), labels=labels).loss
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} for the images {batch.image_ids}")
    loss.backward()
    nn.utils.clip_grad_norm_(peer.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def device_of(peer: nn.Module) -> torch.device:
    """Return where a peer computes."""
    return next(peer.parameters()).device


def training_batches(config: TrainConfig, dataset: Dataset, clock: Clock) -> Generator[list[Batch], None, None]:
    """Return the generator of a run's batches, the very ones that our own recipes get."""
    return training_steps(
        dataset,
        config.images,
        build_augmentation(config.augmentation, config.images),
        seed=config.seed,
        batch=config.batch,
        micro_batch=config.batch,
        workers=config.workers,
        numbers=CountFrom(progress=lambda step: clock.progress),
    )


def measure_ways(name: str, config: TrainConfig, runs: int = 5) -> dict[Way, float]:
    """Return the images per second of a peer's optimiser step for every way to compute it, data not counted."""
    dataset, _, _ = open_training_data(config)
    device = choose_device(config.device)
    classes = len(dataset.annotations.categories)
    with closing(training_batches(config, dataset, Clock(steps=1, minutes=0.0))) as steps:
        batches = [parts[0] for parts in islice(steps, 2)]

    def contender(way: Way) -> Callable[[], None]:
        peer = way.prepare(build(name, classes, config.model.num_queries), device)
        optimiser = build_optimiser(peer, config.optimiser)

        def work() -> None:
            for batch in batches:
                optimiser_step(peer, batch, optimiser, way.precision, config.optimiser.clip)

        return work

    seconds = alternate({str(way): contender(way) for way in WAYS}, runs, device=device)
    return {way: len(batches) * config.batch / sorted(seconds[str(way)])[runs // 2] for way in WAYS}


def train_peer(name: str, config: TrainConfig, way: Way, other: Dataset | None = None) -> Course:
    """Train a peer for the config's minutes and evaluate it on the way, the last time on `other` too."""
    train_set, val_set, _ = open_training_data(config)
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    peer = way.prepare(build(name, len(train_set.annotations.categories), config.model.num_queries), device)
    optimiser = build_optimiser(peer, config.optimiser)
    average = MovingAverage(peer, config.optimiser.ema)
    clock, now = Clock(steps=0, minutes=config.minutes), stopwatch(config, device)
    points: list[tuple[float, float, float]] = []
    with closing(training_batches(config, train_set, clock)) as steps:
        while clock.progress < 1.0:
            due_before, started = clock.due(config.evaluations), now()
            set_rate(optimiser, rate(clock.progress, config.optimiser))
            optimiser_step(peer, next(steps)[0], optimiser, way.precision, config.optimiser.clip)
            average.update(peer, clock.expected_steps)
            clock.step += 1
            clock.seconds += now() - started
            if clock.due(config.evaluations) > due_before or clock.progress >= 1.0:
                metrics = look(average.model, config, val_set, way)
                points.append((clock.seconds, metrics.average_precision, metrics.numbers["AP50"] or 0.0))
    numbers = look(average.model, config, other, way).numbers if other else None
    return Course(
        points=points,
        images_per_second=clock.step * config.batch / clock.seconds,
        parameters=sum(p.numel() for p in peer.parameters()),
        other_split={key: value for key, value in numbers.items() if value is not None} if numbers else None,
    )


@torch.no_grad()
def look(peer: nn.Module, config: TrainConfig, dataset: Dataset, way: Way) -> Metrics:
    """Evaluate a peer by its own postprocessing, all its queries counting."""
    from transformers import DetrImageProcessor, RTDetrImageProcessor

    softmax = type(peer).__name__.startswith("Detr")
    processor = DetrImageProcessor() if softmax else RTDetrImageProcessor()
    found: list[Detections] = []
    for part in evaluation_batches(dataset, config.images, config.batch):
        batch = part.to(device_of(peer))
        with autocast(way.precision, batch.images.device)():
            outputs = peer(pixel_values=batch.images, pixel_mask=(~batch.padding).long())
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        for each in processor.post_process_object_detection(
            outputs, threshold=-1.0, target_sizes=torch.tensor(batch.sizes)
        ):
            boxes_xyxy, scores, labels = (each[name].cpu() for name in ("boxes", "scores", "labels"))
            order = scores.argsort(descending=True, stable=True)
            categories = dataset.annotations.categories
            found.append(Detections(boxes_xyxy[order], scores[order], labels[order], categories))
    return evaluate(dataset.annotations, found)
