"""A training run of seconds."""

from dataclasses import replace

import pytest

from lucidetr.config import TrainConfig
from lucidetr.recipes import recipe
from lucidetr.training import loop
from lucidetr.training.checkpoint import load_tensors

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


def newest_state(run):
    """Return the tensors that a run saved last."""
    return load_tensors(max((run / "checkpoints").iterdir()))[0]


def train_until_interrupted(config, monkeypatch):
    """Train, and be interrupted after the fifth step: a run of six that saves three times has then saved the fourth."""
    step, calls = loop.Run.step, []

    def interrupted(self, parts):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config)
    monkeypatch.setattr(loop.Run, "step", step)
