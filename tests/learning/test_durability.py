"""Runs that are killed, and data sets that are only read."""

import hashlib
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lucidetr.errors import InputError
from lucidetr.training import loop
from lucidetr.training.checkpoint import load_newest_training
from lucidetr.training.interrupt import Stopped
from lucidetr.training.run_log import drop_lines_after, last_start, read_metrics
from run_tools import tiny, train_until_interrupted
from surface_tools import lucidetr

STEPS = 8
TURNS = 4  # kills of one run before it is left to end
PRELOADED = ["lucidetr.cli.train", "lucidetr.training.loop", "lucidetr.inspection.curves", "torch.utils.tensorboard"]
PRELOADED += ["sklearn.datasets"]  # holds the pictures of generated data
TIMES = ("seconds", "images_per_second")


def short(out: Path, **changes):
    """Return a small run that saves after every step."""
    config = tiny(out, steps=STEPS, evaluations=STEPS, preflight="off", statistics=0, **changes)
    return replace(config, model=replace(config.model, encoder_layers=1, decoder_layers=1))


def start(out: Path, **changes):
    """Start a short run in no time: in a process forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=loop.train, args=(short(out, **changes),))
    process.start()
    return process


def finish(process) -> None:
    """Wait for a run that nobody disturbs."""
    process.join()
    assert process.exitcode == 0


def kill_at_random(process, random: np.random.Generator, longest: float) -> bool:
    """Kill a run within so many seconds; say whether it was still alive."""
    process.join(random.uniform(0, longest))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def kill_inside_a_save(process, random: np.random.Generator, folder: Path) -> bool:
    """Kill a run while a temporary file of one of its first saves is there; say whether it was still alive."""
    saves, seen = int(random.integers(1, 4)), set()
    while process.is_alive():
        seen |= {file.name for file in folder.glob("checkpoints/.step-*.tmp")} if folder.is_dir() else set()
        if len(seen) >= saves:
            process.kill()
            process.join()
            return True
        time.sleep(0.0002)
    return False


def fate(run: Path) -> dict[str, object]:
    """Return all that a run leaves, but what tells of time."""
    tensors, state, notes = load_newest_training(run / "checkpoints")
    assert notes == []
    digests = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run)]
    models = {name: (run / name).read_bytes() for name in ("best.safetensors", "last.safetensors", "metrics-val.json")}
    return digests | models | {"lines": lines} | {k: v for k, v in state.items() if k != "seconds"}


def kills(folder: Path, seed: int, number: int) -> dict[str, int]:
    """Kill runs without warning and take them up again, and return how many kills came where.

    What is left at the end must be as of a run that nobody killed.
    """
    random, counts, runs = np.random.default_rng(seed), {"at random": 0, "inside a save": 0}, 0
    finish(start(folder / "first"))  # it waits for all imports
    started = time.monotonic()
    finish(start(folder / "whole"))
    longest, expected = time.monotonic() - started, fate(folder / "whole")
    while sum(counts.values()) < number:
        run, runs = folder / f"killed-{runs}", runs + 1
        for turn in range(TURNS):
            process = start(run, resume=True)
            if turn % 2:
                counts["inside a save"] += kill_inside_a_save(process, random, run)
            else:
                counts["at random"] += kill_at_random(process, random, longest / 2)
        finish(start(run, resume=True))
        assert fate(run) == expected, f"run {runs - 1}"
        assert not list(run.rglob(".step-*.tmp")), f"run {runs - 1}"
    return counts | {"runs": runs}


@pytest.mark.slow
def test_killed_runs_go_on_bit_by_bit(tmp_path):
    counts = kills(tmp_path, seed=0, number=40)
    print(counts)
    assert counts["inside a save"] >= 12
    assert counts["at random"] >= 12


def plant(folder: Path) -> Path:
    """Write a COCO set of a few pictures with a bright square each."""
    random = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(1, number + 1):
            pixels = random.integers(0, 100, (64, 64, 3), dtype=np.uint8)
            pixels[10 : 20 + i, 12:40] = 255
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
            annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [12, 10, 28, 10 + i]})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_deleted_during_a_run_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch, workers):
    data = str(plant(tmp_path / "data"))
    whole = loop.train(short(tmp_path / "whole", data=data))
    picture, step = tmp_path / "data" / "train" / "3.png", loop.Run.step
    pixels = picture.read_bytes()

    def deleting(self, parts):
        picture.unlink(missing_ok=True)
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", deleting)
    command = ["train", "detr-xs", "--out", tmp_path / "cut"]
    monkeypatch.setattr("lucidetr.studies.engines.choose_engine", lambda _: (config,))
    config = short(tmp_path / "cut", data=data, workers=workers, cache_gb=0.0)
    said = lucidetr(*command, status=2).splitlines()[0]
    found = re.fullmatch(
        rf"lucidetr: {re.escape(str(picture))}: no such image file \(saved after step (\d); --resume goes .*\)", said
    )
    assert found, said
    assert int(found[1]) in ((1,) if workers == 0 else range(1, 6))  # what was read ahead is still trained on
    picture.write_bytes(pixels)
    monkeypatch.setattr(loop.Run, "step", step)
    loop.train(short(tmp_path / "cut", data=data, workers=workers, cache_gb=0.0, resume=True))
    assert fate(tmp_path / "cut") == fate(whole)


def test_a_validation_picture_that_breaks_during_a_run_loses_nothing(tmp_path, monkeypatch):
    """It is met in an evaluation: the step before is saved, and what is resumed evaluates first."""
    data = str(plant(tmp_path / "data"))
    how = {"data": data, "cache_gb": 0.0, "save_minutes": 1000.0}
    whole = loop.train(short(tmp_path / "whole", **how))
    picture, step = tmp_path / "data" / "val" / "2.png", loop.Run.step
    pixels = picture.read_bytes()

    def breaking(self, parts):
        if self.clock.step == 4:
            picture.write_bytes(b"broken")
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", breaking)
    with pytest.raises(InputError, match=r"val/2\.png: not an image .* \(saved after step 5; --resume goes on"):
        loop.train(short(tmp_path / "cut", **how))
    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(InputError, match=r"saved after step 5; --resume"):
        loop.train(short(tmp_path / "cut", **how, resume=True))
    picture.write_bytes(pixels)
    loop.train(short(tmp_path / "cut", **how, resume=True))
    assert fate(tmp_path / "cut") == fate(whole)


@pytest.mark.parametrize("step", [3, STEPS])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(tmp_path, monkeypatch, step):
    """Nor is it begun for nothing: the last one, too, is made up for when the run is resumed."""
    whole = loop.train(short(tmp_path / "whole"))
    detect, looks = loop.detect, []

    def interrupted(*args, progress, **kwargs):
        def look_up(done):
            looks.append(done)
            if len(looks) == 2 * (step - 1) + 1:  # two batches of pictures in each evaluation
                signal.raise_signal(signal.SIGTERM)
            progress(done)

        return detect(*args, progress=look_up, **kwargs)

    monkeypatch.setattr(loop, "detect", interrupted)
    with pytest.raises(Stopped):
        loop.train(short(tmp_path / "cut"))
    assert len(looks) == 2 * (step - 1) + 1, "the rest of the pictures was not looked at"
    assert max(line["step"] for line in read_metrics(tmp_path / "cut") if "val/AP" in line) == step - 1
    loop.train(short(tmp_path / "cut", resume=True))
    assert fate(tmp_path / "cut") == fate(whole)


def test_an_evaluation_that_is_made_up_for_is_logged_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "val/AP": 0.1}, {"step": 2, "loss": 3.0}, {"step": 2, "val/AP": 0.2}, {"step": 3, "loss": 2.0}]
    for owes, kept in ((False, lines[:3]), (True, lines[:2])):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        drop_lines_after(path, 2, owes)
        assert read_metrics(tmp_path) == kept


def tree(folder: Path) -> dict[str, tuple]:
    """Return names, contents, rights and dates of all that is in a folder."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        about = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (digest, about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def test_a_data_set_is_the_same_after_every_command(tmp_path):
    data = plant(tmp_path / "data")
    before = tree(data)
    run = loop.train(tiny(tmp_path / "run", data=str(data), steps=3, evaluations=1))
    assert tree(data) == before, "train"
    for arguments in (
        ("eval", run),
        ("predict", run, data / "val", "--out", tmp_path / "drawn", "--threshold", 0),
        ("doctor", data, "--json", tmp_path / "found.json", "--sheet", tmp_path / "doctor.png"),
        ("inspect", run, "--out", tmp_path / "page.html"),
        ("data", "sample", data, tmp_path / "sample.png"),
        ("data", "convert", data, tmp_path / "yolo", "--to", "yolo"),
    ):
        lucidetr(*arguments, cwd=tmp_path)
        assert tree(data) == before, arguments[0]


