"""Whole runs with numbers planted in them that are not finite: as if those steps had not been."""

import json
from dataclasses import replace

import pytest
import torch

from lucidetr.training import loop
from lucidetr.training.checkpoint import load_tensors
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.run_log import read_metrics
from run_tools import tiny

NAN = float("nan")
# by step (the first, two in a row, one of an evaluation): which of its two parts, and what is made nan there
PLANTED = {0: (0, "loss"), 2: (1, "logits"), 3: (0, "images"), 5: (1, "gradient")}
STEPS = 8


def with_batch_norm(out, **changes):
    config = tiny(out, steps=STEPS, evaluations=4, preflight="off", statistics=STEPS, **changes)
    return replace(config, model=replace(config.model, backbone=replace(config.model.backbone, norm="batch")))


def newest_state(run):
    return load_tensors(max((run / "checkpoints").iterdir()))[0]


class Planting:
    """Be the fast engine, but for the numbers that PLANTED says."""

    def __init__(self, monkeypatch):
        self.step, self.part, original = -1, 0, loop.Run.step

        def counted(run, parts):
            self.step, self.part = run.clock.step, 0
            return original(run, parts)

        monkeypatch.setattr(loop.Run, "step", counted)
        self.engine = Engine(self.forward, self.loss)

    def planted(self, what):
        return PLANTED.get(self.step) == (self.part % 2, what)

    def forward(self, model, batch, hints):
        if self.planted("images"):
            batch = replace(batch, images=batch.images * NAN)
        predictions = FAST.forward(model, batch, hints)
        logits = predictions.logits * NAN if self.planted("logits") else predictions.logits
        if self.planted("gradient"):
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return replace(predictions, logits=logits)

    def loss(self, predictions, batch, norm, config):
        self_loss = self.planted("loss")
        self.part += 1
        losses = FAST.loss(predictions, batch, norm, config)
        return replace(losses, total=losses.total * NAN) if self_loss else losses


def test_a_step_that_is_not_finite_leaves_the_run_as_if_it_had_not_been(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        run = loop.train(with_batch_norm(tmp_path / "run"), Planting(patch).engine)

    original = loop.Run.step

    def left_out(self, parts):
        if self.clock.step in PLANTED:
            return {"skipped": {"images": [], "loss": "", "gradient_norm": ""}}
        return original(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", left_out)
        without = loop.train(with_batch_norm(tmp_path / "without"))

    a, b = newest_state(run), newest_state(without)
    assert a.keys() == b.keys()
    assert any("running_var" in name for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert all(value.isfinite().all() for value in a.values() if value.is_floating_point())
    assert {int(a[name]) for name in a if name.endswith(".step")} == {STEPS - len(PLANTED)}

    lines = [line for line in read_metrics(run) if "skipped" in line]
    assert [line["step"] for line in lines] == [step + 1 for step in PLANTED]
    assert all(len(line["skipped"]["images"]) == 4 for line in lines)
    loss, logits, images, gradient = (line["skipped"] for line in lines)
    assert loss["loss"] == "nan"
    assert "module" not in loss
    assert "cause" not in loss
    assert "the model's class logits" in logits["cause"]
    assert images["module"].startswith("backbone.")
    assert gradient["loss"] not in ("nan", "inf")
    assert gradient["parameter"].startswith("heads.")
    looked = [json.loads(line)["step"] for line in (run / "statistics.jsonl").read_text().splitlines()]
    assert looked == [step + 1 for step in range(STEPS) if step not in PLANTED]

    with monkeypatch.context() as patch:  # taken up again in the midst of skipped steps
        planting = Planting(patch)
        step = loop.Run.step

        def interrupted(self, parts):
            if self.clock.step == 3:
                raise KeyboardInterrupt
            return step(self, parts)

        patch.setattr(loop.Run, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(with_batch_norm(tmp_path / "cut"), planting.engine)
        patch.setattr(loop.Run, "step", step)
        cut = loop.train(with_batch_norm(tmp_path / "cut", resume=True), planting.engine)
    c = newest_state(cut)
    assert [name for name in a if not torch.equal(a[name], c[name])] == []


def test_a_stalled_run_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr("lucidetr.training.guards.FEWEST_LINES", 2)
    monkeypatch.setattr("lucidetr.training.guards.FALLEN", -1.0)  # whatever the loss does, it has fallen
    run = loop.train(tiny(tmp_path / "run", preflight="off"))
    stalls = [line for line in read_metrics(run) if "stall" in line]
    assert len(stalls) == 1
    assert stalls[0]["step"] == 6  # the third of three evaluations
    assert "the paper's design" in stalls[0]["stall"]
    assert "warning: nothing is found yet" in capsys.readouterr().out
