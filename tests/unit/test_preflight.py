"""What is seen before the first step, and that looking leaves no trace."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lucidetr.config import AugmentationConfig, BackboneConfig, ImageConfig
from lucidetr.data import sheet
from lucidetr.data.dataset import open_dataset
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES, from_scratch
from lucidetr.training import loop, memory, preflight
from lucidetr.training.checkpoint import load_tensors
from lucidetr.training.run_log import read_metrics
from run_tools import TINY, tiny


@pytest.fixture(scope="module")
def scenes():
    return open_dataset(TINY, "train").keep(1.0)


def config_and_model(**changes):
    config = tiny("nowhere", **changes)
    config = replace(config, model=replace(config.model, num_classes=10))
    torch.manual_seed(0)
    return config, DETR(config.model)


def fly(tmp_path, config, model, dataset):
    said = []
    preflight.preflight(config, model, dataset, tmp_path / "first-batch.png", nullcontext, said.append)
    return said


def test_a_sound_run_is_told_what_to_expect_and_left_untouched(tmp_path, scenes):
    config, model = config_and_model()
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, order = torch.get_rng_state(), np.random.get_state()[1].copy()
    said = fly(tmp_path, config, model, scenes)
    assert [line for line in said if line.startswith("warning")] == []
    assert said[0].startswith("10 images, seen 24 times in all, from random weights: the paper's design saw 118,287")
    assert "trying the largest batch: 2 images of 64 × 64 pixels, 3 objects in each" in said
    assert "it fits: peak memory" in said[-1]
    assert torch.equal(torch.get_rng_state(), random)
    assert (np.random.get_state()[1] == order).all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_the_first_batch_is_drawn_as_the_model_sees_it(scenes):
    config, _ = config_and_model()
    parts = preflight.first_batch(config, scenes)
    steps = loop.training_steps(
        scenes,
        config.images,
        loop.build_augmentation(config.augmentation, config.images),
        seed=config.seed,
        batch=config.batch,
        micro_batch=config.micro_batch,
    )
    for mine, theirs in zip(parts, next(steps), strict=True):
        assert mine.image_ids == theirs.image_ids
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.boxes_cxcywh, theirs.boxes_cxcywh)
    cell = np.asarray(next(sheet.draw_batch(parts[0], config.images, tuple("0123456789"))))
    pixels = sheet.denormalise(parts[0].images, config.images)[0].permute(1, 2, 0).numpy().repeat(5, 0).repeat(5, 1)
    assert cell.shape == pixels.shape == (320, 320, 3)  # each pixel of 64 × 64 grown to 5 × 5
    drawn = (cell != pixels).any(-1)
    assert 0.005 < drawn.mean() < 0.9  # boxes and captions; the rest is the picture itself
    whole = preflight.draw_batches(parts, config.images, tuple("0123456789"))
    assert whole.size == (2 * (320 + 8) + 8, 2 * (320 + 8) + 8)


def test_a_model_that_does_not_see_the_picture_is_noticed(tmp_path, scenes):
    config, model = config_and_model()
    model.projection.register_forward_hook(lambda module, inputs, output: output * 0)
    warnings = [line for line in fly(tmp_path, config, model, scenes) if line.startswith("warning")]
    assert len(warnings) == 2
    assert "says the same about image" in warnings[0]
    assert "no gradient reaches backbone.stem" in warnings[1]


def test_a_part_that_nothing_reaches_is_named(tmp_path, scenes):
    config, model = config_and_model()
    encoder = model.encoder.layers[0]
    encoder.register_forward_hook(lambda module, inputs, output: output.detach())
    said = " ".join(line for line in fly(tmp_path, config, model, scenes) if line.startswith("warning"))
    assert "no gradient reaches" in said
    assert "backbone" in said
    assert "decoder" not in said


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda index: open_dataset(TINY, "train").image(0), "have the same pixels"),
        (lambda index: torch.full((3, 64, 64), 7 * (index % 2) + 120, dtype=torch.uint8), "hardly differ"),
    ],
)
def test_pictures_that_cannot_teach_are_noticed(tmp_path, scenes, read, expected):
    config, model = config_and_model(overfit=8)
    said = fly(tmp_path, config, model, replace(scenes, read=read, kept={}))
    assert any(line.startswith("warning") and expected in line for line in said)


def test_normalisation_that_does_not_fit_is_noticed(scenes):
    config, _ = config_and_model()
    odd = replace(config, images=replace(config.images, std=(0.01, 0.01, 0.01)))
    part = preflight.first_batch(odd, scenes)[0]
    assert any("--images.mean" in note for note in preflight.odd_pixels(scenes, part))


QUIET = {"residual_start": "zero"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"decoder_block": "post_norm"},
            "post_norm: .* norms of zeros.*--model.decoder-block pre_norm or",
        ),
        ({"decoder_block": "shared_norm"}, "decoder_block = shared_norm: .* norms of zeros"),
        ({"decoder_block": "no_residual"}, "decoder_block = no_residual: .* nothing would pass"),
        ({"decoder_block": "no_residual", "queries": "content"}, "decoder_block = no_residual: .* nothing would pass"),
        (
            {"decoder_block": "pre_norm", "encoder_block": "no_residual"},
            "encoder_block = no_residual: .*--model.encoder-block",
        ),
    ],
)
def test_a_start_that_cannot_learn_is_refused_with_the_fix(tmp_path, scenes, changes, expected):
    config, _ = config_and_model()
    config = replace(config, model=replace(config.model, **QUIET, **changes))
    with pytest.raises(InputError, match=expected):
        fly(tmp_path, config, DETR(config.model), scenes)


@pytest.mark.parametrize("changes", [{"decoder_block": "pre_norm"}, {"queries": "content"}])
def test_other_quiet_starts_are_sound(changes):
    config = replace(config_and_model()[0].model, **QUIET, **changes)
    preflight.check_start(config, DETR(config))


def test_trained_weights_have_no_quiet_start():
    config, trained = config_and_model()
    preflight.check_start(replace(config.model, **QUIET), trained)


def test_more_objects_than_queries_are_refused_with_image_and_fix(tmp_path):
    config = tiny(tmp_path / "run", steps=1)
    with pytest.raises(InputError, match=r"image \d+ \(.*\) has 3 objects.*--model.num-queries to 3 or more"):
        loop.train(replace(config, model=replace(config.model, num_queries=2)))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_that_does_not_fit_is_an_input_error(tmp_path, scenes, monkeypatch, error):
    def full(*arguments):
        raise error

    config, model = config_and_model()
    monkeypatch.setattr(preflight, "add_gradients", full)
    with pytest.raises(
        InputError, match=r"2 images of 64 × 64 pixels with up to 3 objects .*--micro-batch \(now 2.*images"
    ):
        fly(tmp_path, config, model, scenes)


def test_a_batch_norm_with_a_single_value_is_an_input_error(tmp_path):
    config = tiny(tmp_path / "run", steps=1, batch=1, micro_batch=1)
    images = replace(config.images, resize="square", size=16)
    model = replace(config.model, backbone=BackboneConfig(name="convnet", width=8, norm="batch"))
    with pytest.raises(InputError, match=r"1 image of 16 × 16 pixels .* single value: raise --batch .* --images.size"):
        loop.train(replace(config, images=images, model=model))


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, scenes, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    config, model = config_and_model()
    monkeypatch.setattr(preflight, "add_gradients", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fly(tmp_path, config, model, scenes)


SIZES = np.array([[480, 640], [640, 480], [100, 400]])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (640, 853)),  # the widest is that of 100 × 400, 213 high; the highest that of 640 × 480
        ({"micro_batch": 1}, (480, 640)),
        ({"images": ImageConfig(resize="square", size=320)}, (320, 320)),
        ({"augmentation": AugmentationConfig(crop=0.0, scales=(320, 600))}, (800, 853)),
        ({"augmentation": AugmentationConfig(crop=0.0, scales=(320, 600)), "overfit": 2}, (640, 853)),
        ({"augmentation": AugmentationConfig(crop=0.0, scales=(), turn=0.5)}, (853, 853)),
    ],
)
def test_the_largest_batch_is_as_high_as_the_highest_and_as_wide_as_the_widest(changes, expected):
    plain = AugmentationConfig(crop=0.0, scales=())
    base = {"images": ImageConfig(size=480, max_size=853), "augmentation": plain, "micro_batch": 2}
    assert memory.largest_size(replace(tiny("nowhere"), **(base | changes)), SIZES) == expected


@pytest.mark.parametrize("name", [name for name in RECIPES if "222m" not in name])
def test_every_recipe_gives_a_gradient_to_all_that_learns(name):
    config, _ = from_scratch(RECIPES[name])
    narrow = config.model.backbone
    narrow = narrow if narrow.name.startswith("efficientnet") else replace(narrow, width=8)
    small = {"d_model": 32, "num_heads": 2, "head_dim": 16, "feed_forward": 32, "num_queries": 10, "num_classes": 3}
    config = replace(config, model=replace(config.model, backbone=narrow, **small), micro_batch=2, freeze=())
    size = {"size": 64, "max_size": 64}
    config = replace(config, images=replace(config.images, **size), augmentation=AugmentationConfig(scales=(), crop=0))
    torch.manual_seed(0)
    annotations = open_dataset(TINY, "train").annotations
    batch = memory.largest_batch(config, annotations, config.micro_batch)
    assert list(preflight.odd_gradients(config, DETR(config.model).train(), batch, nullcontext)) == []


def test_a_few_images_by_heart_says_the_ap_or_what_stopped_it(scenes, monkeypatch):
    config, model = config_and_model()
    monkeypatch.setattr(preflight, "HEART_STEPS", 4)
    monkeypatch.setattr(preflight, "HEART_EVERY", 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = preflight.learn_by_heart(config, model, scenes, nullcontext)
    assert said.startswith("4 images by heart: AP 0.0")
    assert "4 steps are over" in said
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(preflight, "HEART_AP", 0.0)
    assert "after 2 steps; data, model and loss agree" in preflight.learn_by_heart(config, model, scenes, nullcontext)


def test_a_run_is_the_same_with_preflight_and_without(tmp_path, capsys):
    def with_batch_norm(name, **changes):
        config = tiny(tmp_path / name, evaluations=1, steps=3, **changes)
        return replace(config, model=replace(config.model, backbone=replace(config.model.backbone, norm="batch")))

    off = loop.train(with_batch_norm("off", preflight="off"))
    assert "largest batch" not in capsys.readouterr().out
    quick = loop.train(with_batch_norm("quick"))
    assert "largest batch" in capsys.readouterr().out
    with Image.open(quick / "first-batch.png") as sheet:
        assert sheet.size == (664, 664)  # two by two, five times as large, between margins of 8
    assert not (off / "first-batch.png").exists()
    a, b = (load_tensors(max((run / "checkpoints").iterdir()))[0] for run in (off, quick))
    assert any("running_mean" in name for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    times = ("seconds", "images_per_second")
    logs = [[{k: v for k, v in line.items() if k not in times} for line in read_metrics(run)] for run in (off, quick)]
    assert logs[0] == logs[1]
