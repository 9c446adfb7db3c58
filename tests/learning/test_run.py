"""Whole runs: resumed equals uninterrupted, parts equal the whole, a few images are learned by heart."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.data import batching
from lucidetr.data.batching import Steps, training_steps
from lucidetr.data.dataset import open_dataset
from lucidetr.deployment.detector import load
from lucidetr.errors import InputError
from lucidetr.evaluation.coco import NUMBERS, Metrics
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training import loop
from lucidetr.training.checkpoint import load_newest_training
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.run_log import describe_data, digest, read_metrics
from lucidetr.training.start import fit_to_data
from run_tools import TINY, newest_state, tiny, train_until_interrupted

from .test_distributed import small_lucid
from .test_durability import plant, short


def without_time(lines):
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, monkeypatch, workers):
    whole = loop.train(tiny(tmp_path / "whole", workers=workers))

    train_until_interrupted(tiny(tmp_path / "cut", workers=workers), monkeypatch)
    cut = loop.train(tiny(tmp_path / "cut", workers=workers, resume=True))

    a, b = newest_state(whole), newest_state(cut)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert without_time(read_metrics(whole)) == without_time(read_metrics(cut))
    assert (whole / "metrics-val.json").read_bytes() == (cut / "metrics-val.json").read_bytes()
    assert len(json.loads((cut / "run.json").read_text())) == 2


def twice(folder, seed, number):
    """Train so many times with one seed, with 0, 2 and 4 workers in turn; all must leave the same. Return how many."""
    first = loop.train(tiny(folder / "first", seed=seed))
    expected = newest_state(first)
    for i in range(number):
        again = loop.train(tiny(folder / str(i), seed=seed, workers=(2, 4, 0)[i % 3]))
        found = newest_state(again)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], (seed, i)
        assert without_time(read_metrics(again)) == without_time(read_metrics(first))
    return number


SIZES = [(0, 1), pytest.param(1, 6, marks=pytest.mark.slow), pytest.param(2, 20, marks=pytest.mark.record)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("seed", "number"), SIZES, ids=["1", "6", "20"])
def test_one_seed_gives_one_run_whoever_reads_the_pictures(tmp_path, seed, number):
    assert twice(tmp_path, seed, number) == number


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path):
    run = loop.train(tiny(tmp_path / "new", resume=True, steps=2))
    assert read_metrics(run)[-1]["step"] == 2


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path):
    run = loop.train(tiny(tmp_path / "run", steps=1))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="holds a run already: add --resume"):
        loop.train(tiny(run, steps=1))
    with pytest.raises(InputError, match=r"began with other settings: steps 2 \(was 1\)"):
        loop.train(tiny(run, steps=2, resume=True))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_run_from_before_there_was_a_choice_of_steps_goes_on_with_adamw(tmp_path, monkeypatch):
    """Its files say nothing of `matrices`; a recipe of today may have another value there."""
    step, steps = loop.Run.step, []

    def stopping(self, parts):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", stopping)
    config = tiny(tmp_path / "run", steps=3, evaluations=1)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config)
    for name in ("config.json", "run.json"):
        path = tmp_path / "run" / name
        content, number = re.subn(r'"matrices": "adamw",\s*', "", path.read_text())
        assert number > 0
        path.write_text(content)
    now = replace(config, resume=True, optimiser=replace(config.optimiser, matrices="muon"))
    with pytest.raises(InputError, match=r"optimiser.matrices 'muon' \(was 'adamw'\)"):
        loop.train(now)
    assert read_metrics(loop.train(replace(config, resume=True)))[-1]["step"] == 3


def test_a_run_without_its_checkpoints_is_not_begun_anew(tmp_path):
    run = loop.train(tiny(tmp_path / "run", steps=1))
    shutil.rmtree(run / "checkpoints")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(InputError) as refused:
        loop.train(tiny(run, steps=1, resume=True))
    assert str(refused.value) == (
        f"{run} holds a model but no checkpoint to go on from: choose another --out, "
        f"or start from it by --weights {run}"
    )
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_run_killed_between_its_first_model_and_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    def killed(*known, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_training", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.train(tiny(tmp_path / "run", steps=1))
    assert (tmp_path / "run" / "best.safetensors").is_file()
    run = loop.train(tiny(tmp_path / "run", steps=1, resume=True))
    assert [line["step"] for line in read_metrics(run) if "val/AP" in line] == [1]
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="holds a model but no checkpoint"):
        loop.train(tiny(run, steps=1, resume=True))


def test_generated_scenes_are_known_by_their_name_alone(tmp_path):
    """Another kind of processor may round a box otherwise."""
    made, given = open_dataset(TINY, "train"), open_dataset(str(plant(tmp_path / "data")), "train")
    assert describe_data(made, made)["contents"] == digest()
    assert describe_data(given, given)["contents"] == digest(given.annotations, given.annotations) != digest()


def test_mosaics_of_more_objects_than_queries_are_told_of(tmp_path):
    data = open_dataset(str(plant(tmp_path / "data")), "train")
    most = int(data.annotations.objects_per_image().sum())  # of its four pictures
    config = recipe("lucid-xs")
    config = replace(config, model=replace(config.model, num_queries=most - 1))

    def told(mosaic, **changes):
        asked = replace(config, augmentation=replace(config.augmentation, mosaic=mosaic), **changes)
        return [note for note in fit_to_data(asked, data)[1] if "join" in note]

    (note,) = told(0.5)
    assert f"with up to {most} objects for {most - 1} queries" in note
    assert told(0.0) == told(0.5, overfit=2) == told(0.5, model=replace(config.model, num_queries=most)) == []


def test_a_run_is_not_resumed_on_other_data(tmp_path, monkeypatch):
    data = plant(tmp_path / "data")
    config = short(tmp_path / "run", data=str(data), resume=True)
    monkeypatch.setattr(loop.Run, "step", lambda self, parts: os.kill(os.getpid(), signal.SIGTERM) or {"skipped": {}})
    monkeypatch.setattr(loop.Run, "log_step", lambda self, numbers: None)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config)
    files = {split: data / split / "_annotations.coco.json" for split in ("train", "val")}
    sound = {split: json.loads(file.read_text()) for split, file in files.items()}
    square, disc = {"id": 1, "name": "square"}, {"id": 0, "name": "disc"}
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}

    def refused(**changes):
        for split, content in sound.items():
            files[split].write_text(json.dumps(content | changes.get(split, {}) | changes.get("both", {})))
        with pytest.raises((InputError, KeyboardInterrupt)) as error:
            loop.train(config)
        assert error.type is InputError, "it trains"
        assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
        return str(error.value)

    anew = f"or start anew: another --out, with --weights {tmp_path / 'run'}"
    assert refused(both={"categories": [disc, square]}) == (
        f"{tmp_path / 'run'} began with other categories: number 1 is 'disc' (id 0), was 'square' (id 1) "
        f"(2 now, 1 then); put the old ones back, {anew}"
    )
    assert "number 2 is 'disc' (id 5), was none" in refused(both={"categories": [square, disc | {"id": 5}]})
    assert "number 1 is 'cube' (id 1), was 'square'" in refused(both={"categories": [{"id": 1, "name": "cube"}]})
    fewer = {split: {"images": content["images"][:-1]} for split, content in sound.items()}
    for split, content in sound.items():
        kept = {image["id"] for image in fewer[split]["images"]}
        fewer[split]["annotations"] = [each for each in content["annotations"] if each["image_id"] in kept]
    assert refused(train=fewer["train"]) == (
        f"{tmp_path / 'run'} began with 4 training images, now there are 3: it could not go on as it would have; "
        f"put the old images back, {anew}"
    )
    other = "began with as many images, but their names, sizes, order or objects were others"
    first, second, *rest = sound["train"]["images"]
    names = {"file_name": second["file_name"]}, {"file_name": first["file_name"]}
    assert other in refused(train={"images": [first | names[0], second | names[1], *rest]})
    assert other in refused(val={"annotations": sound["val"]["annotations"][:-1]})
    assert "began with 2 validation images, now there are 1" in refused(val=fewer["val"])

    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    del starts[-1]["data"]  # as before it was noted
    (tmp_path / "run" / "run.json").write_text(json.dumps(starts))
    with pytest.raises(KeyboardInterrupt):
        loop.train(config)
    assert json.loads((tmp_path / "run" / "run.json").read_text())[-1]["data"]["validation_images"] == 1


def test_hints_add_their_loss_and_leave_the_others_as_they_were(tmp_path):
    alone, pairs = [], []

    def forward(model, batch, hints):
        with torch.no_grad():
            alone.append(FAST.forward(model, batch, None))
        return FAST.forward(model, batch, hints)

    def loss(predictions, batch, norm, weights):
        without = normalisers(batch.counts.tolist(), predictions.logits.shape[2], weights, 2)
        pairs.append((FAST.loss(predictions, batch, norm, weights), FAST.loss(alone[-1], batch, without, weights)))
        return pairs[-1][0]

    config = small_lucid(tmp_path / "run", steps=1, micro_batch=4, precision="fp64", preflight="off", statistics=0)
    loop.train(replace(config, model=replace(config.model, denoising=0.4)), Engine(forward, loss))
    ((both, own),) = pairs
    rows = [row for row in range(len(both.l1)) if row < 2 or (row - 2) % 3]  # a layer's rows: hints, two groups
    for name in ("classification", "l1", "giou"):
        torch.testing.assert_close(getattr(both, name)[rows], getattr(own, name), rtol=1e-9, atol=0)
    assert both.total > own.total


def test_minutes_count_training_only_and_end_the_run(tmp_path, monkeypatch):
    detect, seen = loop.detect, []

    def slow(*arguments, **options):
        seen.append(1)
        time.sleep(1.5)
        return detect(*arguments, **options)

    monkeypatch.setattr(loop, "detect", slow)
    run = loop.train(tiny(tmp_path / "run", steps=0, minutes=0.03, evaluations=2))
    last = read_metrics(run)[-1]
    assert len(seen) == 2
    assert "val/AP" in last
    assert 1.8 <= last["seconds"] < 1.8 + 1.5  # with the evaluations it would be 3 seconds more


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("workers", "matrices"), [(0, "adamw"), (2, "adamw"), (0, "muon")])
def test_a_signal_saves_and_stops_and_the_run_goes_on_bit_by_bit(tmp_path, monkeypatch, number, workers, matrices):
    usual = tiny(tmp_path / "whole", evaluations=1)
    config = replace(usual, optimiser=replace(usual.optimiser, matrices=matrices))
    whole = loop.train(config)
    step, steps = loop.Run.step, []

    def signalled(self, parts):
        steps.append(1)
        if len(steps) == 3:  # in the midst of a step
            os.kill(os.getpid(), number)
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", signalled)
    with pytest.raises(KeyboardInterrupt) as stopped:
        loop.train(replace(config, out=str(tmp_path / "cut"), workers=workers))
    assert stopped.value.status == 128 + number
    assert len(steps) == 3
    monkeypatch.setattr(loop.Run, "step", step)
    cut = loop.train(replace(config, out=str(tmp_path / "cut"), workers=workers, resume=True))
    a, b = newest_state(whole), newest_state(cut)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Train with workers, and nothing happens."""
    return loop.train(tiny(tmp_path_factory.mktemp("undisturbed") / "run", workers=2))