def test_a_folder_has_one_run_at_a_time(tmp_path, monkeypatch):
    """As two of a shell's loop that forgot to change --out; the second is another process."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from run_tools import tiny
from lucidetr.errors import InputError
from lucidetr.training.loop import train
try:
    train(tiny({str(tmp_path / "run")!r}, seed=7))
except InputError as error:
    print(error)
"""
    said = []
    step = loop.Run.step

    def meanwhile(self, parts):
        if not said:
            said.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", meanwhile)
    run = loop.train(short(tmp_path / "run"))
    assert "run: another process trains there; wait for it, or choose another --out" in said[0]
    assert last_start(run)["trained_as"]["seed"] == 0
    lines = [line["step"] for line in read_metrics(run) if "loss" in line]
    assert lines == sorted(set(lines)), "another run's lines are among them"


def test_a_step_without_memory_is_undone_and_what_was_before_it_is_saved(tmp_path, monkeypatch):
    whole = loop.train(short(tmp_path / "whole"))
    step, calls = loop.Run.step, []

    def full(self, parts):
        calls.append(1)
        if len(calls) == 4:
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, parts)

    monkeypatch.setattr(loop.Run, "step", full)
    with pytest.raises(
        InputError,
        match=r"does not fit into the memory of cpu: lower --micro-batch .*saved after step 3; --resume goes on",
    ):
        loop.train(short(tmp_path / "cut"))
    cut = loop.train(short(tmp_path / "cut", resume=True))
    a, b = (load_newest_training(run / "checkpoints")[0] for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_may_need_less_memory(tmp_path, monkeypatch, capsys):
    def still(name, **changes):
        """Without dropout, whose draws depend on the parts of a batch."""
        config = tiny(tmp_path / name, precision="fp64", **changes)
        return replace(config, model=replace(config.model, dropout=0.0))

    train_until_interrupted(still("whole"), monkeypatch)
    shutil.copytree(tmp_path / "whole", tmp_path / "less")
    whole = loop.train(still("whole", resume=True))
    assert last_start(whole)["trained_as"]["micro_batch"] == 2
    capsys.readouterr()
    less = loop.train(still("less", resume=True, micro_batch=1, recompute=True))
    assert "batch 4 as 4 × 1" in capsys.readouterr().out
    now = last_start(less)["trained_as"]
    assert (now["micro_batch"], now["recompute"]) == (1, True)
    a, b = (load_newest_training(run / "checkpoints")[0] for run in (whole, less))
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


def test_a_resumed_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lucidetr.training.prepare.choose_precision", lambda asked, device: "fp32")
    train_until_interrupted(tiny(tmp_path / "a"), monkeypatch)
    monkeypatch.setattr("lucidetr.training.prepare.choose_precision", lambda asked, device: "bf16")
    loop.train(tiny(tmp_path / "a", resume=True))
    assert last_start(tmp_path / "a")["precision"] == "fp32"
    train_until_interrupted(tiny(tmp_path / "b"), monkeypatch)
    monkeypatch.setattr("lucidetr.training.prepare.choose_precision", lambda asked, device: "fp32")
    loop.train(tiny(tmp_path / "b", resume=True))
    assert "warning: the run began in bf16, which cpu does not multiply" in capsys.readouterr().out
