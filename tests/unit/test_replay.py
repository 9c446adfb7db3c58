"""Which runs a GPU can replay, and what recording leaves behind; tests/parity/test_gpu.py compares the steps."""

from dataclasses import replace

import pytest
import torch

from lucidetr.data.dataset import open_dataset
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.structures import Hints
from lucidetr.training import loop
from lucidetr.training.distributed import ALONE, Ranks
from lucidetr.training.replay import advice, record, repeats
from run_tools import tiny

DATA = "generated:digits?size=64&digit=14-24&objects=1-3&train=6&val=2"
CPU, GPU = torch.device("cpu"), torch.device("cuda")  # none is needed here


def whole():
    """Return lucid-xs on pictures of 64 pixels, asked to be replayed."""
    config = recipe("lucid-xs")
    return replace(config, images=replace(config.images, size=64), batch=2, micro_batch=2, replay=True)


def test_a_run_is_replayed_where_all_its_steps_compute_the_same():
    config = whole()
    assert repeats(config, GPU, ALONE)
    assert not repeats(config, CPU, ALONE)
    assert not repeats(config, GPU, Ranks(0, 2))
    change, model = config.augmentation, config.model
    others = {
        "off": replace(config, replay=False),
        "parts": replace(config, micro_batch=1),
        "compiled": replace(config, compile=True),
        "recomputed": replace(config, recompute=True),
        "reference": replace(config, engine="reference"),
        "hints": replace(config, model=replace(model, denoising=0.4)),
        "growing": replace(config, augmentation=replace(change, start_size=0.67)),
        "scales": replace(config, augmentation=replace(change, scales=(48, 64))),
        "unequal": replace(config, images=replace(config.images, resize="shortest")),
    }
    assert [name for name, other in others.items() if repeats(other, GPU, ALONE)] == []


def test_a_run_hears_that_it_could_be_replayed():
    config = replace(whole(), replay=False)
    assert advice(config, GPU, ALONE).endswith("--replay")
    assert advice(replace(config, micro_batch=1), GPU, ALONE).endswith("--replay --micro-batch 2")
    assert advice(whole(), GPU, ALONE) == ""
    assert advice(config, CPU, ALONE) == ""
    assert advice(replace(config, compile=True), GPU, ALONE) == ""


def test_recording_leaves_the_model_and_the_random_state_as_they_were(monkeypatch):
    def recorded(flat, given, allow_unused_input):
        for _ in range(3):  # as torch does to warm up
            torch.rand(1)
            flat(*given)
        return flat

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    config, annotations = whole(), open_dataset(DATA, "train").annotations
    torch.manual_seed(0)
    model = DETR(config.model).train()
    before, drawn = {name: buffer.clone() for name, buffer in model.named_buffers()}, torch.get_rng_state()
    recording = record(model, config, annotations, "fp32")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])] == []
    images, padding = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool)
    found, expected = recording(images, padding), model(images, padding)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.boxes_cxcywh, expected.boxes_cxcywh)
    with pytest.raises(AssertionError):
        recording(
            images, padding, Hints(boxes_cxcywh=torch.rand(2, 25, 4), labels=torch.zeros(2, 25, dtype=torch.long))
        )


def test_where_the_memory_holds_no_recording_there_is_none(monkeypatch):
    def full(*known, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(*known, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    config, annotations = whole(), open_dataset(DATA, "train").annotations
    model = DETR(config.model).train()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", full)
    assert record(model, config, annotations, "fp32") is None
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", broken)
    with pytest.raises(RuntimeError, match="not permitted"):
        record(model, config, annotations, "fp32")


def test_a_run_that_cannot_be_replayed_says_so(tmp_path, capsys):
    loop.train(tiny(tmp_path / "run", steps=1, evaluations=1, replay=True, device="cpu"))
    assert "steps are not replayed" in capsys.readouterr().out
