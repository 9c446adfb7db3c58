"""A training run of seconds."""

from dataclasses import replace

from lucidetr.config import TrainConfig
from lucidetr.recipes import recipe

TINY = "generated:digits?size=64&digit=14-24&objects=1-3&train=10&val=4"


def tiny(out, **changes) -> TrainConfig:
    """Return a run of seconds."""
    config = recipe("detr-xs")
    backbone = replace(config.model.backbone, width=8)
    model = replace(config.model, backbone=backbone, d_model=32, num_heads=2, head_dim=16, feed_forward=64)
    base = {"data": TINY, "out": str(out), "steps": 6, "evaluations": 3, "batch": 4, "micro_batch": 2}
    images = replace(config.images, size=64, max_size=64)
    optimiser = replace(config.optimiser, ema=0.2)
    return replace(config, model=model, images=images, optimiser=optimiser, **(base | changes))