@pytest.mark.parametrize(("within", "call", "step"), [("step", 3, 3), ("detect", 2, 4)])
def test_a_worker_that_is_killed_ends_the_run_saved_and_it_goes_on_bit_by_bit(
    tmp_path, monkeypatch, capsys, undisturbed, within, call, step
):
    """In the midst of the third step, and in the evaluation after the fourth."""
    owner = loop.Run if within == "step" else loop
    real, calls = getattr(owner, within), []

    def bereaved(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            worker = multiprocessing.active_children()[-1]
            worker.kill()
            worker.join()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, within, bereaved)
    heeded = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(InputError) as lost:
        loop.train(tiny(tmp_path / "cut", workers=2))
    assert str(lost.value) == (
        "one of the 2 worker processes that read pictures was killed by signal 9 (Killed), most likely for lack of "
        "memory: choose fewer --workers, or give the machine or container more memory, shared memory included "
        f"(saved after step {step}; --resume goes on from there)"
    )
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) == heeded
    monkeypatch.setattr(owner, within, real)
    cut = loop.train(tiny(tmp_path / "cut", workers=0, resume=True))
    assert f"resumed after step {step}" in capsys.readouterr().out
    a, b = newest_state(undisturbed), newest_state(cut)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert without_time(read_metrics(undisturbed)) == without_time(read_metrics(cut))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_dies_while_it_is_waited_for_is_noticed(tmp_path, monkeypatch, stopped):
    """And where a signal came before, it is that which ends the run."""
    make = Steps.__getitem__

    def die(self, index):
        if index[0] == 0:
            time.sleep(1.0)  # by then the first batch is waited for
            if stopped:
                os.kill(os.getppid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, index)

    monkeypatch.setattr(Steps, "__getitem__", die)
    error = KeyboardInterrupt if stopped else InputError
    with pytest.raises(error, match="SIGTERM" if stopped else r"killed by signal 9 .* \(before the first step\)"):
        loop.train(tiny(tmp_path / "run", workers=2, preflight="off"))
    assert multiprocessing.active_children() == []


