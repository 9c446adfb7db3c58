"""From files to batches: decoding, resizing, augmentation, order, generated scenes."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lucidetr.cli.data import run as data_verb
from lucidetr.config import AugmentationConfig, ImageConfig, TrainConfig
from lucidetr.data.batching import (
    CountFrom,
    Cut,
    Steps,
    allow_open_files,
    build_augmentation,
    evaluation_batches,
    step_samples,
    training_steps,
)
from lucidetr.data.dataset import Dataset, open_dataset, open_training_data
from lucidetr.data.decoding import as_image, read_image
from lucidetr.data.digits import DigitsConfig, parse
from lucidetr.data.export import open_splits, write_splits
from lucidetr.data.preprocessing import make_batch, prepare, resized_size
from lucidetr.data.sheet import draw_augmented
from lucidetr.data.transforms import Augmentation
from lucidetr.errors import InputError
from lucidetr.recipes import recipe
from lucidetr.structures import Target

GOLDEN_BOXES = [[[77.0, 104.0, 9.0, 15.0], [60.0, 54.0, 20.0, 31.0], [53.0, 2.0, 33.0, 45.0]], [1, 7, 8]]
GOLDEN_MEAN = 63.137
FEW = "generated:digits?train=12&val=5"


def picture(height=24, width=36):
    """Return a picture in which every pixel is different."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 7, columns * 7, (rows + columns) * 3], -1).astype(np.uint8)


