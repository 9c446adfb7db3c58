"""What goes wrong around a run: doubled signals, torn logs, full disks, other people's checkpoints, lost pictures."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lucidetr.config import AugmentationConfig, ImageConfig
from lucidetr.data.batching import build_augmentation, step_samples, training_steps
from lucidetr.data.dataset import open_dataset
from lucidetr.errors import InputError
from lucidetr.training import interrupt, loop
from lucidetr.training.checkpoint import load_model, load_newest_training, newest_step, save_model, save_training
from lucidetr.training.interrupt import Interruption, Stopped
from lucidetr.training.run_log import RunLog, last_start, read_metrics
from rank_work import lose_a_picture, together
from run_tools import TINY, tiny


def short(out, **changes):
    return tiny(out, **({"steps": 3, "evaluations": 3, "preflight": "off", "statistics": 0} | changes))


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_is_obeyed(monkeypatch):
    now = 100.0
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    with Interruption() as waiting:
        waiting.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert waiting.number == signal.SIGTERM
        now += 2
        with pytest.raises(Stopped, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="has no such signal")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed_stops_a_run_unless_it_shall_be_ignored(nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with Interruption() as waiting:
            waiting.wait()
            os.kill(os.getpid(), signal.SIGHUP)
            assert waiting.number == (None if nohup else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("torn", [b"\0\0\0\0\n", b"\n", b"\xff\xfe{\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": 2, "lo'])
def test_a_torn_log_does_not_keep_a_run_from_going_on(tmp_path, torn):
    loop.train(short(tmp_path / "run"))
    log = tmp_path / "run" / "metrics.jsonl"
    before = read_metrics(tmp_path / "run")
    log.write_bytes(log.read_bytes() + torn)
    (tmp_path / "run" / "statistics.jsonl").write_bytes(torn)
    loop.train(short(tmp_path / "run", resume=True))
    assert read_metrics(tmp_path / "run") == before
    assert b"\0" not in log.read_bytes()


@pytest.mark.parametrize("content", ["[]", "[{}]", "[3]"])
def test_a_damaged_note_of_how_a_run_began_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json: damaged: it does not say how the run was started"):
        last_start(tmp_path)


def test_a_run_goes_on_without_tensorboards_file_where_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.warns(UserWarning, match="TensorBoard's file cannot be written any more") as said:
        loop.train(short(tmp_path / "run"))
    assert len(said) == 1
    assert newest_step(tmp_path / "run") == 3
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]


def test_the_log_is_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    order = []
    sync, save = RunLog.sync, loop.save_training
    monkeypatch.setattr(RunLog, "sync", lambda log: (order.append("log"), sync(log)))
    monkeypatch.setattr(loop, "save_training", lambda *a, **k: (order.append("checkpoint"), save(*a, **k)))
    loop.train(short(tmp_path / "run"))
    assert order == ["log", "checkpoint"] * 3


def test_a_worse_model_does_not_take_the_place_of_one_saved_after_the_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    loop.train(short(run))
    tensors, card = load_model(run / "best.safetensors")
    save_model(run / "best.safetensors", tensors, replace(card, metrics={"AP": 0.9}))
    loop.train(short(run, resume=True))  # begins with what it still owes: nothing
    tensors, numbers, _ = load_newest_training(run / "checkpoints")
    save_training(run / "checkpoints", 3, tensors, numbers | {"owes": True})
    loop.train(short(run, resume=True))
    assert load_model(run / "best.safetensors")[1].metrics["AP"] == 0.9
    assert load_newest_training(run / "checkpoints")[1]["best"] == 0.9


def test_a_damaged_best_model_is_said_and_replaced(tmp_path, capsys):
    run = tmp_path / "run"
    loop.train(short(run))
    (run / "best.safetensors").write_bytes(b"nothing")
    tensors, numbers, _ = load_newest_training(run / "checkpoints")
    save_training(run / "checkpoints", 3, tensors, numbers | {"owes": True, "best": 0.9})
    loop.train(short(run, resume=True))
    assert "the next evaluation writes another" in capsys.readouterr().out
    load_model(run / "best.safetensors")


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    run = tmp_path / "run"
    loop.train(short(run))
    tensors, numbers, _ = load_newest_training(run / "checkpoints")
    name = next(name for name in tensors if name.startswith("model.") and tensors[name].dim() == 2)
    save_training(run / "checkpoints", 9, tensors | {name: torch.zeros(3, 3)}, numbers | {"step": 9})
    with pytest.raises(InputError, match="checkpoints: the newest is of another model"):
        loop.train(short(run, resume=True))


UNSENT = """
import warnings
from lucidetr.config import ImageConfig
from lucidetr.data import batching
from lucidetr.data.dataset import open_dataset
from lucidetr.errors import InputError

dataset = open_dataset("generated:digits?size=32&digit=10-12&objects=1-2&train=8&val=1", "train")
batching.make_batch = lambda *_: lambda: None  # a function without a name cannot be handed over
steps = batching.training_steps(dataset, ImageConfig(resize="square", size=32), None, seed=0, batch=2, micro_batch=2,
                                workers=1)