def test_workers_that_lose_patience_after_sigterm_take_nothing_with_them(tmp_path, monkeypatch):
    """An evaluation can last longer than workers outlive the signal."""

    def long(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        for worker in multiprocessing.active_children():
            worker.terminate()
            worker.join()
        return detect(*args, **kwargs)

    detect = loop.detect
    monkeypatch.setattr(loop, "detect", long)
    monkeypatch.setattr(batching, "GRACE_SECONDS", 1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        loop.train(tiny(tmp_path / "run", workers=2))
    assert stopped.value.status == 143
    assert load_newest_training(tmp_path / "run" / "checkpoints")[1]["step"] == 2


def test_a_worker_that_dies_when_it_is_no_longer_needed_ends_nothing(tmp_path, monkeypatch):
    def bereaved(*args, **kwargs):
        for worker in multiprocessing.active_children():
            worker.kill()
        return detect(*args, **kwargs)

    detect = loop.detect
    monkeypatch.setattr(loop, "detect", bereaved)
    run = loop.train(tiny(tmp_path / "run", steps=2, evaluations=1, workers=2))
    assert read_metrics(run)[-1]["step"] == 2


NOTHING = Metrics(
    numbers=dict.fromkeys(NUMBERS),
    per_class={},
    images=4,
    objects=0,
    detections=0,
    precision=np.zeros(0),
    recall=np.zeros(0),
    scores=np.zeros(0),
)


def test_of_equal_models_the_later_is_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda annotations, found: NOTHING)
    run = loop.train(tiny(tmp_path / "run"))
    assert json.loads((run / "best.json").read_text())["step"] == 6


def test_a_run_folder_holds_what_is_promised(tmp_path):
    run = loop.train(tiny(tmp_path / "run", steps=2))
    names = {file.name.split(".out.")[0] for file in run.iterdir()}
    expected = {"config.json", "run.json", "metrics.jsonl", "metrics-val.json", "best.safetensors", "best.json"}
    expected |= {"statistics.jsonl", "first-batch.png", "last.safetensors", "last.json", "checkpoints", "events"}
    expected |= {".lock"}
    assert names == expected
    description = json.loads((run / "run.json").read_text())[0]
    assert description["versions"]["torch"] == torch.__version__.split("+")[0]
    assert description["trained_as"]["model"]["num_classes"] == 10
    detector = load(run)
    assert detector.names == tuple("0123456789")
    assert len(detector.predict(open_dataset(TINY, "val").image(0))) == 25


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tmp_path):
    config = tiny(tmp_path)
    config = replace(config, model=replace(config.model, dropout=0.0, num_classes=10))
    dataset = open_dataset(TINY, "train")
    gradients = []
    for micro_batch in (4, 1):
        torch.manual_seed(0)
        model = DETR(config.model).double()
        parts = next(training_steps(dataset, config.images, None, seed=0, batch=4, micro_batch=micro_batch))
        norm = normalisers([c for part in parts for c in part.counts.tolist()], 25, config.loss)
        for part in parts:
            predictions = model(part.images.double(), part.padding)
            exact = replace(part, boxes_cxcywh=part.boxes_cxcywh.double())
            set_loss(predictions, exact, norm, config.loss).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-9, atol=1e-10, msg=name)