@pytest.mark.filterwarnings("ignore")
def test_a_photo_with_a_damaged_note_is_set_upright_too(tmp_path):
    """As some telephones write them: Pillow then fails to write the note anew, for which nobody asked."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0110], exif[0x011A] = 6, "model", 72.0
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif)
    upright, content = read_image(tmp_path / "a.jpg"), (tmp_path / "a.jpg").read_bytes()
    start, failures = content.index(b"Exif\0\0") + 6, 0
    for place in range(start + 8, start + 60):  # types, counts and places of the tags
        for value in (0x00, 0x0C, 0xFF):
            changed = content[:place] + bytes([value]) + content[place + 1 :]
            (tmp_path / "b.jpg").write_bytes(changed)
            with Image.open(tmp_path / "b.jpg") as image:
                image.load()
                try:
                    kept = image.getexif().get(0x0112) == 6
                    ImageOps.exif_transpose(image)
                    continue
                except Exception:  # noqa: BLE001  which ones is Pillow's to say
                    failures += kept
            if kept:
                assert torch.equal(read_image(tmp_path / "b.jpg"), upright)
    assert failures, "Pillow transposes them all now"


def test_a_picture_without_pixels_is_refused():
    for empty in (np.zeros((0, 4, 3), np.uint8), torch.zeros((3, 4, 0), dtype=torch.uint8)):
        with pytest.raises(InputError, match="has no pixels"):
            as_image(empty)


def test_what_is_generated_is_not_looked_for_in_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val").mkdir()
    Image.fromarray(picture()).save(tmp_path / "val" / "000001.png")
    dataset = open_dataset(FEW, "val")
    assert dataset.file(0) is None
    assert dataset.subset(np.array([0]), "one").file(0) is None


def test_what_cannot_be_decoded_names_the_file(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(InputError, match=r"a\.jpg: no such image file"):
        read_image(path)
    path.write_text("no picture")
    with pytest.raises(InputError, match=r"a\.jpg: not an image"):
        read_image(path)
    Image.fromarray(picture(200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match=r"a\.jpg: damaged or truncated image of 900 bytes"):
        read_image(path)
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(InputError, match=r"folder\.jpg: cannot be read \(Is a directory\)"):
        read_image(tmp_path / "folder.jpg")


def test_pictures_in_memory_are_the_same_picture(tmp_path):
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png")
    for form in (str(tmp_path / "a.png"), Image.fromarray(array), array, expected):
        assert torch.equal(as_image(form), expected)
    with pytest.raises(InputError, match="an array of float64"):
        as_image(array / 255)
    with pytest.raises(InputError, match="a picture of type int"):
        as_image(3)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(32, 900))
def test_resized_sides_stay_within_their_limits(height, width, short):
    config = ImageConfig(size=short, max_size=1333)
    new_height, new_width = resized_size(height, width, config)
    assert min(new_height, new_width) <= short
    assert max(new_height, new_width) <= 1333
    assert (new_height <= new_width) == (height <= width)
    if max(height, width) / min(height, width) * short <= 1333:
        assert min(new_height, new_width) == short
    assert resized_size(height, width, replace(config, resize="square")) == (short, short)


def test_a_batch_is_normalised_and_padded_with_zeros():
    config = ImageConfig(size=8, max_size=100)
    pictures = [torch.full((3, 8, 8), 255, dtype=torch.uint8), torch.zeros((3, 16, 8), dtype=torch.uint8)]
    batch = make_batch([prepare(image, config, i) for i, image in enumerate(pictures)], config)
    assert batch.images.shape == (2, 3, 16, 8)
    assert not batch.images[0, :, 8:].any()
    assert batch.padding[0, 8:].all()
    assert not batch.padding[0, :8].any()
    torch.testing.assert_close(batch.images[0, :, 0, 0], (1 - torch.tensor(config.mean)) / torch.tensor(config.std))
    torch.testing.assert_close(batch.images[1, :, 15, 7], -torch.tensor(config.mean) / torch.tensor(config.std))
    assert batch.sizes == ((8, 8), (16, 8))


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, 40), st.integers(0, 60), st.integers(24, 60), st.integers(24, 60))
@pytest.mark.parametrize("kind", ["paper", "light", "turned"])
def test_boxes_follow_the_picture(kind, seed, top, left, height, width):
    """Paint a box white on black: after any augmentation the white pixels must be where the box is."""
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    bottom, right = min(top + height, 120), min(left + width, 160)
    image[:, top:bottom, left:right] = 255
    if kind == "paper":
        config = AugmentationConfig(scales=(96, 128), crop_scales=(100, 140), crop_sides=(60, 90))
    elif kind == "light":
        config = AugmentationConfig(scales=(), crop=0.0, zoom=0.3, shift=0.2)
    else:
        config = AugmentationConfig(scales=(), crop=0.0, flip_vertical=0.5, turn=0.7)
    images = ImageConfig(size=128, max_size=213, mean=(0.0, 0.0, 0.0))  # what is moved in is black too
    target = Target(torch.tensor([[left, top, right, bottom]]).float(), torch.tensor([4]))
    changed, moved = Augmentation(config, images)(image, target, seed)
    white = (changed[0] > 127).nonzero()
    sides = moved.boxes_xyxy[:, 2:] - moved.boxes_xyxy[:, :2]
    assert (sides > 0).all()
    if not (sides >= 1).all() or len(sides) == 0:
        assert len(white) <= 2 * max(changed.shape)  # at most a line that rounding left
        return
    assert moved.labels.tolist() == [4]
    (y0, x0), (y1, x1) = white.amin(0).tolist(), (white.amax(0) + 1).tolist()
    torch.testing.assert_close(moved.boxes_xyxy[0], torch.tensor([x0, y0, x1, y1]).float(), rtol=0, atol=1.6)


def test_a_thin_object_stays_one_where_nothing_is_cut_off():
    config, target = AugmentationConfig(crop=0.0), Target(torch.tensor([[600.0, 300, 601.5, 500]]), torch.tensor([4]))
    changed, moved = Augmentation(config, ImageConfig())(torch.zeros(3, 960, 1280, dtype=torch.uint8), target, 0)
    width, height = (moved.boxes_xyxy[0, 2:] - moved.boxes_xyxy[0, :2]).tolist()
    assert width == pytest.approx(1.5 * changed.shape[2] / 1280, abs=1e-3)
    assert height == pytest.approx(200 * changed.shape[1] / 960, abs=1e-3)
    aside = AugmentationConfig(crop=1.0, crop_scales=(960,), crop_sides=(64, 64))
    kept = [
        len(Augmentation(aside, ImageConfig())(torch.zeros(3, 960, 1280, dtype=torch.uint8), target, seed)[1].labels)
        for seed in range(12)
    ]
    assert 0 in kept


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_a_picture_without_objects_is_turned_like_others(crop):
    config = AugmentationConfig(turn=1.0, flip=0.0, crop=crop, scales=(), zoom=0.2, shift=0.1)
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    images = ImageConfig(size=64, max_size=128)
    for seed in range(4):
        changed, moved = Augmentation(config, images)(torch.zeros(3, 50, 70, dtype=torch.uint8), nothing, seed)
        assert changed.shape[1] > changed.shape[2] or crop
        assert len(moved.labels) == len(moved.boxes_xyxy) == 0


def test_the_same_seed_gives_the_same_change_and_leaves_the_global_state_alone(monkeypatch):
    config = recipe("detr-xs")
    change = Augmentation(config.augmentation, config.images)
    image = torch.from_numpy(picture(128, 128)).permute(2, 0, 1)
    target = Target(torch.tensor([[10.0, 10.0, 50.0, 60.0]]), torch.tensor([1]))
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' dropout was seeded"))
    first, again, other = (change(image, target, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].boxes_xyxy, again[1].boxes_xyxy)
    assert not torch.equal(first[0], other[0])


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_sees_every_sample_once_whatever_the_batch(count, batch, seed):
    steps = -(-3 * count // batch)
    seen = [each for step in range(steps) for each in step_samples(count, seed, step, batch)][: 3 * count]
    for epoch in range(3):
        assert sorted(i for e, i in seen if e == epoch) == list(range(count))
    if count > 12:
        assert seen[:count] != [(0, i) for _, i in seen[count : 2 * count]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_where_a_run_starts_or_who_reads(workers):
    config, dataset = recipe("detr-xs"), open_dataset(FEW, "train")
    change = Augmentation(config.augmentation, config.images)
    how = {"seed": 3, "batch": 5, "micro_batch": 3}
    whole = training_steps(dataset, config.images, change, **how)
    for _ in range(2):
        next(whole)
    later = training_steps(dataset, config.images, change, **how, numbers=CountFrom(2), workers=workers)
    for _ in range(2):
        for a, b in zip(next(whole), next(later), strict=True):
            assert a.image_ids == b.image_ids
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.boxes_cxcywh, b.boxes_cxcywh)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
@pytest.mark.parametrize(
    ("limits", "set_to"), [((1024, 8192), [(4096, 8192)]), ((4096, 4096), []), ((1024, -1), [(4096, -1)])]
)
def test_as_many_files_may_be_open_as_the_parts_of_steps_under_way_need(monkeypatch, limits, set_to):
    """256 images by twos in two processes: 128 parts of five tensors, two steps ahead each."""
    import resource

    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: asked.append(both))
    allow_open_files(workers=2, parts=128)
    assert asked == set_to
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 2048))
    with pytest.raises(
        InputError, match=r"--workers 2 with a batch in 128 parts can need 4,096 open files.*allows 2,048"
    ):
        allow_open_files(workers=2, parts=128)


FEW_FILES = """
import resource
from dataclasses import replace
from pathlib import Path
from lucidetr.config import ImageConfig
from lucidetr.data.batching import training_steps
from lucidetr.data.dataset import open_dataset

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
dataset = open_dataset("generated:digits?size=32&digit=10-12&objects=1-2&train=40&val=1", "train")
images = ImageConfig(resize="square", size=32)
steps = training_steps(dataset, images, None, seed=0, batch=120, micro_batch=1, workers=1)
for _ in range(3):
    print(len(next(steps)))
