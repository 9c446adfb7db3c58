"""Several processes train and evaluate as one: the same gradients, samples, losses and detections, and no one waits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lucidetr.data.batching import CountFrom, evaluation_batches, training_steps
from lucidetr.data.dataset import open_dataset
from lucidetr.errors import InputError
from lucidetr.recipes import recipe
from lucidetr.training.distributed import ALONE, Ranks, check_share, joined, launched
from lucidetr.training.run_log import read_metrics
from rank_work import fall_silent, five_steps, found, many_things, together, train_noting
from run_tools import TINY, tiny

THREES = "generated:digits?size=64&digit=14-24&objects=3-3&train=20&val=5"


def still(out, **changes):
    """Return a tiny run without dropout."""
    config = tiny(out, **({"preflight": "off"} | changes))
    return replace(config, model=replace(config.model, dropout=0.0))


def small_lucid(out, **changes):
    """Return a tiny run of the other family: proposals, groups of queries, boxes that are moved, sigmoids."""
    config = recipe("lucid-xs")
    backbone = replace(config.model.backbone, width=8, norm="group")
    sizes = {"d_model": 32, "num_heads": 2, "head_dim": 16, "num_queries": 8, "query_groups": 2, "dropout": 0.0}
    model = replace(config.model, backbone=backbone, **sizes)
    images = replace(config.images, size=64, max_size=64)
    run = {"data": THREES, "out": str(out), "steps": 6, "epochs": 0.0, "minutes": 0.0, "batch": 4, "micro_batch": 2}
    return replace(config, model=model, images=images, **(run | changes))


def distance(a, b):
    """Return |a − b| / |b| over all tensors together."""
    assert a.keys() == b.keys()
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return (apart / sum(float(each.double().square().sum()) for each in b.values())) ** 0.5


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return the configs of the comparisons, what two ranks made of them, and the folder."""
    folder = tmp_path_factory.mktemp("two")
    configs = {
        "fp64": still(folder, data=THREES, precision="fp64"),
        "fp32": still(folder, data=THREES, precision="fp32"),
        "lucid": small_lucid(folder, precision="fp64"),
    }
    return configs, together(2, folder / "ranks", many_things, folder, configs, THREES), folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-6), ("lucid", 1e-12)])
def test_two_ranks_have_the_gradient_of_one_with_the_double_batch(two, name, tolerance):
    """With images without objects on one rank, on the other, and on both; in one part and in several."""
    configs, ranks, folder = two
    whole = five_steps(replace(configs[name], out=str(folder / f"{name}-whole")), 4)
    summed = five_steps(replace(configs[name], out=str(folder / f"{name}-summed")), 1)
    others = {"accumulated": summed}
    others |= {f"rank {r}, {m} at once": ranks[r][name, m] for r in (0, 1) for m in (2, 1)}
    for who, made in others.items():
        assert distance(made["gradients"][0], whole["gradients"][0]) <= tolerance, who
        if whole["losses"].dtype == torch.float64:  # AdamW makes much of a small gradient's rounding in float32
            for step in range(1, 5):
                assert distance(made["gradients"][step], whole["gradients"][step]) <= tolerance, (who, step)
            assert distance(made["weights"], whole["weights"]) <= tolerance, who
        torch.testing.assert_close(made["losses"].to(whole["losses"]), whole["losses"], rtol=1e-5, atol=0)
    first, second = (rank[name, 2]["weights"] for rank in ranks)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 1])
def test_two_ranks_detect_what_one_does_to_the_last_digit(two, batch):
    configs, ranks, _ = two
    alone = found(configs["fp64"], THREES, batch)
    assert len(alone) == 5  # which two ranks cannot share evenly
    assert ranks[1]["found", batch] == []
    both = ranks[0]["found", batch]
    assert [[torch.equal(*pair) for pair in zip(*each, strict=True)] for each in zip(both, alone, strict=True)] == [
        [True] * 3
    ] * 5


@pytest.mark.slow
def test_two_ranks_agree(two):
    _, (first, second), _ = two
    assert first["gathered"] == second["gathered"] == [0, 7, 1, 7]
    assert first["agreed"] == second["agreed"] == (5.0, signal.SIGTERM)
    assert first["running_mean"].tolist() == second["running_mean"].tolist() == pytest.approx([0.05, 0.05])
    assert "--batch 3 cannot be shared evenly by 2 ranks: choose 2 or 4" in first["refused"] == second["refused"]
    assert torch.equal(second["draw"], second["same draw"])  # a step that is repeated draws the same
    assert not torch.equal(first["draw"], second["draw"])