def test_ten_losses_in_a_row_that_are_no_numbers_stop_the_run_and_the_log_names_the_images(tmp_path, monkeypatch):
    def poison(model, images, padding, hints=None):
        predictions = forward(model, images, padding, hints)
        return replace(predictions, logits=predictions.logits * float("nan"))

    forward = DETR.forward
    monkeypatch.setattr(DETR, "forward", poison)
    with pytest.raises(FloatingPointError, match="step 10: 10 steps in a row were not finite"):
        loop.train(tiny(tmp_path / "run", steps=12, evaluations=1))
    skipped = [line["skipped"] for line in read_metrics(tmp_path / "run")]
    assert len(skipped) == 10
    assert all(len(each["images"]) == 4 and each["loss"] == "nan" for each in skipped)
    assert "is not finite: the model's class logits" in skipped[0]["cause"]


def test_more_objects_than_queries_is_said_with_numbers(tmp_path, capsys):
    config = tiny(tmp_path / "run", steps=1, preflight="off")
    loop.train(replace(config, model=replace(config.model, num_queries=2)))
    said = capsys.readouterr().out
    assert "have more objects (up to 3) than the model has queries (2)" in said
    assert "--model.num-queries to 3 or more" in said


@pytest.mark.slow
def test_detr_xs_learns_eight_scenes_by_heart(tmp_path):
    """The proof that model, matching, loss, boxes, evaluation and augmentation-free data agree with each other."""
    config = replace(recipe("detr-xs"), data="generated:digits?train=8&val=1", out=str(tmp_path / "run"))
    config = replace(config, overfit=8, steps=600, evaluations=2, model=replace(config.model, dropout=0.0))
    run = loop.train(config)
    numbers = json.loads((run / "metrics-val.json").read_text())
    assert numbers["AP50"] >= 0.95
    assert numbers["AP"] >= 0.8


def test_a_signal_that_a_library_swallows_before_the_first_step_is_made_up_for(tmp_path, monkeypatch):
    def swallows(*args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            return

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "preflight", swallows)
    with pytest.raises(KeyboardInterrupt) as stop:
        loop.train(tiny(tmp_path / "run", steps=3))
    assert getattr(stop.value, "status", None) == 130
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) == before
