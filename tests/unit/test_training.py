"""The parts of training: average, rate, checkpoints, the length of a run."""

import json
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from lucidetr.categories import Categories
from lucidetr.config import ModelCard, OptimiserConfig
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training.checkpoint import (
    load_model,
    packed,
    save_model,
    save_training,
    training_checkpoints,
    write_atomically,
)
from lucidetr.training.clock import Clock, check_length, count_steps
from lucidetr.training.ema import MovingAverage
from lucidetr.training.optimiser import build_optimiser, freeze, learning_mode, rate
from lucidetr.training.precision import choose_device, choose_precision
from lucidetr.training.run_log import read_metrics
from lucidetr.training.state import put_back, training_tensors


def small_model():
    config = recipe("detr-xs").model
    return replace(config, backbone=replace(config.backbone, width=4), d_model=8, num_heads=1, head_dim=8)


def test_the_average_follows_its_horizon():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = MovingAverage(model, horizon=0.05)
    nn.init.ones_(model.weight)
    for _ in range(1000):
        average.update(model, expected_steps=1000)
    assert average.model.weight.item() == pytest.approx(1, abs=1e-6)  # the start is forgotten
    nn.init.zeros_(model.weight)
    for _ in range(50):  # one horizon: 5 % of 1000
        average.update(model, expected_steps=1000)
    assert average.model.weight.item() == pytest.approx(0.364, abs=0.01)  # (1 - 1/50)^50, about 1/e


def test_early_on_the_average_weighs_steps_by_those_before_them():
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, horizon=1.0)
    for step in range(1, 9):
        nn.init.constant_(model.weight, step)
        average.update(model, expected_steps=1000)
    weights = range(8)  # t − 1
    expected = sum(w * t for t, w in enumerate(weights, start=1)) / sum(weights)
    assert average.model.weight.item() == pytest.approx(expected)  # 6, where the plain mean is 4.5


def test_the_average_holds_batch_norm_statistics_too():
    model = nn.BatchNorm2d(2)
    average = MovingAverage(model, horizon=0.01)
    for _ in range(30):
        model(torch.randn(4, 2, 3, 3) + 5)
        average.update(model, expected_steps=30)
    assert (average.model.running_mean - model.running_mean).abs().max() < 0.5
    assert average.model.num_batches_tracked == 30


def test_the_rate_of_the_paper_drops_once():
    paper = OptimiserConfig()
    assert [rate(epoch / 300, paper) for epoch in (0, 199, 201, 299)] == [1.0, 1.0, 0.1, 0.1]


def test_backbone_and_rest_have_their_own_rates_and_frozen_parts_none():
    model = DETR(small_model())
    freeze(model, ("backbone.stem", "encoder"))
    optimiser = build_optimiser(model, OptimiserConfig(lr=1e-4, backbone_lr=1e-5))
    rates = {p: group["lr"] for group in optimiser.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("backbone.stem.", "encoder."))
        expected = None if frozen else 1e-5 if name.startswith("backbone.") else 1e-4
        assert rates.get(parameter) == expected, name


def test_a_cosine_rises_stays_flat_and_falls_to_its_share():
    config = OptimiserConfig(schedule="cosine", warmup=0.1, flat=0.6, final=0.2)
    assert rate(0.05, config) == pytest.approx(0.5)
    assert rate(0.0, config) == 0.01, "the first step is no wasted one"
    assert [rate(p, config) for p in (0.1, 0.3, 0.6)] == [1.0] * 3
    assert rate(0.8, config) == pytest.approx(0.2 + 0.8 / 2)  # half way down
    assert rate(0.7, config) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert rate(1.0, config) == pytest.approx(0.2)
    later = replace(config, warmup=0.3, flat=0.0)  # without a flat part it falls from the end of the rise
    assert [rate(p, later) for p in (0.3, 0.65)] == pytest.approx([1.0, 0.6])
    falling = [rate(p / 100, config) for p in range(60, 101)]
    assert falling == sorted(falling, reverse=True)


def test_a_part_that_is_none_cannot_be_frozen():
    with pytest.raises(InputError, match=r"--freeze 'backbone.stages.9' is no part of the model: did you mean"):
        freeze(DETR(small_model()), ("backbone.stages.9",))
    model = DETR(small_model())
    freeze(model, ("backbone", "projection", "encoder", "queries", "decoder", "heads"))
    with pytest.raises(InputError, match="every part of the model is frozen"):
        build_optimiser(model, OptimiserConfig())