steps.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_many_parts_come_through_where_few_files_may_be_open():
    done = subprocess.run([sys.executable, "-c", FEW_FILES], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["120"] * 3, done.stderr


GROWN_BY_A_SEARCH_FOR_CYCLES = """
import gc, multiprocessing, re
from pathlib import Path
from lucidetr.data.batching import start_reading

def own():
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kilobytes) for kilobytes in re.findall(r"^Private_\\w+: +(\\d+)", text, re.MULTILINE)) / 1000

def read(worker):
    before = own()
    start_reading(worker)
    gc.collect()
    print(own() - before, flush=True)

shared = [[] for _ in range(500_000)]
reader = multiprocessing.get_context("fork").Process(target=read, args=(0,))
reader.start()
reader.join()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="nothing says how much memory is shared")
def test_a_search_for_cycles_does_not_copy_what_reading_processes_share():
    """Half a million lists are 28 MB; what was made since the fork, and the search's own, is little."""
    made = [sys.executable, "-c", GROWN_BY_A_SEARCH_FOR_CYCLES]
    done = subprocess.run(made, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert float(done.stdout) < 8


def test_evaluation_sees_every_image_once_in_order():
    dataset = open_dataset(FEW, "train")
    batches = list(evaluation_batches(dataset, recipe("detr-xs").images, 5))
    assert [i for batch in batches for i in batch.image_ids] == list(range(1, 13))
    first = dataset.annotations.target(0)
    torch.testing.assert_close(batches[0].boxes_cxcywh[0, 0, 2] * 128, first.boxes_xyxy[0, 2] - first.boxes_xyxy[0, 0])


def test_no_picture_in_an_evaluation_batch_is_padded(tmp_path):
    """Group norm measures padding too: a prediction must not depend on what shares its batch."""
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": 40} for i, w in enumerate((40, 40, 60, 40), 1)]
    for image in images:
        Image.new("RGB", (image["width"], 40)).save(tmp_path / image["file_name"])
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    batches = list(evaluation_batches(open_dataset(str(tmp_path), "train"), ImageConfig(size=64, max_size=128), 8))
    assert [batch.image_ids for batch in batches] == [(1, 2), (3,), (4,)]
    assert not any(batch.padding.any() for batch in batches)


def test_the_default_digits_are_fixed():
    """Figures are compared on this set; a change here makes every earlier figure worthless."""
    default = DigitsConfig()
    assert (default.size, default.train, default.val, default.objects) == (128, 4000, 500, (1, 8))
    train = open_dataset("generated:digits?train=60", "train")
    boxes = train.annotations.boxes_xywh
    assert [train.annotations.boxes_xywh[:3].tolist(), train.annotations.labels[:3].tolist()] == GOLDEN_BOXES
    assert train.image(0).float().mean().item() == pytest.approx(GOLDEN_MEAN, abs=0.05)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 128).all()
    assert boxes[:, 2:].max() <= 47
    assert set(train.annotations.objects_per_image()) <= set(range(1, 9))


def test_digits_do_not_overlap_and_scenes_do_not_depend_on_the_number():
    few, many = open_dataset(FEW, "train"), open_dataset("generated:digits?train=20&val=5", "train")
    assert torch.equal(few.image(7), many.image(7))
    assert not torch.equal(few.image(0), open_dataset(FEW, "val").image(0))
    for index in range(len(few)):
        boxes = few.annotations.target(index).boxes_xyxy
        low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = (high - low).clamp(min=0).prod(-1).fill_diagonal_(0)
        assert not shared.any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("generated:digit", "unknown generated data"),
        ("generated:digits?sizes=3", r"unknown parameter sizes: did you mean size\?"),
        ("generated:digits?size=x", "size = 'x'; expected a number"),
        ("generated:digits?size=20", "digits of 14…47 pixels in a picture of 20"),
        ("generated:digits?objects=9-3", "is no data set"),
        ("generated:digits?train=1-2", "expected one number"),
        ("generated:digits?__class__=3", "unknown parameter __class__"),
        ("generated:digits?size=²", "size = '²'; expected a number"),
    ],
)
def test_generated_names_that_mean_nothing_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        parse(name)


