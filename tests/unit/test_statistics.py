"""What training writes down of itself: looks at weights, gradients and matching."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.structures import Assignment, Batch, Predictions
from lucidetr.training import loop
from lucidetr.training.clock import Clock
from lucidetr.training.statistics import (
    BINS,
    Recorder,
    Sights,
    count_duplicates,
    describe,
    forget_after,
    read_statistics,
    silent_share,
    updates,
)
from run_tools import newest_state, tiny, train_until_interrupted


def batch_of(counts, boxes=None, labels=None, ids=None):
    most = max(counts)
    return Batch(
        images=torch.zeros(len(counts), 3, 8, 8),
        padding=torch.zeros(len(counts), 8, 8, dtype=torch.bool),
        boxes_cxcywh=torch.zeros(len(counts), most, 4) if boxes is None else boxes,
        labels=torch.zeros(len(counts), most, dtype=torch.long) if labels is None else labels,
        counts=torch.tensor(counts),
        image_ids=tuple(range(len(counts))) if ids is None else ids,
        sizes=((8, 8),) * len(counts),
    )


def assigned(*matches):
    """(layer, image, query, object) of each match."""
    return Assignment(*torch.tensor(matches, dtype=torch.long).reshape(-1, 4).unbind(1))


def note(sights, ids, counts, *matches, layers=1):
    sights.note(ids, torch.tensor(counts), assigned(*matches), layers)


def test_churn_is_the_share_of_objects_with_another_query():
    sights = Sights(num_queries=10)
    note(sights, (7, 8), (2, 1), (0, 0, 3, 0), (0, 0, 4, 1), (0, 1, 5, 0))
    assert sights.churn() == [None]  # nothing was seen twice
    note(sights, (8, 7), (1, 2), (0, 0, 5, 0), (0, 1, 3, 0), (0, 1, 9, 1))  # one of three moved
    assert sights.churn() == [pytest.approx(1 / 3, abs=1e-4)]
    assert sights.churn() == [None]  # counted anew
    note(sights, (7,), (2,), (0, 0, 3, 0), (0, 0, 9, 1))  # as at the last sight, not the first
    assert sights.churn() == [0.0]


def test_churn_is_counted_for_each_layer_and_over_all_steps_since_the_last_look():
    sights = Sights(num_queries=4)
    for query in (0, 0, 1):  # layer 0 stays twice of two times, layer 1 moves once
        note(sights, (7,), (1,), (0, 0, 2, 0), (1, 0, query, 0), layers=2)
    assert sights.churn() == [0.0, 0.5]


def test_images_with_another_number_of_objects_and_unmatched_objects_are_not_compared():
    sights = Sights(num_queries=4)
    note(sights, (7,), (2,), (0, 0, 0, 0), (0, 0, 1, 1))
    note(sights, (7,), (1,), (0, 0, 3, 0))  # augmentation dropped an object
    assert sights.churn() == [None]
    note(sights, (7,), (1,))  # seen, but left without a query
    note(sights, (7,), (1,), (0, 0, 2, 0))
    assert sights.churn() == [None]


def test_used_grows_and_never_shrinks():
    sights = Sights(num_queries=4)
    note(sights, (7,), (1,), (0, 0, 2, 0), (1, 0, 0, 0), layers=2)
    assert sights.used() == [0.25, 0.25]
    note(sights, (9,), (2,), (0, 0, 2, 0), (0, 0, 3, 1), (1, 0, 1, 0), (1, 0, 2, 1), layers=2)
    assert sights.used() == [0.5, 0.75]
    note(sights, (9, 3), (0, 0), layers=2)  # no object at all
    assert sights.used() == [0.5, 0.75]


def logits_of(*scores):
    """Logits of one layer and image whose probabilities are these, for either kind of classification."""
    return torch.tensor(scores)[None, None]


def test_duplicates_say_class_and_place_with_a_score():
    box, near, far = [0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.3], [0.5, 0.5, 0.4, 0.2]  # IoU 1, 0.75, 0.5
    boxes = torch.tensor([box, box, near, far, box, box])[None, None]
    #        matched     says so     says so     far         other class   too low
    scores = [[0.9, 0.1], [0.8, 0.1], [0.31, 0.1], [0.9, 0.1], [0.31, 0.9], [0.29, 0.1]]
    truth = torch.tensor([box, [0.1, 0.1, 0.1, 0.1]])[None]
    batch = batch_of([2], truth, torch.tensor([[0, 1]]))
    one = assigned((0, 0, 0, 0), (0, 0, 3, 1))
    sigmoid = Predictions(logits=logits_of(*scores).logit(), boxes_cxcywh=boxes)
    assert count_duplicates(sigmoid, batch, one, num_classes=2).tolist() == [2]
    rest = [[a, 0.05, 0.95 - a] for a, _ in scores]  # most of the mass in no object, which is no class
    rest[4] = [0.3, 0.4, 0.3]
    softmax = Predictions(logits=logits_of(*rest).log(), boxes_cxcywh=boxes)
    assert count_duplicates(softmax, batch, one, num_classes=2).tolist() == [2]


def test_padded_objects_have_no_duplicates():
    boxes = torch.tensor([0.0, 0.0, 0.0, 0.0]).repeat(2, 2, 3, 1)
    predictions = Predictions(logits=torch.full((2, 2, 3, 1), 5.0), boxes_cxcywh=boxes)
    batch = batch_of([0, 1], torch.zeros(2, 1, 4))
    assert count_duplicates(predictions, batch, assigned(), num_classes=1).tolist() == [0, 0]


def test_tensors_are_described_by_known_numbers():
    weight, gradient = torch.tensor([[0.0, 2.0], [4.0, 6.0]]), torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    line = describe({"w": (weight, gradient), "b": (torch.ones(3), torch.zeros(3))})
    assert line["w"]["weight"] == [3.0, pytest.approx(5**0.5, abs=1e-3), 0.0, 6.0]
    assert line["w"]["gradient"] == [0.0, pytest.approx(0.5**0.5, abs=1e-4), -1.0, 1.0]
    low, high, counts = line["w"]["weight_histogram"]
    assert (low, high, len(counts), sum(counts)) == (0.0, 6.0, BINS, 4)
    assert [i for i, count in enumerate(counts) if count] == [0, 10, 21, 31]
    assert line["w"]["silent"] == 0.5
    assert line["b"]["silent"] == 1.0
    assert line["b"]["weight"] == [1.0, 0.0, 1.0, 1.0]
    low, high, counts = line["b"]["weight_histogram"]
    assert (low, high, sum(counts), counts[16]) == (0.5, 1.5, 3, 3)  # one value: a range about it


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_left_to_the_loop(poison):
    line = describe({"w": (torch.ones(2), torch.tensor([poison, 1.0]))})
    assert sum(line["w"]["gradient_histogram"][2]) <= 1


def test_units_behind_a_dead_relu_are_silent():
    layer = nn.Linear(2, 4)
    nn.init.ones_(layer.weight)
    layer.bias.data = torch.tensor([0.0, -100.0, 0.0, -100.0])
    layer(torch.rand(8, 2)).relu().sum().backward()
    assert silent_share(layer.weight.grad).item() == 0.5
    assert silent_share(layer.bias.grad).item() == 0.5


def test_an_update_is_a_share_of_the_length_before():
    before = {"w": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2)}
    after = {"w": torch.tensor([3.0, 4.5]), "zero": torch.ones(2)}
    assert updates(before, after) == {"w": 0.1, "zero": None}
    assert updates({}, after) == {}


def look_at(recorder, model, step, due, optimiser):
    batch = batch_of([1], torch.tensor([[[0.5, 0.5, 0.4, 0.4]]]))
    predictions = Predictions(
        logits=torch.full((2, 1, 3, 1), 5.0), boxes_cxcywh=batch.boxes_cxcywh[None].repeat(2, 1, 3, 1)
    )
    assignment = assigned((0, 0, 1, 0), (1, 0, 2, 0))
    recorder.begin(step, due)
    model(torch.ones(1, 2)).sum().backward()
    recorder.see_predictions(predictions, batch, assignment)
    recorder.see_gradients(model)
    recorder.see_matching([batch], [SimpleNamespace(assignment=assignment, l1=torch.zeros(2))])
    optimiser.step()
    recorder.see_update(model)
    optimiser.zero_grad()
    recorder.write(step + 1, 1.23456)


def test_a_look_is_a_line_and_other_steps_are_none(tmp_path):
    config = replace(recipe("lucid-xs").model, num_queries=3)
    recorder = Recorder(tmp_path, config, looks=2)
    model = nn.Linear(2, 1)
    nn.init.ones_(model.weight)
    model.bias.requires_grad_(False)
    optimiser = torch.optim.SGD([model.weight], lr=0.1)
    for step, due in enumerate((0, 1, 1, 2)):
        look_at(recorder, model, step, due, optimiser)
    lines = read_statistics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4]
    first = lines[0]
    assert first["seconds"] == 1.235
    assert list(first["tensors"]) == ["weight"]  # what does not learn is left out
    assert first["tensors"]["weight"]["weight"] == [1.0, 0.0, 1.0, 1.0]  # before the step
    assert first["tensors"]["weight"]["gradient"] == [1.0, 0.0, 1.0, 1.0]
    assert first["tensors"]["weight"]["update"] == 0.1
    assert lines[1]["tensors"]["weight"]["weight"][0] == 0.9
    assert first["queries"] == {"churn": [None, None], "used": [0.3333, 0.3333], "duplicates": [2.0, 2.0]}
    assert lines[1]["queries"]["churn"] == [0.0, 0.0]


def test_a_recorder_of_no_looks_writes_nothing(tmp_path):
    model = nn.Linear(2, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path, recipe("lucid-xs").model, looks=0)
    look_at(recorder, model, 0, 0, optimiser)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="--statistics = -1: choose at least 0"):
        replace(recipe("lucid-xs"), statistics=-1)


def test_a_parameter_without_a_gradient_counts_as_silent(tmp_path):
    recorder = Recorder(tmp_path, recipe("lucid-xs").model, looks=1)
    recorder.begin(0, 0)
    recorder.see_gradients(nn.Linear(2, 1))
    assert recorder.tensors["weight"]["gradient"] == [0.0, 0.0, 0.0, 0.0]
    assert recorder.tensors["weight"]["silent"] == 1.0


def test_half_a_last_line_is_passed_over_and_later_steps_are_forgotten(tmp_path):
    assert read_statistics(tmp_path) == []
    forget_after(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "statistics.jsonl").write_text('{"step": 1}\n{"step": 5}\n{"st')
    assert read_statistics(tmp_path) == [{"step": 1}, {"step": 5}]
    forget_after(tmp_path, 4)
    assert (tmp_path / "statistics.jsonl").read_text() == '{"step": 1}\n'


def test_a_folder_that_is_gone_is_said_in_plain_words(tmp_path):
    recorder = Recorder(tmp_path / "gone", recipe("lucid-xs").model, looks=1)
    model = nn.Linear(2, 1)
    with pytest.raises(InputError, match=r"statistics.jsonl: cannot be written \(No such file or directory\)"):
        look_at(recorder, model, 0, 0, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("steps", "looks", "expected"), [(30, 30, 30), (100, 24, 25), (7, 24, 7), (50, 1, 2), (1, 24, 1)]
)
def test_looks_are_even_with_the_first_step_and_the_last(tmp_path, steps, looks, expected):
    recorder, clock = Recorder(tmp_path, recipe("lucid-xs").model, looks), Clock(steps=steps, minutes=0.0)
    taken = []
    for clock.step in range(steps):
        recorder.begin(clock.step, clock.due_after_step(looks))
        if recorder.looking:
            taken.append(clock.step + 1)
    assert (taken[0], taken[-1], len(taken)) == (1, steps, expected)
    gaps = [later - earlier for earlier, later in pairwise(taken[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_run_of_minutes_looks_at_its_end_too(tmp_path):
    recorder, clock = Recorder(tmp_path, recipe("lucid-xs").model, 24), Clock(steps=0, minutes=1.0)
    taken = []
    while clock.progress < 1.0:
        recorder.begin(clock.step, clock.due_after_step(24))
        if recorder.looking:
            taken.append(clock.step + 1)
        clock.step += 1
        clock.seconds += 0.2 if clock.step % 7 else 0.3
    assert len(taken) == 25
    assert taken[0] == 1
    assert taken[-1] >= clock.step - 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps, each of them looked at."""
    return loop.train(tiny(tmp_path_factory.mktemp("runs") / "whole", statistics=6))


