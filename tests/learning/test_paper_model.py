"""The paper's R50 at the paper's sizes: one real step, everything finite, a gradient everywhere."""

import pytest
import torch

from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.data.batching import training_steps
from lucidetr.data.dataset import open_dataset
from lucidetr.data.transforms import Augmentation
from lucidetr.models.detr import DETR
from lucidetr.recipes import from_scratch, recipe


@pytest.mark.slow
def test_r50_takes_a_real_step_at_full_size():
    torch.manual_seed(0)
    config, _ = from_scratch(recipe("detr-r50"))
    dataset = open_dataset("generated:digits?size=640&digit=30-160&train=4&val=1", "train")
    augmentation = Augmentation(config.augmentation, config.images)
    (batch,) = next(training_steps(dataset, config.images, augmentation, seed=0, batch=2, micro_batch=2))
    assert max(batch.images.shape[-2:]) >= 480
    model = DETR(config.model)
    losses = set_loss(
        model(batch.images, batch.padding), batch, normalisers(batch.counts.tolist(), 100, config.loss), config.loss
    )
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    silent = {name for name, p in model.named_parameters() if not p.grad.any()}
    # the first self-attention sees queries without content; see tests/unit/test_models.py
    assert {name for name in silent if not name.startswith("decoder.layers.0.self_attention")} == set()