@pytest.mark.slow
def test_a_run_goes_from_one_rank_to_two_and_back(tmp_path):
    """Every sample comes exactly once an epoch and the losses are those of one rank; a signal to any rank stops all."""
    how = {"steps": 9, "precision": "fp32", "evaluations": 3}
    whole = train_noting(still(tmp_path / "whole", **how))
    config = still(tmp_path / "parted", **how)
    begin = train_noting(config, stop_in_step=2)
    config = replace(config, resume=True)
    middle = together(2, tmp_path / "ranks", train_noting, config, 5, 1)
    end = train_noting(config)

    assert [begin["ended"], *(rank["ended"] for rank in middle), end["ended"]] == ["stopped with 143"] * 3 + ["done"]
    shared = [first + second for first, second in zip(*(rank["seen"] for rank in middle), strict=True)]
    assert [len(begin["seen"]), len(shared), len(end["seen"])] == [2, 3, 4]
    seen = begin["seen"] + shared + end["seen"]
    assert seen == whole["seen"]
    samples = [image for step in seen for image in step]
    every = sorted(open_dataset(TINY, "train").annotations.image_ids.tolist())
    assert [sorted(samples[at : at + 10]) for at in (0, 10, 20)] == [every] * 3

    curves = [read_metrics(tmp_path / name) for name in ("whole", "parted")]
    losses = [[(line["step"], line["loss"]) for line in lines if "loss" in line] for lines in curves]
    assert [step for step, _ in losses[1]] == list(range(1, 10))
    assert losses[1] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses[0]]
    looks = [[(line["step"], line["val/AP"]) for line in lines if "val/AP" in line] for lines in curves]
    assert [step for step, _ in looks[1]] == [step for step, _ in looks[0]] == [3, 6, 9]
    parted = tmp_path / "parted"
    assert [start["ranks"] for start in json.loads((parted / "run.json").read_text())] == [1, 2, 1]
    assert {file.name for file in (parted / "checkpoints").glob("*.safetensors")} == {"step-00000006.safetensors"} | {
        "step-00000009.safetensors"
    }


@pytest.mark.slow
def test_a_rank_that_falls_silent_is_named(tmp_path):
    waited, _ = together(2, tmp_path, fall_silent, still(tmp_path / "run", timeout_minutes=0.05))
    assert "rank 0 of 2 waited for the others in vain: no sign of rank 1 (--timeout-minutes 0.05" in waited


def rank_processes(out: Path) -> dict[int, int]:
    """Return the process of each rank that trains into that folder."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
        except OSError:  # ended meanwhile
            continue
        rank = re.search(rb"(?:^|\0)RANK=(\d+)", environment)
        if rank and str(out).encode() in command:
            found[int(rank[1])] = int(place.name)
    return found


def wait_for(condition, seconds, process):
    ends = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "torchrun has ended"
        assert time.monotonic() < ends, f"nothing in {seconds} s"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_rank_ends_all_and_a_restart_goes_on_until_one_freezes(tmp_path):
    out = tmp_path / "run"
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 -m lucidetr"
    train = f"train detr-xs --data {TINY} --out {out} --steps 1000000 --batch 4 --micro-batch 1 --resume"
    sizes = "--model.backbone.width 8 --model.d-model 32 --model.feed-forward 64 --images.size 64 --images.max-size 64"
    rest = "--evaluations 1 --save-minutes 0.01 --timeout-minutes 0.25 --device cpu --precision fp32 --preflight off"
    command = f"{launch} {train} {sizes} {rest}".split()

    def saved():
        files = sorted((out / "checkpoints").glob("step-*.safetensors"))
        return int(files[-1].stem[5:]) if files else 0

    log = tmp_path / "said.txt"
    with open(log, "wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            wait_for(saved, 150, process)
            os.kill(rank_processes(out)[1], signal.SIGKILL)
            wait_for(lambda: "resumed after step" in log.read_text(), 150, process)
            before = saved()
            wait_for(lambda: saved() > before, 60, process)
            os.kill(rank_processes(out)[1], signal.SIGSTOP)
            named = "rank 0 of 2 waited for the others in vain: no sign of rank 1"
            wait_for(lambda: named in log.read_text(), 15 + 10, process)  # the timeout and ten seconds
            assert process.wait(60) != 0  # torchrun gives the frozen one half a minute
        finally:
            left = rank_processes(out)
            for each in left.values():
                os.kill(each, signal.SIGKILL)
            process.kill()
            process.wait()
    assert left == {}
    text = log.read_text()
    assert "batch 4 as 2 ranks × 2 × 1" in text
    assert "failed (exitcode: -9) local_rank: 1" in text
    assert len(json.loads((out / "run.json").read_text())) == 2


def test_shares_of_a_step_are_the_step():
    """In any number of ranks and parts, and however many reading processes there are."""
    config, dataset = tiny(""), open_dataset(TINY, "train")

    def ids(micro_batch, share, workers=0):
        how = {"seed": 1, "batch": 6, "micro_batch": micro_batch, "workers": workers, "share": share}
        parts = next(training_steps(dataset, config.images, None, numbers=CountFrom(2), **how))
        assert max(len(part) for part in parts) <= micro_batch
        return [image for part in parts for image in part.image_ids]

    whole = ids(6, (0, 1))
    assert len(whole) == 6
    assert ids(2, (0, 2)) + ids(2, (1, 2)) == whole
    assert [image for rank in range(3) for image in ids(4, (rank, 3))] == whole


def test_batches_of_an_evaluation_are_dealt_in_turn():
    config, dataset = tiny(""), open_dataset(THREES, "val")
    whole = [part.image_ids for part in evaluation_batches(dataset, config.images, 2)]
    assert [len(part) for part in whole] == [2, 2, 1]
    dealt = [[part.image_ids for part in evaluation_batches(dataset, config.images, 2, (r, 2))] for r in (0, 1)]
    assert dealt == [whole[::2], whole[1::2]]
    assert list(evaluation_batches(dataset, config.images, 2, (3, 4))) == []


def test_one_process_is_alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == ALONE
    with joined(tiny("")) as ranks:
        assert ranks == ALONE


def test_what_ranks_cannot_do_is_said_before_they_meet(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match="--engine reference computes in one process, not in 2"),
        joined(tiny("", engine="reference")),
    ):
        pass
    with pytest.raises(InputError, match=r"--batch 2 cannot be shared evenly by 3 ranks: choose 3 "):
        check_share(2, Ranks(1, 3))