def test_a_run_learns_the_same_without_looks(tmp_path, whole):
    bare = loop.train(tiny(tmp_path / "bare", statistics=0))
    a, b = newest_state(whole), newest_state(bare)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert not (bare / "statistics.jsonl").exists()


def test_a_run_writes_what_is_promised(whole):
    lines = read_statistics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    parameters = {name for name, _ in DETR(replace(tiny("").model, num_classes=10)).named_parameters()}
    for line in lines:
        assert set(line["tensors"]) == parameters
        assert all(len(values) == 3 for values in line["queries"].values())  # decoder layers
        assert all(0 < share <= 1 for share in line["queries"]["used"])
    assert lines[0]["queries"]["churn"] == [None] * 3
    assert None not in lines[-1]["queries"]["churn"]  # ten images, six steps of four
    moved = [line["tensors"]["projection.weight"]["update"] for line in lines]
    assert 0 < moved[0] < moved[1]  # the rate rises, and even the first step is one


def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(tmp_path, monkeypatch, whole):
    train_until_interrupted(tiny(tmp_path / "cut", statistics=6), monkeypatch)
    with open(tmp_path / "cut" / "statistics.jsonl", "a") as file:
        file.write('{"step": 6, "te')
    cut = loop.train(tiny(tmp_path / "cut", statistics=6, resume=True))
    a, b = read_statistics(whole), read_statistics(cut)
    assert [line["step"] for line in b] == [1, 2, 3, 4, 5, 6]
    assert [line["tensors"] for line in a] == [line["tensors"] for line in b]


def test_layers_of_proposals_groups_and_hints_are_rows_of_their_own(tmp_path):
    config = tiny(tmp_path / "run", statistics=2, steps=2, evaluations=1)
    lucid = recipe("lucid-xs")
    model = replace(
        lucid.model,
        backbone=replace(lucid.model.backbone, width=8),
        d_model=32,
        num_heads=2,
        head_dim=16,
        feed_forward=64,
        num_queries=5,
        query_groups=2,
        denoising=0.4,
    )
    run = loop.train(replace(config, model=model, loss=lucid.loss, images=replace(lucid.images, size=64)))
    queries = read_statistics(run)[-1]["queries"]
    assert {len(values) for values in queries.values()} == {2 + 3 * model.decoder_layers}