try:
    next(steps)
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts on reading processes that are forked")
def test_a_batch_that_cannot_be_handed_over_is_not_waited_for():
    """As where /dev/shm is full: it used to be dropped with a traceback, and training waited for it for ever."""
    done = subprocess.run([sys.executable, "-c", UNSENT], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.startswith("one of the 1 worker processes that read pictures ended with 1, most likely"), done
    assert "lucidetr: a batch cannot be handed over" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("loser", [0, 1])
def test_a_picture_that_one_rank_cannot_read_loses_nothing(tmp_path, loser):
    config = short(tmp_path / "run", data=TINY, steps=6, evaluations=1, batch=4, micro_batch=2, device="cpu")
    said = together(2, tmp_path / "said", lose_a_picture, config, loser)
    assert newest_step(tmp_path / "run") == 2
    own = "a.png: no such image file"
    other = "another rank cannot read its part of the next step: its own message says why"
    saved = " (saved after step 2; --resume goes on from there)"
    assert said == ([own + saved, other] if loser == 0 else [other + saved, own])


def steps_of(data, skips, workers=0):
    train = replace(open_dataset(str(data), "train"), skips=skips)
    images = ImageConfig(resize="square", size=32)
    return training_steps(train, images, None, seed=0, batch=4, micro_batch=2, workers=workers)


def planted(folder):
    """Write eight pictures, of which the third is damaged and the last of another size than is said."""
    names = [f"{number}.png" for number in range(8)]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (number * 30, 0, 0)).save(folder / name)
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:60])
    Image.new("RGB", (41, 30)).save(folder / names[7])
    images = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)]
    boxes = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [5, 6, 10, 20]} for i in range(8)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_skipped_if_that_is_asked_for(tmp_path, capfd, workers):
    data = planted(tmp_path)
    steps = steps_of(data, skips=True, workers=workers)
    with closing(steps):
        seen = [i for _ in range(4) for part in next(steps) for i in part.image_ids]
    expected = [{2: 3, 7: 0}.get(index, index) for step in range(4) for _, index in step_samples(8, 0, step, 4)]
    assert seen == expected
    said = capfd.readouterr().err
    for name in ("2.png: ", "7.png: image 7 is 41 × 30 pixels"):
        assert 1 <= said.count(f"warning: skipped in training: {tmp_path / name}") <= max(workers, 1)
    with closing(steps_of(data, skips=False, workers=workers)) as steps, pytest.raises(InputError, match=r"[27]\.png"):
        for _ in range(2):
            next(steps)


def test_where_all_pictures_would_be_skipped_the_run_stops(tmp_path):
    data = planted(tmp_path)
    for file in data.glob("*.png"):
        file.write_bytes(b"")
    with closing(steps_of(data, skips=True)) as steps, pytest.raises(InputError, match="none of 8 images can be read"):
        next(steps)


def test_a_run_that_stopped_at_a_damaged_picture_goes_on_without_it(tmp_path):
    data, run = planted(tmp_path), tmp_path / "run"
    content = json.loads((data / "train.json").read_text())
    sound = {"images": content["images"][:1], "annotations": content["annotations"][:1]}
    (data / "val.json").write_text(json.dumps(content | sound))
    config = short(run, data=str(data), batch=4, micro_batch=2, cache_gb=0.0)
    with pytest.raises(InputError, match=r"\.png"):
        loop.train(config)
    (data / "4.png").write_bytes((data / "4.png").read_bytes()[:70])
    loop.train(replace(config, resume=True, bad_pictures="skip"))
    assert newest_step(run) == 3


def test_the_pictures_of_a_mosaic_are_skipped_too(tmp_path, capfd):
    data = planted(tmp_path)
    train = replace(open_dataset(str(data), "train"), skips=True)
    images = ImageConfig(resize="square", size=32)
    change = build_augmentation(AugmentationConfig(crop=0.0, scales=(), mosaic=1.0, mosaic_until=1.0), images)
    with closing(training_steps(train, images, change, seed=0, batch=4, micro_batch=4)) as steps:
        seen = [next(steps)[0] for _ in range(6)]
    assert all(len(part) == 4 for part in seen)
    assert "skipped in training" in capfd.readouterr().err


def test_a_pipe_that_is_closed_does_not_keep_a_run_from_saving(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("rich.console.Console.print", closed)
    loop.train(short(tmp_path / "run"))
    assert newest_step(tmp_path / "run") == 3


def test_a_service_whose_worker_dies_again_and_again_is_not_healthy():
    from lucidetr.deployment.service.keeper import MANY, WITHIN, Keeper
    from lucidetr.deployment.service.messages import Settings
    from lucidetr.deployment.service.metrics import Metrics

    async def falls(*ages):
        keeper = Keeper(Settings("run"), Metrics(), lambda: None, lambda: None)
        now = asyncio.get_running_loop().time()
        keeper.deaths.extend(now - age for age in ages)
        return keeper.falls

    assert not asyncio.run(falls(*[0.0] * (MANY - 1)))
    assert asyncio.run(falls(*[WITHIN / 2] * MANY))
    assert not asyncio.run(falls(WITHIN + 1, *[0.0] * (MANY - 1)))
