"""The reference as an engine: a loop that cannot tell who computes goes the same way with either."""

from dataclasses import replace

import pytest
import torch

from lucidetr.config import BackboneConfig, ModelConfig
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.reference import engine

from .drawn import agree, build, fitting_loss, image_batch, random_hints
from .test_network import KINDS, SMALL

CONFIGS = {
    "paper": replace(SMALL, backbone=BackboneConfig(name="resnet18", width=4, norm="batch")),
    "lucid": KINDS["all at once, groups, hints, batch norm"],
}
COUNTS = (3, 1)


def train(config: ModelConfig, steps: int, plain: bool) -> tuple[list[float], torch.nn.Module]:
    """Train on two pictures, in turn, and return the losses and the trained model."""
    model = build(config, seed=4).train()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights, losses = fitting_loss(config), []
    norm = normalisers(COUNTS, config.num_queries, weights, config.query_groups + (config.denoising > 0))
    for step in range(steps):
        batch = image_batch(((41, 60), (50, 33)), COUNTS, 3, step % 2, torch.float64)
        hints = random_hints(2, config.num_queries, 3, step, torch.float64) if config.denoising else None
        if plain:
            predictions = engine.predict(state, config, batch.images, batch.padding, hints=hints)
            loss = engine.loss(predictions, batch, norm, weights).total
        else:
            loss = set_loss(model(batch.images, batch.padding, hints), batch, norm, weights).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("kind", CONFIGS)
def test_ten_steps_go_the_same_way(kind):
    fast, fast_model = train(CONFIGS[kind], 10, plain=False)
    slow, slow_model = train(CONFIGS[kind], 10, plain=True)
    assert max(abs(one - other) for one, other in zip(fast, slow, strict=True)) < 1e-6
    assert slow[-1] < slow[1]  # the same pictures
    statistics = dict(slow_model.named_buffers())
    assert statistics["backbone.stem.norm.num_batches_tracked"] == 10
    agree(
        dict(fast_model.named_buffers())["backbone.stem.norm.running_mean"],
        statistics["backbone.stem.norm.running_mean"],
        "running mean",
    )
