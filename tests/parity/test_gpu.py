"""A GPU computes what the CPU computes; skipped where there is none.

Compared in float64, where kernels and orders of summation differ by the last digits alone: what is further apart is a
fault, not a rounding.
"""

import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lucidetr import cli
from lucidetr.data.dataset import open_dataset
from lucidetr.deployment.detector import load
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training import loop
from lucidetr.training.checkpoint import load_newest_training
from lucidetr.training.memory import add_gradients, fitting_micro_batch, largest_batch
from lucidetr.training.muon import Muon
from lucidetr.training.optimiser import build_optimiser
from lucidetr.training.precision import autocast, choose_precision
from lucidetr.training.replay import record
from lucidetr.training.run_log import read_metrics
from run_tools import tiny, train_until_interrupted

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DATA = "generated:digits?size=64&digit=14-24&objects=1-3&train=12&val=4"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def setting(name, **model):
    """Return a recipe on pictures of 64 pixels, without dropout."""
    config = recipe(name)
    images = replace(config.images, size=64, max_size=64)
    return replace(config, model=replace(config.model, **({"dropout": 0.0} | model)), images=images, data=DATA)


def losses_and_gradients(config, device, precision):
    """Return the loss of a batch and every gradient, on the CPU, of weights that are the same at every call."""
    torch.manual_seed(0)
    model = DETR(config.model).double() if precision == "fp64" else DETR(config.model)
    model = model.to(device).to(memory_format=torch.channels_last).train()
    batch = largest_batch(config, open_dataset(DATA, "train").annotations, 2)
    loss = add_gradients(config, model, batch, autocast(precision, device), batch.counts.tolist())
    return float(loss), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


OPTIONS = [
    pytest.param("detr-xs", {}, id="detr-xs"),
    pytest.param("detr-r50", {}, id="detr-r50"),
    pytest.param("lucid-xs", {}, id="lucid-xs"),
    pytest.param("lucid-xs", {"query_groups": 2}, id="groups"),
    pytest.param(
        "lucid-xs",
        {"queries": "selected", "box_bias": "gaussian", "boxes": "refined_twice", "query_groups": 2, "denoising": 0.4},
        id="options",
    ),
    pytest.param("lucid-s-lite0", {}, id="lucid-s-lite0"),
    pytest.param("lucid-m", {}, id="lucid-m"),
]


@pytest.mark.parametrize(("name", "model"), OPTIONS)
def test_loss_and_gradients_are_the_same(name, model):
    config = setting(name, **model)
    loss, gradients = losses_and_gradients(config, GPU, "fp64")
    expected, theirs = losses_and_gradients(config, CPU, "fp64")
    assert loss == pytest.approx(expected, rel=1e-9)
    assert gradients.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    for key, gradient in theirs.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=1e-8 * largest, msg=key)


def test_bf16_is_what_a_gpu_computes_in_and_close_by():
    assert choose_precision("auto", GPU) == "bf16"
    config = setting("lucid-xs")
    loss, gradients = losses_and_gradients(config, GPU, "bf16")
    expected, _ = losses_and_gradients(config, CPU, "fp64")
    assert loss == pytest.approx(expected, rel=0.05)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_steps_are_the_same(matrices):
    config = setting("lucid-xs")
    torch.manual_seed(0)
    mine = DETR(config.model).double()
    other = copy.deepcopy(mine).to(GPU).to(memory_format=torch.channels_last)
    optimisers = [build_optimiser(model, replace(config.optimiser, matrices=matrices)) for model in (mine, other)]
    assert isinstance(optimisers[0], Muon) == (matrices == "muon")
    for step in range(3):
        torch.manual_seed(step)
        for one, two in zip(mine.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            two.grad = torch.empty_like(two).copy_(one.grad)  # laid out as the parameter is
        for optimiser in optimisers:
            optimiser.step()
    for (name, one), two in zip(mine.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.cpu(), one, rtol=0, atol=1e-9, msg=name)


def replayed_run(out, **changes):
    """Return a run of six steps that can be replayed, with dropout, whose draws a recording must not repeat."""
    known = {"steps": 6, "evaluations": 3, "batch": 4, "micro_batch": 4, "replay": True}
    return replace(setting("lucid-xs", dropout=0.1), out=str(out), **(known | changes))


@pytest.mark.parametrize(("build", "workers"), [(tiny, 0), (tiny, 2), (replayed_run, 2)])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, build, workers):
    known = {"device": "cuda", "precision": "fp64", "workers": workers}
    whole = loop.train(build(tmp_path / "whole", **known))
    train_until_interrupted(build(tmp_path / "cut", **known), monkeypatch)
    cut = loop.train(build(tmp_path / "cut", resume=True, **known))
    a, b = (load_newest_training(run / "checkpoints")[0] for run in (whole, cut))
    assert a.keys() == b.keys()
    assert "random.cuda" in a
    for name in a:
        torch.testing.assert_close(a[name].double(), b[name].double(), rtol=0, atol=1e-7, msg=name)
    assert [line.get("loss") for line in read_metrics(cut)] == pytest.approx(
        [line.get("loss") for line in read_metrics(whole)], rel=1e-6
    )


