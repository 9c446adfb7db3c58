"""Less memory, the same numbers: features computed twice, and as many images at once as fit."""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from lucidetr.config import TrainConfig
from lucidetr.data.dataset import open_dataset
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training import memory
from lucidetr.training.loop import train
from lucidetr.training.memory import add_gradients, fitting_micro_batch, kept_for_backward, largest_batch
from lucidetr.training.precision import autocast
from lucidetr.training.recompute import recompute, standing

FP32 = autocast("fp32", torch.device("cpu"))
DATA = "generated:digits?train=8&val=2&size=64"


def setting(name: str = "lucid-xs", **changes) -> TrainConfig:
    config = recipe(name)
    return replace(config, images=replace(config.images, size=64, max_size=64), data=DATA, **changes)


@pytest.mark.parametrize("name", ["lucid-xs", "detr-xs"])
def test_computing_twice_changes_no_number_and_keeps_less(name):
    config = setting(name)
    annotations = open_dataset(DATA, "train").annotations
    torch.manual_seed(0)
    usual = DETR(replace(config.model, dropout=0.1)).train()
    sparing = copy.deepcopy(usual)
    recompute(sparing)
    batch = largest_batch(config, annotations, 2)
    counts = batch.counts.tolist()
    for model in (usual, sparing):
        torch.manual_seed(7)  # of dropout
        add_gradients(config, model, batch, FP32, counts)
    for (key, one), two in zip(usual.named_parameters(), sparing.parameters(), strict=True):
        if one.grad is None:
            assert two.grad is None, key
        else:
            assert torch.equal(one.grad, two.grad), f"the gradient of {key} differs"
    for (key, one), two in zip(usual.named_buffers(), sparing.buffers(), strict=True):
        assert torch.equal(one, two), f"{key}: a batch norm has counted one batch twice"
    needed = {name: kept_for_backward(config, m, batch, FP32) for name, m in (("usual", usual), ("sparing", sparing))}
    assert needed["sparing"] < needed["usual"] / 2, needed


def test_a_copy_of_a_sparing_model_computes_with_its_own_weights():
    model = DETR(setting().model).eval()
    recompute(model)
    other = copy.deepcopy(model)
    images, padding = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        before = other(images, padding).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(images, padding).logits, before)


def test_no_batch_norm_remembers_what_it_sees_while_it_stands():
    for kind in (nn.BatchNorm2d, nn.SyncBatchNorm):
        norm = kind(3).train()
        with standing(norm):
            # in one process a SyncBatchNorm computes as the other does, but asks for a GPU first
            nn.BatchNorm2d.forward(norm, torch.randn(2, 3, 4, 4) + 5)
        assert not norm.running_mean.any(), kind
        assert (norm.num_batches_tracked, norm.momentum) == (0, 0.1), kind


def test_what_fits_follows_from_the_memory_that_is_free(monkeypatch):
    config = setting(batch=64, micro_batch=0)
    annotations = open_dataset(DATA, "train").annotations
    model = DETR(config.model).train()
    before = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    one = kept_for_backward(config, copy.deepcopy(model), largest_batch(config, annotations, 1), FP32)
    weights = 4 * sum(4 * p.numel() for p in model.parameters())
    torch.set_rng_state(state)

    def fits(images: float) -> int:
        free = int((weights + images * memory.BACKWARD * one) / memory.USABLE)
        monkeypatch.setattr(memory, "free_memory", lambda device: free)
        return fitting_micro_batch(config, model, annotations, FP32, most=64)

    assert fits(1000) == 64
    assert fits(40.5) == 32, "two parts of equal number rather than 40 and 24"
    config = replace(config, recompute=True)
    assert fits(40.5) == 16, "a stage that is computed again needs its room besides"
    assert fits(0.5) == 1, "less than one image is tried as one; preflight says that it does not fit"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, a) for b, a in zip(before, model.buffers(), strict=True))

    def full(*known):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(memory, "loss_of", full)
    assert fitting_micro_batch(config, model, annotations, FP32, most=64) == 1, "preflight will name what does not fit"


def test_two_images_keep_twice_what_one_does():
    config = setting()
    annotations = open_dataset(DATA, "train").annotations
    one, two = (
        kept_for_backward(config, DETR(config.model), largest_batch(config, annotations, number), FP32)
        for number in (1, 2)
    )
    assert two == pytest.approx(2 * one, rel=0.1)


def test_hints_take_no_share_of_what_the_loss_is_divided_by(monkeypatch):
    config = setting()
    config = replace(config, model=replace(config.model, denoising=0.4))
    batch = largest_batch(config, open_dataset(DATA, "train").annotations, 1)
    normalisers, seen = memory.normalisers, []

    def noting(*known):
        seen.append(normalisers(*known))
        return seen[-1]

    monkeypatch.setattr(memory, "normalisers", noting)
    memory.loss_of(config, DETR(config.model), batch, FP32, batch.counts.tolist())
    assert [norm.objects for norm in seen] == [int(batch.counts.sum())]


def test_free_memory_is_no_more_than_the_machine_has():
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < memory.free_memory(torch.device("cpu")) <= installed


def test_a_container_leaves_what_it_does_not_use_and_pages_it_would_give_back(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("9000000\n")
    (tmp_path / "memory.current").write_text("8000000\n")
    (tmp_path / "memory.stat").write_text("anon 3000000\ninactive_file 500000\nactive_file 70000\n")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 9_000_000 - 8_000_000 + 500_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.free_memory(torch.device("cpu")) == 500_000
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    (tmp_path / "memory.max").write_text("max\n")  # no limit: the machine's own
    assert memory.free_memory(torch.device("cpu")) > 9_000_000


def test_a_run_fills_the_memory_and_goes_on_with_what_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr("lucidetr.training.prepare.fitting_micro_batch", lambda *known: 2)
    config = setting(batch=4, micro_batch=0, recompute=True, steps=2, evaluations=1, out=str(tmp_path / "run"))
    folder = train(config)
    assert json.loads((folder / "run.json").read_text())[-1]["trained_as"]["micro_batch"] == 2
    assert json.loads((folder / "config.json").read_text())["micro_batch"] == 0, "config.json is what was asked for"
    monkeypatch.setattr("lucidetr.training.prepare.fitting_micro_batch", lambda *known: 4)
    assert train(replace(config, resume=True)) == folder
    assert json.loads((folder / "run.json").read_text())[-1]["trained_as"]["micro_batch"] == 2
