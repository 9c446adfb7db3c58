"""Several processes train and evaluate as one: the same gradients, samples, losses and detections, and no one waits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lucidetr.cli import VERBS, evaluate, main
from lucidetr.data.batching import CountFrom, evaluation_batches, training_steps
from lucidetr.data.dataset import open_dataset
from lucidetr.errors import InputError
from lucidetr.recipes import recipe
from lucidetr.training.distributed import ALONE, Ranks, check_same_step, check_share, joined, launched
from lucidetr.training.loop import train
from lucidetr.training.precision import choose_device
from lucidetr.training.run_log import read_metrics
from rank_work import (
    evaluated,
    fall_silent,
    five_steps,
    found,
    many_things,
    resume_elsewhere,
    together,
    train_noting,
)
from run_tools import TINY, tiny, train_until_interrupted

THREES = "generated:digits?size=64&digit=14-24&objects=3-3&train=20&val=5"


def still(out, **changes):
    """Return a tiny run without dropout."""
    config = tiny(out, **({"preflight": "off"} | changes))
    return replace(config, model=replace(config.model, dropout=0.0))


def small_lucid(out, **changes):
    """Return a tiny run of the other family: proposals, taught tokens, groups of queries, moved boxes, sigmoids."""
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


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    """Return the configs of the comparisons, what two or four ranks made of them, and the folder."""
    folder = tmp_path_factory.mktemp("several")
    configs = {
        "fp64": still(folder, data=THREES, precision="fp64"),
        "fp32": still(folder, data=THREES, precision="fp32"),
        "lucid": small_lucid(folder, precision="fp64"),
    }
    return configs, together(request.param, folder / "ranks", many_things, folder, configs, THREES), folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-6), ("lucid", 1e-12)])
def test_ranks_have_the_gradient_of_one_with_the_whole_batch(several, name, tolerance):
    """With images without objects on one rank, on others, and on all; in one part and in several."""
    configs, ranks, folder = several
    whole = five_steps(replace(configs[name], out=str(folder / f"{name}-whole")), 4)
    summed = five_steps(replace(configs[name], out=str(folder / f"{name}-summed")), 1)
    others = {"accumulated": summed}
    others |= {f"rank {r}, {m} at once": made[name, m] for r, made in enumerate(ranks) for m in (2, 1)}
    for who, made in others.items():
        assert distance(made["gradients"][0], whole["gradients"][0]) <= tolerance, who
        if whole["losses"].dtype == torch.float64:  # AdamW makes much of a small gradient's rounding in float32
            for step in range(1, 5):
                assert distance(made["gradients"][step], whole["gradients"][step]) <= tolerance, (who, step)
            assert distance(made["weights"], whole["weights"]) <= tolerance, who
        torch.testing.assert_close(made["losses"].to(whole["losses"]), whole["losses"], rtol=1e-5, atol=0)
    first, *rest = (rank[name, 2]["weights"] for rank in ranks)
    assert [key for key in first for other in rest if not torch.equal(first[key], other[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 1])
def test_ranks_detect_what_one_does_to_the_last_digit(several, batch):
    configs, ranks, _ = several
    alone = found(configs["fp64"], THREES, batch)
    assert len(alone) == 5  # which neither two nor four ranks can share evenly
    assert [rank["found", batch] for rank in ranks[1:]] == [[]] * (len(ranks) - 1)
    all_of_it = ranks[0]["found", batch]
    assert [
        [torch.equal(*pair) for pair in zip(*each, strict=True)] for each in zip(all_of_it, alone, strict=True)
    ] == [[True] * 3] * 5


@pytest.mark.slow
def test_ranks_agree(several):
    _, ranks, _ = several
    size = len(ranks)
    for rank in ranks:
        assert rank["gathered"] == [number for each in range(size) for number in (each, 7)]
        assert rank["agreed"] == (5.0, signal.SIGTERM)
        assert rank["running_mean"].tolist() == pytest.approx([0.05 * (size - 1)] * 2)  # of 0, 0.1, 0.2, …
        assert f"--batch 3 cannot be shared evenly by {size} ranks: choose" in rank["refused"]
    for rank in ranks[1:]:
        assert torch.equal(rank["draw"], rank["same draw"])  # a step that is repeated draws the same
    assert len({tuple(rank["draw"].tolist()) for rank in ranks}) == size


@pytest.mark.slow
def test_a_run_goes_from_one_rank_to_two_to_four_and_back(tmp_path):
    """Every sample comes exactly once an epoch and the losses are those of one rank; a signal to any rank stops all."""
    how = {"steps": 9, "precision": "fp32", "evaluations": 3}
    whole = train_noting(still(tmp_path / "whole", **how))
    config = still(tmp_path / "parted", **how)
    begin = train_noting(config, stop_in_step=2)
    config = replace(config, resume=True)
    two = together(2, tmp_path / "two", train_noting, config, 5, 1)
    four = together(4, tmp_path / "four", train_noting, config, 7, 3)
    end = train_noting(config)

    assert [each["ended"] for each in (begin, *two, *four, end)] == ["stopped with 143"] * 7 + ["done"]
    steps = [step for ranks in (two, four) for step in zip(*(rank["seen"] for rank in ranks), strict=True)]
    assert [len(begin["seen"]), len(steps), len(end["seen"])] == [2, 3 + 2, 2]
    seen = begin["seen"] + [[image for share in step for image in share] for step in steps] + end["seen"]
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
    assert [start["ranks"] for start in json.loads((parted / "run.json").read_text())] == [1, 2, 4, 1]
    files = {file.name for file in (parted / "checkpoints").glob("*.safetensors")}
    assert files == {"step-00000007.safetensors", "step-00000009.safetensors"}


@pytest.mark.slow
def test_ranks_evaluate_from_the_command_line_what_one_does(tmp_path):
    """Five images in three batches: two ranks share them unevenly, and of four one has none."""
    run = tmp_path / "run"
    train(tiny(run, data=THREES, steps=2, evaluations=1, preflight="off"))

    def files(folder):
        return {file.name: file.read_bytes() for file in folder.glob("*.json")}

    said, wrote = {}, {}
    for size in (1, 2, 3, 4):
        folder = shutil.copytree(run, tmp_path / "copy")
        said[size] = together(size, tmp_path / f"{size}", evaluated, folder, "--batch", 2, "--device", "cpu")
        wrote[size] = files(folder)
        shutil.rmtree(folder)
    assert {"metrics-val.json", "detections-val.json"} <= set(wrote[1])
    assert len(json.loads(wrote[1]["detections-val.json"])) == 5 * tiny(run).model.num_queries
    assert "5 images" in said[1][0]
    for size in (2, 3, 4):
        assert said[size] == said[1] + [""] * (size - 1)
        assert wrote[size] == wrote[1]


@pytest.mark.slow
def test_a_rank_that_falls_silent_is_named(tmp_path):
    waited, _ = together(2, tmp_path, fall_silent, 0.05)
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
            # the timeout, three seconds to ask who is missing, and saving that a busy disk may hold up: less than the
            # half minute more that torchrun gives a process which does not heed it
            assert process.wait(15 + 3 + 25) != 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"torchrun did not end: {log.read_text()}")
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
    assert "rank 0 of 2 waited for the others in vain: no sign of rank 1" in text
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
    with joined(1.0) as ranks:
        assert ranks == ALONE


def test_ranks_that_see_other_folders_do_not_go_on(tmp_path, monkeypatch):
    filled = {"micro_batch": 0}  # what fits is agreed on by those that begin
    train_until_interrupted(tiny(tmp_path / "seen", **filled), monkeypatch)
    config = tiny(tmp_path / "seen", resume=True, **filled)
    folders = tuple(str(tmp_path / name) for name in ("seen", "stale"))
    said = together(2, tmp_path / "ranks", resume_elsewhere, config, folders)
    assert all("(rank 0 after step 4, rank 1 after step 0): --out must be one folder" in each for each in said)


def test_what_ranks_cannot_do_is_said_before_they_meet(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match="--engine reference computes in one process, not in 2"),
        joined(1.0, "reference"),
    ):
        pass
    with pytest.raises(InputError, match=r"--batch 2 cannot be shared evenly by 3 ranks: choose 3 "):
        check_share(2, Ranks(1, 3))
    with pytest.raises(
        InputError, match=r"run: .*\(rank 0 after step 4, rank 1 after step 0\): --out must be one folder"
    ):
        check_same_step([4, 0], Path("run"))


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"train", "eval"}))
def test_what_one_process_does_alone_is_refused_to_several(monkeypatch, capsys, verb):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["lucidetr", verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = f"lucidetr: only train and eval run over several processes: start {verb} without torchrun\n"
    assert capsys.readouterr() == ("", said)


def test_an_operation_that_apples_gpus_lack_is_named(monkeypatch, capsys):
    def lack(words):
        def run(arguments):
            raise NotImplementedError(words)

        monkeypatch.setattr(evaluate, "run", run)

    monkeypatch.setattr(sys, "argv", ["lucidetr", "eval", "run"])
    lack(
        "The operator 'aten::_cdist_forward' is not currently implemented for the MPS device. If you want this op "
        "to be considered for addition please comment on an issue."
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "lucidetr: --device mps: torch has no aten::_cdist_forward for Apple's GPUs; "
        "set PYTORCH_ENABLE_MPS_FALLBACK=1 to compute it on the CPU, or choose --device cpu\n"
    )
    lack("of something else")
    with pytest.raises(NotImplementedError, match="of something else"):
        main()


def test_auto_takes_cuda_then_apples_gpu_then_the_cpu(monkeypatch):
    tried = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: tried.append(device.type) or torch.ones(1))
    for cuda, mps in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        choose_device("auto")
    assert tried == ["cuda", "mps", "cpu"]