def test_a_frozen_part_keeps_its_statistics_too():
    config = small_model()
    model = DETR(replace(config, backbone=replace(config.backbone, norm="batch")))
    freeze(model, ("backbone.stem", "backbone.stages.0"))
    learning_mode(model, ("backbone.stem", "backbone.stages.0"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.startswith(("backbone.stem", "backbone.stages.0"))]
    assert any(name.startswith("backbone.stages.1") for name in moved)


@pytest.mark.parametrize("frozen", [(), ("queries",), ("queries", "encoder")])
def test_frozen_queries_still_start_in_groups_and_let_tokens_be_taught(frozen):
    config = replace(recipe("lucid-xs").model, d_model=8, num_heads=1, head_dim=8, num_queries=4, query_groups=2)
    torch.manual_seed(0)
    model = DETR(replace(config, backbone=replace(config.backbone, width=4)))
    freeze(model, frozen)
    learning_mode(model, frozen)
    images, padding = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    said = model(images, padding)
    assert said.logits.shape[:3] == (2 * (1 + config.decoder_layers), 2, 4)
    assert said.tokens is not None
    assert model.eval()(images, padding).logits.shape[0] == 1 + config.decoder_layers


def test_a_state_comes_back_with_its_random_numbers_whatever_device_it_was_saved_on():
    def parts():
        model = nn.Linear(2, 1)
        return model, torch.optim.AdamW(model.parameters()), MovingAverage(model, horizon=0.1)

    cpu, whole = torch.device("cpu"), parts()
    whole[0](torch.ones(1, 2)).sum().backward()
    whole[1].step()
    tensors = training_tensors(*whole, cpu)
    drawn = torch.rand(3)
    again = parts()
    put_back(tensors | {"random.cuda": torch.zeros(16, dtype=torch.uint8)}, *again, cpu)
    assert torch.equal(torch.rand(3), drawn)
    back = training_tensors(*again, cpu)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors if not name.startswith("random."))


def test_half_a_last_line_of_the_log_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("steps", "evaluations"), [(100, 100), (50, 7), (49, 49), (3, 10)])
def test_evaluations_are_evenly_due(steps, evaluations):
    clock = Clock(steps=steps, minutes=0.0)
    due = []
    for clock.step in range(steps + 1):
        due.append(clock.due(evaluations))
    assert (due[0], due[-1]) == (0, evaluations)
    assert len(set(due)) - 1 == min(steps, evaluations)


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({}, "given: none"),
        ({"steps": 3, "epochs": 2.0}, "--epochs 2, --steps 3"),
        ({"steps": -3}, "--steps -3"),
    ],
)
def test_a_run_needs_one_length(length, said):
    with pytest.raises(InputError, match=rf"Give one of --epochs, --steps, --minutes above 0 \(.*{said}\)"):
        check_length(replace(recipe("detr-xs"), out="x", **length))


def test_epochs_become_steps():
    config = replace(recipe("detr-xs"), epochs=2.0, batch=16)
    assert count_steps(config, 100) == 13
    assert count_steps(replace(config, epochs=0.0, minutes=3.0), 100) == 0


def card():
    categories = Categories(ids=(3, 4), names=("x", "y"))
    model = replace(small_model(), num_classes=2)
    return ModelCard(model, recipe("detr-xs").images, categories, "detr-xs", 5, {"AP": 0.25})


def test_models_come_back_with_their_card(tmp_path):
    state = DETR(small_model()).state_dict()
    save_model(tmp_path / "best.safetensors", state, card())
    for path in (tmp_path, tmp_path / "best.safetensors"):
        tensors, read = load_model(path)
        assert read == card()
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert json.loads((tmp_path / "best.json").read_text())["categories"] == {"ids": [3, 4], "names": ["x", "y"]}


def test_files_that_are_no_model_say_so(tmp_path):
    with pytest.raises(InputError, match="has this run been trained"):
        load_model(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      trailing")
    with pytest.raises(InputError, match=r"a\.safetensors: not a readable safetensors file"):
        load_model(tmp_path / "a.safetensors")
    write_atomically(tmp_path / "b.safetensors", packed({"a": torch.zeros(1)}, {}))
    with pytest.raises(InputError, match="carry no lucidetr card"):
        load_model(tmp_path / "b.safetensors")
    write_atomically(tmp_path / "c.safetensors", packed({"a": torch.zeros(1)}, {"card": '{"schema": 99}'}))
    with pytest.raises(InputError, match="written by a newer lucidetr"):
        load_model(tmp_path / "c.safetensors")


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_atomically(path, packed({"a": torch.zeros(2)}, {}))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be written \(No space left on device\)"):
        write_atomically(path, packed({"a": torch.ones(2)}, {}))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_only_the_newest_training_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 100, 20):
        save_training(tmp_path, step, {"a": torch.zeros(1)}, {"step": step})
    assert sorted(step for step, _ in training_checkpoints(tmp_path)) == [20, 100]


def test_precision_follows_the_machine(monkeypatch):
    cpu = torch.device("cpu")
    for amx, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert choose_precision("auto", cpu) == expected
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("fp64", cpu) == "fp64"
    with pytest.raises(InputError, match="unknown precision half: Known: auto, bf16, fp32, fp64"):
        choose_precision("half", cpu)
    with pytest.raises(InputError, match="--precision fp64: mps computes no float64; choose fp32, or --device cpu"):
        choose_precision("fp64", torch.device("mps"))
    with pytest.raises(InputError, match="--device cuda:99 cannot be used here"):
        choose_device("cuda:99")
    with pytest.raises(InputError, match="--device tpux cannot be used here"):
        choose_device("tpux")