def test_crowded_scenes_have_many_digits():
    crowd = open_dataset("generated:digits?size=256&objects=40-60&digit=14-20&train=2", "train")
    assert (crowd.annotations.objects_per_image() >= 30).all()


def test_written_scenes_are_read_again_pixel_by_pixel(tmp_path):
    assert write_splits(open_splits(FEW), tmp_path / "set", "coco") == {"train": 12, "val": 5}
    for split in ("train", "val"):
        generated, read = open_dataset(FEW, split), open_dataset(str(tmp_path / "set"), split)
        assert read.annotations.to_coco() == generated.annotations.to_coco()
        assert all(torch.equal(read.image(i), generated.image(i)) for i in range(len(read)))
    with pytest.raises(InputError, match="not empty"):
        write_splits(open_splits(FEW), tmp_path / "set", "coco")


def test_a_reading_process_that_is_not_forked_can_be_given_every_data_set(tmp_path):
    write_splits(open_splits("generated:digits?train=3&val=1&size=48"), tmp_path / "scenes", "coco")
    stored = open_dataset(str(tmp_path / "scenes"), "train")
    images = ImageConfig(size=48, resize="square")
    change = build_augmentation(AugmentationConfig(), images)
    for dataset in (stored, stored.subset(np.array([2, 0]), "some"), open_dataset("generated:digits?train=3", "train")):
        steps = Steps(dataset, images, change, 0, Cut(2, 2))
        again = pickle.loads(pickle.dumps(steps))  # noqa: S301, what was pickled here
        assert torch.equal(again.dataset.image(1), dataset.image(1))
        assert torch.equal(again.parts(0, 0.0)[0].images, steps.parts(0, 0.0)[0].images)


