"""Whole runs with numbers planted in them that are not finite: as if those steps had not been."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from lucidetr.training import loop
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.run_log import read_metrics
from run_tools import newest_state, tiny

NAN = float("nan")
# by step (the first, two in a row, one of an evaluation): which of its two parts, and what is made nan there
PLANTED = {0: (0, "loss"), 2: (1, "logits"), 3: (0, "images"), 5: (1, "gradient")}
STEPS = 8


def with_batch_norm(out, **changes):
    config = tiny(out, steps=STEPS, evaluations=4, preflight="off", statistics=STEPS, **changes)
    return replace(config, model=replace(config.model, backbone=replace(config.model.backbone, norm="batch")))


class Planting:
    """Be the fast engine, but for the numbers that are planted."""

    def __init__(self, monkeypatch, places=PLANTED, number=NAN):
        self.places, self.number = places, number
        self.step, self.part, original = -1, 0, loop.Run.step

        def counted(run, parts):
            self.step, self.part = run.clock.step, 0
            return original(run, parts)

        monkeypatch.setattr(loop.Run, "step", counted)
        self.engine = Engine(self.forward, self.loss)

    def planted(self, what):
        return self.places.get(self.step) == (self.part % 2, what)

    def forward(self, model, batch, hints):
        if self.planted("images"):
            batch = replace(batch, images=batch.images * self.number)
        predictions = FAST.forward(model, batch, hints)
        logits = predictions.logits * self.number if self.planted("logits") else predictions.logits
        if self.planted("gradient") and logits.requires_grad:  # not where a step is replayed to find the cause
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return replace(predictions, logits=logits)

    def loss(self, predictions, batch, norm, config):
        self_loss = self.planted("loss")
        self.part += 1
        losses = FAST.loss(predictions, batch, norm, config)
        return replace(losses, total=losses.total * self.number) if self_loss else losses


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


def test_a_run_without_a_finite_step_says_so_at_its_end(tmp_path, monkeypatch):
    config = replace(with_batch_norm(tmp_path / "run"), steps=3, evaluations=1, statistics=3)
    planting = Planting(monkeypatch, dict.fromkeys(range(3), (0, "gradient")))
    with pytest.raises(FloatingPointError, match="none of the 3 steps was finite"):
        loop.train(config, planting.engine)


LONG = 20  # steps of a run with numbers planted at random


def plant_at_random(folder, seed, number):
    """Plant so many numbers in runs of LONG steps, look at everything that moves after each, and count their kinds.

    The images of each step that was passed over must be those of its batch, and no others may be named.
    """
    random, kinds = np.random.default_rng(seed), Counter()
    while kinds.total() < number:
        steps = random.choice(LONG, size=min(int(random.integers(1, 10)), number - kinds.total()), replace=False)
        what = ("loss", "logits", "images", "gradient")
        places = {int(step): (int(random.integers(2)), str(random.choice(what))) for step in sorted(steps)}
        batches, step_of = [], loop.Run.step

        def watched(run, parts, step_of=step_of, batches=batches, places=places):
            batches.append([image for part in parts for image in part.image_ids])
            numbers = step_of(run, parts)
            moving = [*run.model.state_dict().values(), *run.average.model.state_dict().values()]
            moving += [value for state in run.optimiser.state.values() for value in state.values()]
            assert all(value.isfinite().all() for value in moving), (seed, run.clock.step, places)
            return numbers

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Run, "step", watched)
            planting = Planting(patch, places, float(random.choice([NAN, float("inf"), -float("inf")])))
            config = with_batch_norm(folder / str(kinds.total()))
            run = loop.train(replace(config, steps=LONG, evaluations=1, statistics=0), planting.engine)
        skipped = {line["step"] - 1: line["skipped"]["images"] for line in read_metrics(run) if "skipped" in line}
        assert skipped == {step: batches[step] for step in places}, (seed, places)
        kinds.update(kind for _, kind in places.values())
    return kinds


SIZES = [(0, 3), pytest.param(1, 30, marks=pytest.mark.slow), pytest.param(2, 200, marks=pytest.mark.record)]


@pytest.mark.parametrize(("seed", "number"), SIZES, ids=["3", "30", "200"])
def test_whatever_is_not_finite_reaches_no_weight_and_its_batch_is_named(tmp_path, seed, number):
    assert plant_at_random(tmp_path, seed, number).total() == number


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
