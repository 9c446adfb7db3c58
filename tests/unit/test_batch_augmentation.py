"""Square images changed a whole batch at once: boxes on their pixels, the same bits however they are made, in time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from lucidetr.categories import Categories
from lucidetr.config import AugmentationConfig, ImageConfig
from lucidetr.data.annotations import Annotations
from lucidetr.data.batch_augmentation import BatchAugmentation, coloured, draw, factors, mosaic
from lucidetr.data.batching import CountFrom, build_augmentation, evaluation_batches, training_steps
from lucidetr.data.dataset import Dataset, open_dataset
from lucidetr.data.transforms import Augmentation
from lucidetr.errors import InputError

STILL = AugmentationConfig(flip=0.0, scales=(), crop=0.0)
EVERYTHING = replace(STILL, flip=0.5, flip_vertical=0.5, turn=0.5, zoom=0.3, shift=0.1, colour=0.2, mosaic=0.5)
PLAIN = ImageConfig(resize="square", size=96, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # what is moved in is black
SQUARE = ImageConfig(resize="square", size=96)
FEW = "generated:digits?size=96&train=12&val=5"


def painted(*boxes_xyxy, height=100, width=140, label=4):
    """Return a set of one black picture with white boxes."""
    boxes = np.array(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for left, top, right, bottom in boxes.astype(int):
        image[:, top:bottom, left:right] = 255
    sides = boxes[:, 2:] - boxes[:, :2]
    annotations = Annotations(
        categories=Categories(ids=tuple(range(10)), names=tuple("0123456789")),
        folder=Path("painted"),
        image_ids=np.array([7]),
        file_names=np.array(["painted.png"]),
        sizes=np.array([[height, width]]),
        starts=np.array([0, len(boxes)]),
        annotation_ids=np.arange(len(boxes)),
        boxes_xywh=np.concatenate([boxes[:, :2], sides], 1),
        labels=np.full(len(boxes), label),
        areas=sides.prod(1),
        crowd=np.zeros(len(boxes), dtype=bool),
    )
    return Dataset("painted", annotations, lambda index: image)


def corners(batch, image=0):
    """Return an image's boxes as corners in pixels."""
    centre, size = batch.boxes_cxcywh[image, : int(batch.counts[image])].split(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1) * batch.images.shape[-1]


def assert_boxes_hold_the_white(image, boxes, whole=True):
    """A pixel's centre further than a pixel inside a box is white; further than that outside of all, it is black."""
    centres = torch.arange(image.shape[-1]) + 0.5
    inside, near = torch.zeros(2, *image.shape[1:], dtype=torch.bool)
    for left, top, right, bottom in boxes.tolist():
        for mask, margin in ((inside, -1.0), (near, 1.0)):
            columns = (centres > left - margin) & (centres < right + margin)
            mask |= ((centres > top - margin) & (centres < bottom + margin))[:, None] & columns
    assert (image[0][inside] > 0.5).all()
    if whole:
        assert (image[0][~near] < 0.5).all()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 80), st.integers(0, 60), st.integers(24, 60), st.integers(24, 40))
@pytest.mark.parametrize("size", [96, 97])
@pytest.mark.parametrize(
    "change",
    [
        {"flip": 1.0},
        {"flip_vertical": 1.0},
        {"turn": 1.0},
        {"flip": 0.5, "flip_vertical": 0.5, "turn": 0.5},
        {"zoom": 0.5},
        {"shift": 0.3},
        {"start_size": 0.6},
        {"mosaic": 1.0},
        {"flip": 0.5, "flip_vertical": 0.5, "turn": 0.5, "zoom": 0.3, "shift": 0.2, "mosaic": 0.5, "start_size": 0.7},
    ],
    ids=lambda change: "+".join(change),
)
def test_boxes_follow_the_picture(change, size, seed, left, top, width, height):
    dataset = painted((left, top, left + width, top + height))
    images = replace(PLAIN, size=size)
    batch = BatchAugmentation(replace(STILL, **change), images)(dataset, [0], [seed], 0.0)
    boxes, count = corners(batch), int(batch.counts[0])
    assert batch.labels[0].tolist() == [4] * count
    lost = count < (4 if draw([seed])["mosaic"] < change.get("mosaic", 0) else 1)  # moved out of sight
    assert not lost or "zoom" in change or "shift" in change
    assert_boxes_hold_the_white(batch.images[0], boxes, whole=not lost)


def test_a_turn_goes_both_ways_and_mirrors_mirror():
    dataset = painted((10, 0, 40, 100), width=100)  # a bar at the left
    middles = {}
    for name in ("flip", "flip_vertical", "turn"):
        change = BatchAugmentation(replace(STILL, **{name: 1.0}), PLAIN)
        batch = change(dataset, [0] * 20, list(range(20)), 0.0)
        middles[name] = {tuple(round(each, 2) for each in box) for box in batch.boxes_cxcywh[:, 0, :2].tolist()}
    assert middles == {"flip": {(0.75, 0.5)}, "flip_vertical": {(0.25, 0.5)}, "turn": {(0.5, 0.25), (0.5, 0.75)}}