def test_the_sheet_of_augmentations_shows_what_training_will_see():
    dataset = open_dataset("generated:digits?train=6&val=1&size=48", "train")
    still = AugmentationConfig(flip=0, scales=(), crop=0, zoom=0, shift=0, colour=0)
    config = replace(recipe("lucid-xs"), images=ImageConfig(size=48, resize="square"), augmentation=still)

    def cells(config):
        whole = np.asarray(draw_augmented(dataset, config, number=2, versions=3))
        side = 6 * 48  # each pixel grown to 6 × 6
        step = side + 8
        assert whole.shape == (2 * step + 8, 4 * step + 8, 3), "two rows of one picture and three versions"
        parts = [[whole[8 + step * row :, 8 + step * column :][:side, :side] for column in range(4)] for row in (0, 1)]
        return [[part.astype(float) for part in row] for row in parts]

    for row in cells(config):
        assert all(np.abs(row[0] - other).mean() < 2 for other in row[1:]), "all changes are off"
    before, after = cells(config), cells(replace(config, augmentation=replace(still, flip_vertical=1.0)))
    for plain, row in zip(before, after, strict=True):
        assert np.array_equal(row[0], plain[0]), "the first is the picture as it is"
        assert all(np.abs(row[0] - other).mean() > 10 for other in row[1:]), "the others stand on their heads"


def test_augmentations_without_a_recipe_are_those_that_train_would_choose(tmp_path, capsys):
    data_verb(["augment", "--data", FEW, "--out", str(tmp_path / "sheet.png")])
    said = capsys.readouterr().out
    assert re.search(r"^chosen: lucid-\w+ at (\d+) × \1 with", said, re.MULTILINE)
    assert (tmp_path / "sheet.png").is_file()


