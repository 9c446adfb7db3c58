"""DETR-R50 at 640 × 640 against Hugging Face transformers: inference, and a training step without the optimiser.

Both eager, in float32, with random weights and the same parts frozen. transformers 5.23 freezes its whole ResNet by a
name mismatch; here stages 1–3 of it learn, as in ours.
"""

import torch

from benchmarks.measure import alternate, report
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.structures import Batch
from lucidetr.training.optimiser import freeze

SIDE, OBJECTS = 640, 7


def build_peer() -> torch.nn.Module:
    """Return transformers' DETR with its own ResNet-50."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(depths=[3, 4, 6, 3], layer_type="bottleneck", out_features=["stage4"])
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone, num_labels=91)
    peer = DetrForObjectDetection(config)
    for name, parameter in peer.named_parameters():
        if ".backbone." in name:
            parameter.requires_grad_(any(f"stages.{stage}." in name for stage in (1, 2, 3)))
    return peer


def make_batch(size: int) -> Batch:
    """Return random images with a few objects each."""
    torch.manual_seed(0)
    return Batch(
        images=torch.randn(size, 3, SIDE, SIDE),
        padding=torch.zeros(size, SIDE, SIDE, dtype=torch.bool),
        boxes_cxcywh=0.3 + 0.2 * torch.rand(size, OBJECTS, 4),
        labels=torch.randint(91, (size, OBJECTS)),
        counts=torch.full((size,), OBJECTS),
        image_ids=tuple(range(size)),
        sizes=((SIDE, SIDE),) * size,
    )


def main(runs: int = 5) -> None:
    """Run both comparisons."""
    config = recipe("detr-r50")
    ours = DETR(config.model).to(memory_format=torch.channels_last)
    freeze(ours, config.freeze)
    peer = build_peer()
    learning = {
        name: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for name, model in (("lucidetr", ours), ("transformers", peer))
    }
    one, two = make_batch(1), make_batch(2)

    def train_ours() -> None:
        losses = set_loss(ours(two.images, two.padding), two, normalisers([OBJECTS] * 2, 100, config.loss), config.loss)
        losses.total.backward()
        ours.zero_grad()

    labels = [{"class_labels": two.labels[i], "boxes": two.boxes_cxcywh[i]} for i in range(2)]

    def train_peer() -> None:
        peer(pixel_values=two.images, pixel_mask=~two.padding, labels=labels).loss.backward()
        peer.zero_grad()

    settings = {"side": SIDE, "precision": "fp32", "engine": "eager"}
    with torch.no_grad():
        ours.eval(), peer.eval()
        contenders = {
            "lucidetr": lambda: ours(one.images, one.padding),
            "transformers": lambda: peer(pixel_values=one.images, pixel_mask=~one.padding),
        }
        report("detr-r50 inference", alternate(contenders, runs), "lucidetr", settings | {"batch": 1})
    ours.train(), peer.train()
    seconds = alternate({"lucidetr": train_ours, "transformers": train_peer}, runs)
    report("detr-r50 training step", seconds, "lucidetr", settings | {"batch": 2, "learning parameters": learning})