def test_what_is_hardly_left_is_no_object_any_more():
    """A box is moved out at the left: it counts while 15 % of it is to be seen; a whole one counts however thin."""
    dataset = painted((0, 30, 20, 60), height=96, width=96)
    config = replace(STILL, shift=0.3)
    change = BatchAugmentation(config, PLAIN)
    seeds = list(range(200))
    shift = 96 * config.shift * (2 * draw(seeds)["shift_x"] - 1)
    batch = change(dataset, [0] * len(seeds), seeds, 0.0)
    assert batch.counts.tolist() == [int(20 + x >= 0.15 * 20) for x in shift]
    assert 0 < batch.counts.sum() < 200
    assert BatchAugmentation(STILL, PLAIN)(painted((5, 5, 5.4, 50)), [0], [0], 0.0).counts.tolist() == [1]


def test_unchanged_images_are_those_of_evaluation():
    dataset = open_dataset(FEW, "train")
    expected = next(evaluation_batches(dataset, SQUARE, 5))
    batch = BatchAugmentation(STILL, SQUARE)(dataset, range(5), range(5), 0.0)
    torch.testing.assert_close(batch.images, expected.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.boxes_cxcywh, expected.boxes_cxcywh)
    for name in ("padding", "labels", "counts"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    assert (batch.image_ids, batch.sizes) == (expected.image_ids, expected.sizes)


def test_a_mosaic_is_four_pictures_at_half_the_side():
    dataset = open_dataset(FEW, "train")
    scene, boxes, labels = mosaic(dataset, [3, 1, 4, 1], 96)
    assert torch.equal(scene[:, :48, :48], dataset.square(3, 48))
    assert torch.equal(scene[:, 48:, :48], dataset.square(4, 48))
    targets = [dataset.annotations.target(i) for i in (3, 1, 4, 1)]
    assert labels.tolist() == [label for target in targets for label in target.labels.tolist()]
    np.testing.assert_allclose(boxes[0] * 96, targets[0].boxes_xyxy[0] / 2, rtol=1e-6)
    np.testing.assert_allclose(boxes[-1] * 96, targets[3].boxes_xyxy[-1] / 2 + 48, rtol=1e-6)


def test_mosaics_are_made_in_their_time_as_often_as_asked_with_the_sample_itself_anywhere():
    dataset = open_dataset("generated:digits?size=32&digit=14-16&objects=1-1&train=50&val=1", "train")
    config = replace(STILL, mosaic=0.5, mosaic_from=0.2, mosaic_until=0.6)
    change = BatchAugmentation(config, replace(SQUARE, size=32))
    indices = list(range(50)) * 4

    def share(progress):
        return (change(dataset, indices, range(200), progress).counts > 1).float().mean().item()

    assert [share(progress) for progress in (0.0, 0.1, 0.6, 1.0)] == [0.0] * 4
    assert 0.4 < share(0.2) == share(0.59) < 0.6
    draws = draw(range(200))
    _, objects = BatchAugmentation(replace(config, mosaic=1.0), change.images).scenes(dataset, indices, draws, 0.5)
    own = [dataset.annotations.labels[index] for index in indices]
    place = (draws["place"] * 4).astype(int)
    assert objects.labels.reshape(200, 4)[np.arange(200), place].tolist() == own
    assert set(place) == {0, 1, 2, 3}


@pytest.mark.parametrize(("full_size_at", "sides"), [(0.5, [64, 96, 128, 128, 128]), (0.0, [128] * 5)])
def test_images_grow_with_the_run(full_size_at, sides):
    dataset = open_dataset(FEW, "train")
    config = replace(EVERYTHING, start_size=0.5, full_size_at=full_size_at, until=0.8)
    images = replace(SQUARE, size=128)
    how = {"seed": 0, "batch": 2, "micro_batch": 2, "numbers": CountFrom(progress=lambda step: step / 5)}
    for workers in (0, 2):
        steps = training_steps(dataset, images, build_augmentation(config, images), **how, workers=workers)
        assert [next(steps)[0].images.shape[-1] for _ in range(5)] == sides
        steps.close()


def test_colour_is_torchvisions_where_nothing_is_cut():
    """Three adjustments of pixels one after the other, against one sum."""
    spread, seeds = 0.3, range(12)
    rows = torch.arange(64).float()
    smooth = torch.stack(
        [80 + rows[:, None] + 0 * rows, 90 + 0.5 * rows + 0 * rows[:, None], 150 - rows + 0 * rows[:, None]]
    )
    pictures = smooth.to(torch.uint8).expand(12, 3, 64, 64)
    draws = draw(seeds)
    found = coloured(pictures, draws, spread) / 255
    bright, contrast, vivid = (factors(draws[name], spread) for name in ("brightness", "contrast", "saturation"))
    assert bright.min() < 0.8 < 1.2 < bright.max()
    for i, picture in enumerate(pictures):
        expected = tv.adjust_brightness(picture / 255, float(bright[i]))
        expected = tv.adjust_saturation(tv.adjust_contrast(expected, float(contrast[i])), float(vivid[i]))
        torch.testing.assert_close(found[i], expected, rtol=0, atol=0.01)  # its weights of grey have three digits
    extreme = torch.tensor([0, 255], dtype=torch.uint8).expand(12, 3, 4, 2)
    assert coloured(extreme, draws, spread).aminmax() == (0, 255)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_the_same_bit_for_bit_whoever_makes_it_and_with_whom(workers):
    dataset = open_dataset(FEW, "train")
    config = replace(EVERYTHING, start_size=0.7, full_size_at=0.9)
    change = build_augmentation(config, SQUARE)
    how = {"seed": 3, "batch": 7}
    begun, later = CountFrom(0, lambda step: step / 6), CountFrom(1, lambda step: step / 6)
    threads = torch.get_num_threads()
    whole = training_steps(dataset, SQUARE, change, **how, micro_batch=7, numbers=begun)
    next(whole)
    torch.set_num_threads(2 if threads == 1 else 1)
    cut = training_steps(dataset.keep(1.0), SQUARE, change, **how, micro_batch=3, numbers=later, workers=workers)
    for _ in range(5):
        (a,), parts = next(whole), next(cut)
        assert [len(part) for part in parts] == [3, 3, 1]
        assert torch.equal(a.images, torch.cat([part.images for part in parts]))
        assert torch.equal(a.counts, torch.cat([part.counts for part in parts]))
        assert a.image_ids == sum((part.image_ids for part in parts), ())
        most = a.boxes_cxcywh.shape[1]
        padded = [torch.nn.functional.pad(p.boxes_cxcywh, (0, 0, 0, most - p.boxes_cxcywh.shape[1])) for p in parts]
        assert torch.equal(a.boxes_cxcywh, torch.cat(padded))
    torch.set_num_threads(threads)
    cut.close()


def test_seeds_decide():
    dataset, change = open_dataset(FEW, "train"), BatchAugmentation(EVERYTHING, SQUARE)
    first, again, other = (change(dataset, [0, 1, 2], seeds, 0.0) for seeds in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.images[:2], other.images[:2])
    assert not torch.equal(first.images[2], other.images[2])


@pytest.mark.parametrize("images", [SQUARE, ImageConfig(size=96, max_size=128)], ids=["square", "shortest"])
def test_towards_the_end_samples_are_those_of_evaluation(images):
    dataset = open_dataset(FEW, "train")
    config = replace(EVERYTHING, until=0.5)
    config = config if images.resize == "square" else replace(config, mosaic=0.0)
    how = {"seed": 0, "batch": 12, "micro_batch": 12}
    change = build_augmentation(config, images)
    (before,) = next(training_steps(dataset, images, change, **how, numbers=CountFrom(0, lambda step: 0.49)))
    (after,) = next(training_steps(dataset, images, change, **how, numbers=CountFrom(0, lambda step: 0.5)))
    (expected,) = evaluation_batches(dataset, images, 12)
    order = [i - 1 for i in after.image_ids]
    assert before.image_ids == after.image_ids
    assert torch.equal(after.images, expected.images[order])
    assert torch.equal(after.boxes_cxcywh, expected.boxes_cxcywh[order])
    assert not torch.equal(before.images, after.images)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_images_without_objects_survive(chance):
    batch = BatchAugmentation(replace(EVERYTHING, mosaic=chance), PLAIN)(painted(), [0, 0], [1, 2], 0.0)
    assert batch.boxes_cxcywh.shape == (2, 0, 4)
    assert batch.labels.shape == (2, 0)
    assert batch.counts.tolist() == [0, 0]
    assert (batch.image_ids, batch.sizes) == ((7, 7), ((100, 140), (100, 140)))
    assert not batch.images.any()


def test_squares_go_in_batches_and_the_rest_one_by_one_or_not_at_all():
    assert isinstance(build_augmentation(EVERYTHING, SQUARE), BatchAugmentation)
    shortest = ImageConfig(size=96, max_size=128)
    assert isinstance(build_augmentation(replace(EVERYTHING, mosaic=0.0), shortest), Augmentation)
    assert isinstance(build_augmentation(AugmentationConfig(), SQUARE), Augmentation)  # crops, scales
    with pytest.raises(InputError, match=r"augmentation\.mosaic = 0\.5 needs images of one square side: choose"):
        build_augmentation(EVERYTHING, shortest)
    with pytest.raises(InputError, match=r"augmentation\.start_size = 0\.5 needs images of one square side: choose"):
        build_augmentation(AugmentationConfig(start_size=0.5), SQUARE)


def test_squares_stay_in_memory_only_when_all_fit_beside_each_other():
    dataset = open_dataset(FEW, "train")
    reads = []
    counted = Dataset(dataset.name, dataset.annotations, lambda i: reads.append(i) or dataset.image(i))
    whole = 12 * 3 * 48**2 / 1e9
    for gigabytes, expected in ((whole * 1.25, 2), (whole * 1.24, 3), (whole * 0.99, 3)):
        reads.clear()
        kept = counted.keep(gigabytes)
        for side in (48, 24, 48, 24):
            assert kept.square(4, side).shape == (3, side, side)
        assert len(reads) == expected
