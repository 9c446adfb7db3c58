"""What a guard notices in numbers that are given to it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lucid_tools import TINY
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training.guards import (
    FiniteGuard,
    find_stall,
    first_gradient,
    first_module,
    overflowing_gradient,
    skip_sentence,
    stall_sentence,
    undefined,
)
from lucidetr.training.randomness import random_state, random_state_kept, set_random_state
from lucidetr.training.statistics import Recorder

CPU = torch.device("cpu")
FALLING = [20.0, 18.0, 16.0, 14.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0]
FLAT = [20.0, 19.9, 20.1, 20.0, 19.9, 20.1, 20.0, 19.9, 20.0, 20.1]


def log_of(losses, precisions):
    """Return the log of a run of 100 steps: a loss at every tenth step, evaluations at the end of its first tenths."""
    lines = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    looks = [{"step": 10 * (i + 1), "val/AP": value} for i, value in enumerate(precisions) if value is not None]
    return sorted(lines + looks, key=lambda line: line["step"])


def share(line):
    return line["step"] / 100


@pytest.mark.parametrize(
    ("losses", "precisions", "expected"),
    [
        (FALLING[:5], [0.0] * 5, "AP"),
        (FALLING[:5], [0.001] * 5, "AP"),
        (FALLING[:5], [0.0, 0.0, 0.0, 0.0, 0.002], None),  # it learns
        (FALLING, [0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.002, 0.0, 0.0, 0.0], "AP"),  # it came apart
        (FALLING[:9], [0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.002, 0.0, 0.0], None),  # two evaluations only
        (FALLING, [None] * 8 + [0.0, 0.0], None),  # two evaluations, though the whole run
        (FALLING[:2], [0.0, 0.0], None),
        (FLAT[:5], [0.0] * 5, "loss"),
        (FLAT, [None] * 9 + [0.0], "loss"),
        (FLAT[:2], [0.0] * 2, None),  # too early
        (FLAT, [0.4] * 10, None),  # good already: a fine-tuned model
        ([], [0.0] * 10, None),  # no loss written down
    ],
)
def test_a_stall_is_noticed_and_nothing_else(losses, precisions, expected):
    assert find_stall(log_of(losses, precisions), share) == expected


def test_a_stall_is_said_once():
    lines = log_of(FALLING[:5], [0.0] * 5)
    assert find_stall([{"step": 30, "stall": "…"}, *lines], share) is None


def test_causes_come_in_the_order_of_their_likelihood():
    lines = log_of(FALLING[:5], [0.0] * 5)
    paper = stall_sentence("AP", lines, recipe("detr-r50"))
    assert "AP at most 0.001) while the loss fell from 20 to 12" in paper
    parts = ("(1) too few steps: the paper's design", "lucid-s", "(2) a rate (--optimiser.lr 0.0001)", "(3) boxes")
    parts += ("first-batch.png", "(4) labels", "(5)", "--overfit 8")
    places = [paper.index(part) for part in parts]
    assert places == sorted(places)
    assert "lucidetr doctor" not in stall_sentence("AP", lines, replace(recipe("detr-r50"), data="generated:digits"))
    other = stall_sentence("AP", lines, replace(recipe("detr-r50"), data="my cells", preflight="off"))
    assert "lucidetr doctor 'my cells'" in other
    assert "first-batch.png" not in other
    assert "lucid-s" not in stall_sentence("AP", lines, recipe("lucid-s"))
    flat = stall_sentence("loss", log_of([20.0] * 5, [0.0]), recipe("lucid-s"))
    assert flat.startswith("the loss does not fall: 20 at first, 20 now")
    assert flat.index("(1) a rate") < flat.index("(2) boxes")


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Conv2d(2, 1, 1))


def test_undoing_puts_back_statistics_and_random_state_and_names_the_first_bad_part():
    model = small()
    guard = FiniteGuard(model, CPU)
    guard.begin()
    buffers, random = [b.clone() for b in model.buffers()], torch.get_rng_state()
    images = torch.full((2, 1, 3, 3), float("inf"))
    model(images).sum().backward()
    assert not torch.stack([b.isfinite().all() for b in model.buffers()]).all()
    gradient = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert not guard.passes(torch.tensor(1.0), gradient)
    assert guard.undo(lambda: model(images)) == {"module": "0", "parameter": "3.weight"}
    assert all(torch.equal(now, was) for now, was in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_hooks


class Machine:
    """Stand in for the random state of a device that is not here: one number, counted up by each draw."""

    def __init__(self):
        self.number = 0

    def get_rng_state(self, *device):
        return torch.tensor([self.number])

    def set_rng_state(self, state, *device):
        self.number = int(state)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_devices_own_random_state_is_put_back_too(kind, monkeypatch):
    machine, device = Machine(), torch.device(kind)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(getattr(torch, kind), name, getattr(machine, name))
    guard = FiniteGuard(nn.Linear(1, 1), device)
    before = torch.get_rng_state()
    guard.begin()
    machine.number = 5
    torch.rand(3)
    guard.restore()
    assert machine.number == 0
    with random_state_kept(device):
        machine.number = 7
        torch.rand(3)
    assert machine.number == 0
    assert torch.equal(torch.get_rng_state(), before)
    set_random_state(random_state(CPU), device)  # a run that goes on beside another device's checkpoint
    assert machine.number == 0


def test_each_of_the_numbers_is_looked_at():
    guard, fine, bad = FiniteGuard(small(), CPU), torch.tensor(1.0), torch.tensor(float("inf"))
    assert guard.passes(fine, fine)
    assert not guard.passes(bad, fine)
    assert not guard.passes(fine, bad)
    guard.model[1].running_var[0] = float("nan")
    assert not guard.passes(fine, fine)


def test_a_gradient_that_overflows_on_the_way_back_is_named():
    model = small()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[0].weight.grad[0] = float("nan")
    assert first_gradient(model) == "0.weight"
    assert first_module(model, lambda: model(torch.ones(2, 1, 3, 3))) == ""


def test_gradients_too_large_for_a_norm_are_named_by_the_largest():
    model = small()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert overflowing_gradient(model) == ""
    model[0].weight.grad[0] = 1e25
    model[1].weight.grad[0] = -1e30
    assert overflowing_gradient(model) == "1.weight"
    guard = FiniteGuard(model, CPU)
    guard.begin()
    found = guard.undo(lambda: model(torch.ones(2, 1, 3, 3)))
    assert found == {"largest": "1.weight"}
    said = skip_sentence(1, {"images": [3], "loss": "9", "gradient_norm": "inf"} | found)
    assert said.endswith("first not finite: the norm of all gradients, of which that of 1.weight is the largest")


def test_a_run_whose_every_step_was_skipped_does_not_end_as_if_it_had_learned():
    guard = FiniteGuard(nn.Linear(1, 1), CPU)
    for step in (1, 2, 3):
        guard.begin()
        guard.undo(lambda: None)
        guard.stop_if_lost(step, last=False)
    with pytest.raises(FloatingPointError, match="none of the 3 steps was finite"):
        guard.stop_if_lost(3, last=True)
    guard.stop_if_lost(4, last=True)  # one of four was taken


def test_ten_in_a_row_stop_and_a_good_step_starts_the_count_anew():
    guard = FiniteGuard(nn.Linear(1, 1), CPU)
    for step in range(9):
        guard.begin()
        guard.undo(lambda: None)
        guard.stop_if_lost(step, last=False)
    assert guard.passes(torch.tensor(1.0), torch.tensor(1.0))
    for _ in range(10):
        guard.begin()
        guard.undo(lambda: None)
    with pytest.raises(FloatingPointError, match=r"step 19: 10 steps in a row .* unharmed"):
        guard.stop_if_lost(19, last=False)


def test_a_look_that_falls_on_a_skipped_step_is_taken_at_the_next(tmp_path):
    recorder = Recorder(tmp_path, recipe("lucid-xs").model, looks=2)
    recorder.begin(0, 0)
    recorder.pass_over()
    assert not recorder.looking
    recorder.begin(1, 0)
    assert recorder.looking


def test_a_part_that_cannot_be_matched_still_reaches_every_parameter():
    """Ranks sum their gradients parameter by parameter: all would wait for the rank that leaves one out."""
    model = DETR(replace(TINY, queries="selected", teach_tokens=True))
    predictions = model(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    undefined(predictions).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