def test_a_run_and_what_is_made_of_it(tmp_path, capsys, monkeypatch):
    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["lucidetr", *map(str, arguments)])
        cli.main()

    run = tmp_path / "run"
    main("train", "lucid-xs", "--data", DATA, "--steps", "30", "--out", run, "--device", "cuda", "--workers", "2")
    said = capsys.readouterr().out
    assert "cuda, bf16" in said
    assert "GB" in said, "the peak of memory is not told"
    described = json.loads((run / "run.json").read_text())[0]
    assert described["device"] == torch.cuda.get_device_name()
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = {device: load(run, device, "fp64").predict(picture) for device in ("cuda", "cpu")}
    torch.testing.assert_close(found["cuda"].scores, found["cpu"].scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["cuda"].boxes_xyxy, found["cpu"].boxes_xyxy, rtol=0, atol=1e-3)
    assert found["cuda"].scores.device == CPU
    fast = load(run, "cuda").predict(picture)
    torch.testing.assert_close(fast.scores[:1].double(), found["cpu"].scores[:1].double(), rtol=0, atol=0.05)
    main("eval", run, "--data", DATA, "--device", "cuda")
    assert "AP" in capsys.readouterr().out


def replayed(config, precision):
    """Return loss, gradients and buffers of two steps' batches by a recording, and the same by the model as it is."""
    annotations = open_dataset(DATA, "train").annotations
    torch.manual_seed(0)
    model = DETR(config.model).to(GPU).to(memory_format=torch.channels_last).train()
    model = model.double() if precision == "fp64" else model
    expected = copy.deepcopy(model)
    recording = record(model, config, annotations, precision)
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), f"recording moved {name}"
    found = []
    for computing, own in ((recording, model), (expected, expected)):
        for seed in (1, 2):  # the second one's inputs are not those of the recording
            torch.manual_seed(seed)
            batch = largest_batch(config, annotations, config.micro_batch)
            own.zero_grad()
            loss = add_gradients(config, computing, batch, autocast(precision, GPU), batch.counts.tolist())
        gradients = {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}
        found.append((float(loss), gradients, dict(own.named_buffers())))
    return found


@pytest.mark.parametrize(("name", "model"), OPTIONS[:4] + OPTIONS[6:])
def test_a_recorded_step_is_the_same(name, model):
    config = replace(setting(name, **model), batch=2, micro_batch=2)
    (loss, gradients, buffers), (expected, theirs, others) = replayed(config, "fp64")
    assert loss == pytest.approx(expected, rel=1e-9)
    assert gradients.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    for key, gradient in theirs.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=1e-8 * largest, msg=key)
    for key, buffer in others.items():
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-9, atol=1e-9, msg=key)


def test_a_recorded_step_in_bf16_rounds_what_a_step_rounds():
    """The weights of each pass, and nothing of the heads, which compute in float32 forward and backward."""
    config = replace(setting("lucid-xs"), batch=2, micro_batch=2)
    annotations = open_dataset(DATA, "train").annotations
    torch.manual_seed(0)
    model = DETR(config.model).to(GPU).to(memory_format=torch.channels_last).train()
    recording = record(model, config, annotations, "bf16")
    with torch.no_grad():
        for parameter in model.backbone.parameters():  # what was rounded for the recording is of no use now
            parameter.copy_(parameter.flatten().flip(0).view_as(parameter))
    batch = largest_batch(config, annotations, 2)
    found = []
    for computing in (recording, model):
        model.zero_grad()
        loss = add_gradients(config, computing, batch, autocast("bf16", GPU), batch.counts.tolist())
        found.append(
            (float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (loss, gradients), (expected, theirs) = found
    assert loss == pytest.approx(expected, rel=1e-3)
    for key in ("heads.box.output.weight", "queries.box.output.weight", "queries.category.weight"):
        largest = float(theirs[key].abs().max())
        torch.testing.assert_close(gradients[key], theirs[key], rtol=0, atol=1e-3 * largest, msg=key)


def test_a_recorded_run_passes_over_a_step_that_is_not_finite(tmp_path, monkeypatch):
    config = setting("lucid-xs")
    known = {"steps": 6, "evaluations": 2, "batch": 4, "micro_batch": 4, "device": "cuda", "replay": True}
    step, calls = loop.Run.step, []

    def poisoned(self, parts):
        calls.append(1)
        if len(calls) == 3:
            parts = [replace(part, images=part.images * torch.nan) for part in parts]
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", poisoned)
    folder = loop.train(replace(config, out=str(tmp_path / "run"), **known))
    assert [line["step"] for line in read_metrics(folder) if "skipped" in line] == [3]
    tensors, _, _ = load_newest_training(folder / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def test_a_recorded_run_is_the_same(tmp_path, capsys):
    def run(name, **changes):
        config = setting("lucid-xs")
        known = {"steps": 6, "evaluations": 2, "batch": 4, "micro_batch": 4, "device": "cuda", "precision": "fp64"}
        folder = loop.train(replace(config, out=str(tmp_path / name), workers=2, **(known | changes)))
        return load_newest_training(folder / "checkpoints")[0]

    recorded, usual = run("recorded", replay=True), run("usual")
    assert capsys.readouterr().out.count("steps are replayed from a recording") == 1
    assert recorded.keys() == usual.keys()
    for name in usual:
        if not name.startswith("random"):
            torch.testing.assert_close(recorded[name].double(), usual[name].double(), rtol=0, atol=1e-6, msg=name)


def test_a_batch_fills_the_memory_of_a_gpu():
    config = setting("lucid-xs")
    model = DETR(config.model).to(GPU)
    annotations = open_dataset(DATA, "train").annotations
    assert fitting_micro_batch(config, model, annotations, autocast("bf16", GPU), most=16) == 16