def test_a_set_without_validation_is_split_the_same_way_each_time(tmp_path):
    write_splits(open_splits(FEW), tmp_path, "coco")
    (tmp_path / "annotations" / "val.json").unlink()
    config = replace(recipe("detr-xs"), data=str(tmp_path), val_fraction=0.25)
    train, val, notes = open_training_data(config)
    assert (len(train), len(val)) == (9, 3)
    assert notes == [
        "no validation split: 3 of 12 training images set aside at random (--val-fraction 0.25), the same whatever the "
        "--seed"
    ]
    everything = sorted([*train.annotations.image_ids, *val.annotations.image_ids])
    assert everything == list(range(1, 13))
    for seed in (0, 5):
        again, _, _ = open_training_data(replace(config, seed=seed))
        assert again.annotations.image_ids.tolist() == train.annotations.image_ids.tolist()
    whole = open_dataset(str(tmp_path), "train")
    index = int(val.annotations.image_ids[1]) - 1
    assert torch.equal(val.image(1), whole.image(index))


def test_what_dropping_bad_boxes_did_is_said(tmp_path, capsys):
    write_splits(
        open_splits("generated:digits?train=3&val=2&size=48&digit=14-20&objects=2-2"), tmp_path / "set", "coco"
    )
    path = tmp_path / "set" / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["bbox"][:2] = [40, 40]
    path.write_text(json.dumps(content))
    number = len(content["annotations"])
    _, _, notes = open_training_data(TrainConfig(data=str(tmp_path / "set"), bad_boxes="drop"))
    said = f"{tmp_path / 'set'}, train (COCO): of {number} boxes, 1 left out and 1 cut at the picture's edge"
    assert notes == [said]
    data, sheet = str(tmp_path / "set"), str(tmp_path / "sheet.png")
    for command in (["sample", data, sheet], ["augment", "--data", data, "--out", sheet]):
        data_verb([*command, "--bad-boxes", "drop"])
        assert said in capsys.readouterr().out.splitlines()


def test_splits_with_other_categories_are_refused(tmp_path):
    write_splits(open_splits(FEW), tmp_path, "coco")
    path = tmp_path / "annotations" / "val.json"
    path.write_text(path.read_text().replace('"name": "3"', '"name": "three"'))
    with pytest.raises(InputError, match="have different categories"):
        open_training_data(replace(TrainConfig(), data=str(tmp_path)))


def test_a_picture_of_another_size_than_stated_is_refused(tmp_path):
    write_splits(open_splits(FEW), tmp_path, "coco")
    Image.new("RGB", (64, 128)).save(tmp_path / "train" / "000003.png")
    dataset = open_dataset(str(tmp_path), "train")
    with pytest.raises(InputError, match=r"000003.png: image 3 is 64 × 128 pixels; the annotations say 128 × 128"):
        dataset.image(2)


def test_images_stay_in_memory_only_when_all_fit():
    dataset = open_dataset(FEW, "train")
    reads = []
    counted = Dataset(dataset.name, dataset.annotations, lambda i: reads.append(i) or dataset.image(i))
    for gigabytes, expected in ((12 * 3 * 128**2 / 1e9, 1), (12 * 3 * 128**2 / 1e9 * 0.99, 2)):
        reads.clear()
        kept = counted.keep(gigabytes)
        assert torch.equal(kept.image(4), kept.image(4))
        assert len(reads) == expected


def test_a_picture_that_its_note_turns_is_not_to_be_mended_by_other_numbers(tmp_path):
    """Exchanged numbers would be accepted, and the boxes lie elsewhere than the pixels."""
    write_splits(open_splits("generated:digits?size=64&train=2&val=2"), tmp_path, "coco")
    content = json.loads((tmp_path / "annotations" / "train.json").read_text())
    content["images"][0] |= {"width": 64, "height": 48}
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "train" / content["images"][0]["file_name"], exif=turned)
    said = "is 48 × 64 pixels, as its EXIF note turns it; the annotations say 64 × 48: save the picture upright"
    with pytest.raises(InputError, match=said):
        open_dataset(str(tmp_path), "train", "drop").image(0)
