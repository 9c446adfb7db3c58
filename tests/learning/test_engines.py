"""The plain reference trains as the fast model does: the same losses, step by step."""

from dataclasses import replace

import pytest

from lucidetr.recipes import recipe
from lucidetr.studies.engines import reference_engine
from lucidetr.training import loop
from lucidetr.training.engine import FAST
from lucidetr.training.run_log import read_metrics
from run_tools import tiny


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_both_engines_take_the_same_twenty_steps(tmp_path, monkeypatch, norm):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    losses = []
    for name, engine in (("fast", FAST), ("reference", reference_engine())):
        config = tiny(tmp_path / name, steps=20, evaluations=1, precision="fp64", batch=4, micro_batch=2)
        model = replace(config.model, dropout=0.0, backbone=replace(config.model.backbone, norm=norm))
        run = loop.train(replace(config, model=model), engine)
        losses.append([line["loss"] for line in read_metrics(run) if "loss" in line])
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_the_reference_learns_by_itself(tmp_path):
    config = replace(recipe("detr-xs"), data="generated:digits?train=64&val=4", out=str(tmp_path / "run"))
    run = loop.train(replace(config, steps=60, evaluations=1, batch=4, micro_batch=4), reference_engine())
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
