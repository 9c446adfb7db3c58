"""Large models at their own sizes: real steps, everything finite, a gradient everywhere."""

import math
from dataclasses import replace

import pytest
import torch

from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.data.batching import training_steps
from lucidetr.data.dataset import open_dataset
from lucidetr.data.transforms import Augmentation
from lucidetr.deployment.detector import load
from lucidetr.models.detr import DETR
from lucidetr.recipes import from_scratch, recipe
from lucidetr.training.loop import train
from lucidetr.training.run_log import read_metrics


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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("lucid-m", 20_068_761), ("lucid-l", 40_095_673)])
def test_the_large_members_of_the_lucid_family_train_at_full_size(tmp_path, capsys, name, published):
    parameters = published - 3 * (91 - 10) * (256 + 1)  # three class layers, ten classes
    config, _ = from_scratch(recipe(name))
    assert (config.images.size, config.images.resize) == (640, "square")
    data = "generated:digits?size=640&digit=30-160&train=4&val=1"
    length = {"steps": 3, "epochs": 0.0, "evaluations": 1, "batch": 2, "micro_batch": 2, "preflight": "off"}
    run = train(replace(config, data=data, out=str(tmp_path / name), **length))
    assert f"{name}: {parameters:,} parameters, {parameters:,} learn" in capsys.readouterr().out
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"]) for line in lines)
    assert load(run).predict(torch.zeros(3, 480, 640, dtype=torch.uint8)).boxes_xyxy.isfinite().all()
