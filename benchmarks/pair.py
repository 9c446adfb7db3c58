"""The same DETR twice, with the same weights: ours and that of transformers."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lucidetr.config import ImageConfig, ModelCard, TrainConfig
from lucidetr.conversion.coco_names import slots
from lucidetr.conversion.convert import export_hugging_face
from lucidetr.models.detr import DETR
from lucidetr.structures import Batch
from lucidetr.training.optimiser import freeze

BRANCH = 0.25  # of a residual branch's output: without statistics of a training, sixteen whole ones would explode
SHARP = 3.0  # queries and keys, and what the heads say: untrained queries would all find the same


def tiny(config: TrainConfig) -> TrainConfig:
    """Return the same recipe with a model of a few thousand parameters, for a quick look at a benchmark."""
    backbone = replace(config.model.backbone, width=4)
    sizes = {"num_heads": 2, "head_dim": 8, "feed_forward": 16, "num_queries": 10}
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    return replace(config, model=replace(config.model, backbone=backbone, d_model=16, **sizes, **layers))


def card_of(config: TrainConfig, images: ImageConfig) -> ModelCard:
    """Return the card of an untrained model."""
    names = slots([f"class {label}" for label in range(config.model.num_classes)])
    return ModelCard(config.model, images, names, config.recipe)


@torch.no_grad()
def untrained(config: TrainConfig, sharp: bool = False) -> DETR:
    """Return a model with random weights, the same at every call; a sharp one finds boxes that differ."""
    torch.manual_seed(0)
    model = DETR(config.model)
    for block in model.backbone.modules():
        last = getattr(block, "norm3", getattr(block, "norm2", None))
        if config.model.backbone.norm == "frozen_batch" and last is not None:
            last.weight.fill_(BRANCH)
    for name, weight in model.named_parameters() if sharp else ():
        if name.endswith(("query.weight", "key.weight", "category.weight", "box.output.weight")):
            weight.mul_(SHARP)
    return model


def as_transformers(model: DETR, card: ModelCard) -> tuple[nn.Module, Any]:
    """Return transformers' model with the same weights, and its image processor with the same settings."""
    from transformers import DetrForObjectDetection, DetrImageProcessor, logging

    logging.set_verbosity_error()  # of the config's rarer fields
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_hugging_face(model.state_dict(), card, Path(folder))
        peer = DetrForObjectDetection.from_pretrained(folder)
        processor = DetrImageProcessor.from_pretrained(folder)
    return peer, processor


def pair_to_train(config: TrainConfig, dropout: float) -> tuple[DETR, nn.Module]:
    """Return both models with the same weights and the same parameters learning.

    transformers 5.23 freezes its whole ResNet by a name mismatch; here all stages but the first learn, as in ours.
    """
    config = replace(config, model=replace(config.model, dropout=dropout))
    ours = untrained(config)
    peer, _ = as_transformers(ours, card_of(config, config.images))
    freeze(ours, config.freeze)
    for name, parameter in peer.named_parameters():
        if ".backbone." in name:
            parameter.requires_grad_(any(f"stages.{stage}." in name for stage in (1, 2, 3)))
    assert learning(ours) == learning(peer), (learning(ours), learning(peer))
    return ours, peer


def learning(model: nn.Module) -> int:
    """Return how many parameters learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def random_batch(size: int, side: int, objects: int, classes: int, device: torch.device) -> Batch:
    """Return random square images with so many objects each."""
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        images=torch.randn(size, 3, side, side, generator=generator),
        padding=torch.zeros(size, side, side, dtype=torch.bool),
        boxes_cxcywh=0.3 + 0.2 * torch.rand(size, objects, 4, generator=generator),
        labels=torch.randint(classes, (size, objects), generator=generator),
        counts=torch.full((size,), objects),
        image_ids=tuple(range(size)),
        sizes=((side, side),) * size,
    )
    return batch.to(device)


class PeerLoss:
    """Compute transformers' loss of a batch, every decoder layer supervised.

    Its own way to supervise them (`auxiliary_loss`) hands the normed content on to the next layer, which is another
    model; here the layers are looked at from outside.
    """

    def __init__(self, peer: Any):
        self.peer, self.hidden = peer, []
        for layer in peer.model.decoder.layers:
            layer.register_forward_hook(lambda layer, given, made: self.hidden.append(made))

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and boxes of every decoder layer."""
        self.hidden.clear()
        self.peer.model(pixel_values=batch.images, pixel_mask=(~batch.padding).long())
        layers = [made[0] if isinstance(made, tuple) else made for made in self.hidden]
        hidden = self.peer.model.decoder.layernorm(torch.stack(layers))
        return self.peer.class_labels_classifier(hidden), self.peer.bbox_predictor(hidden).sigmoid()

    def loss(self, logits: Tensor, boxes: Tensor, batch: Batch) -> Tensor:
        """Return the sum of its losses over the layers, computed in float32."""
        objects = zip(batch.labels, batch.boxes_cxcywh, batch.counts.tolist(), strict=True)
        labels = [{"class_labels": kinds[:count], "boxes": boxes[:count]} for kinds, boxes, count in objects]
        config = self.peer.config
        config.auxiliary_loss = True
        logits, boxes = logits.float(), boxes.float()
        total, _, _ = self.peer.loss_function(logits[-1], labels, logits.device, boxes[-1], config, logits, boxes)
        config.auxiliary_loss = False
        return total
