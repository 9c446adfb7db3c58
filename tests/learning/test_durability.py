"""Runs that are killed, and data sets that are only read."""

import hashlib
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lucidetr.training import loop
from lucidetr.training.checkpoint import load_newest_training
from lucidetr.training.run_log import read_metrics
from run_tools import tiny
from surface_tools import lucidetr

STEPS = 8
TIMES = ("seconds", "images_per_second")


def short(out: Path, **changes):
    """Return a run that saves after every step."""
    return tiny(out, steps=STEPS, evaluations=STEPS, preflight="off", statistics=0, **changes)


@pytest.fixture(scope="module")
def apart():
    """Return processes that start in no time: each is forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lucidetr.training.loop", "torch.utils.tensorboard"])
    return context


def start(apart, config):
    process = apart.Process(target=loop.train, args=(config,))
    process.start()
    return process


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


@pytest.mark.slow
def test_killed_runs_go_on_bit_by_bit(tmp_path, apart):
    """Kills without warning, three or more inside a save and as many elsewhere; runs are taken up again and again."""
    random, kills = np.random.default_rng(0), {"at random": 0, "inside a save": 0}
    first = apart.Process(target=time.time)  # it waits for all imports
    first.start()
    first.join()
    started = time.monotonic()
    whole = start(apart, short(tmp_path / "whole"))
    whole.join()
    longest = time.monotonic() - started
    assert whole.exitcode == 0
    expected = fate(tmp_path / "whole")
    number = 0
    while min(kills.values()) < 3:
        run, number = tmp_path / f"killed-{number}", number + 1
        for turn in range(4):
            process = start(apart, short(run, resume=True))
            if turn % 2:
                kills["inside a save"] += kill_inside_a_save(process, random, run)
            else:
                kills["at random"] += kill_at_random(process, random, longest / 2)
        last = start(apart, short(run, resume=True))
        last.join()
        assert last.exitcode == 0
        assert fate(run) == expected
        assert not list(run.rglob(".step-*.tmp"))
        assert number < 8
    print(f"{kills}, {number} runs")


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
