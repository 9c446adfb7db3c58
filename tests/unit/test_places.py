"""Pictures of one place: cuts of a scan are found with their shift, other pictures are not; labels made twice."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lucidetr.cli.data import run
from lucidetr.data import doctor, places
from lucidetr.data.agreement import Agreement, Twice, agreement
from lucidetr.data.dataset import open_dataset
from lucidetr.data.doctor import diagnose, summary_table
from lucidetr.data.doctor_page import write_page
from lucidetr.data.export import divide, open_splits, places_of
from lucidetr.data.places import LONG, View, find_pairs, shared_places, small_copy
from lucidetr.data.raw import Box, Picture, Raw
from lucidetr.errors import InputError

WIDTH, HEIGHT = 320, 240
PUT = "put both into one split"
BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


def blobs(seed: int, cells: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return a smooth picture of cells² random shades."""
    grey = np.random.default_rng(seed).integers(0, 255, (cells, cells), dtype=np.uint8)
    return Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC)


def views(images: list[Image.Image], raw: Raw | None = None) -> list[View]:
    raw = raw or Raw("train")
    raw.pictures += [Picture(f"{i}", Path(f"{i}.png")) for i in range(len(images))]
    return [View(raw, number, image.size, small_copy(image)) for number, image in enumerate(images)]


def cut(scan: Image.Image, x: int, y: int) -> Image.Image:
    return scan.crop((x, y, x + WIDTH, y + HEIGHT))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0, 12])
def test_two_cuts_of_one_scan_are_found_with_their_shift(seed, noise):
    random = np.random.default_rng(seed)
    scan = blobs(seed, 60, 900, 700)
    places = [(100, 100), (100 + int(random.integers(-90, 180)), 100 + int(random.integers(-90, 130)))]
    changed = []
    for number, (x, y) in enumerate(places):
        pixels = 0.8**number * np.asarray(cut(scan, x, y), dtype=float) + random.normal(0, noise, (HEIGHT, WIDTH))
        changed.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    (pair,) = find_pairs(views([*changed, blobs(seed + 100, 40)]))
    assert (pair.first.number, pair.second.number) == (0, 1)
    shift = np.subtract(places[1], places[0])
    assert np.abs(np.subtract(pair.shift_xy, shift)).max() <= 0.5  # a fifth of a pixel of the small copies
    common = (WIDTH - abs(shift[0])) * (HEIGHT - abs(shift[1])) / (WIDTH * HEIGHT)
    assert pair.share == pytest.approx(common, abs=0.02)


def stripes(random) -> Image.Image:
    angle, often, start = random.uniform(0, np.pi), random.uniform(0.05, 0.5), random.uniform(0, 6)
    way = np.arange(WIDTH)[None] * np.cos(angle) + np.arange(HEIGHT)[:, None] * np.sin(angle)
    return Image.fromarray(((np.sin(often * way + start) > 0) * 200 + 20).astype(np.uint8))


def board(random) -> Image.Image:
    across, down = (np.arange(WIDTH) + random.integers(20)) // 10, (np.arange(HEIGHT) + random.integers(20)) // 10
    shades = ((across[None] + down[:, None]) % 2) * 150 + 40 + random.normal(0, 10, (HEIGHT, WIDTH))
    return Image.fromarray(shades.clip(0, 255).astype(np.uint8))


def page(random) -> Image.Image:
    """A white page with a few black boxes."""
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    for _ in range(random.integers(1, 6)):
        x, y, wide, high = random.integers((0, 0, 5, 5), (280, 200, 40, 40)).tolist()
        ImageDraw.Draw(image).rectangle([x, y, x + wide, y + high], fill=0)
    return image


def text(random) -> Image.Image:
    """A white page with lines of random letters, all at the same heights."""
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    for y in range(20, 220, 14):
        letters = "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz     "), 45))
        ImageDraw.Draw(image).text((20, y), letters, fill=0)
    return image


def cells(random) -> Image.Image:
    """Forty discs of one size and shade, which lie otherwise in every picture."""
    image = Image.new("L", (WIDTH, HEIGHT), 200)
    for x, y in random.integers((0, 0), (WIDTH, HEIGHT), (40, 2)).tolist():
        ImageDraw.Draw(image).ellipse([x - 12, y - 12, x + 12, y + 12], fill=120, outline=60)
    return image


KINDS = {
    "stripes": stripes,
    "boards": board,
    "pages": page,
    "text": text,
    "cells": cells,
    "noise": lambda random: Image.fromarray(random.integers(0, 255, (HEIGHT, WIDTH), dtype=np.uint8)),
    "plain": lambda random: Image.new("L", (WIDTH, HEIGHT), int(random.integers(255))),
} | {f"blobs {n}": lambda random, n=n: blobs(int(random.integers(2**31)), n) for n in (2, 3, 5, 8, 16, 32)}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_one_kind_are_not_taken_for_one_place(kind):
    random = np.random.default_rng(0)
    assert find_pairs(views([KINDS[kind](random) for _ in range(60)])) == []


def test_pictures_of_another_size_too_small_ones_and_few_are_left_alone():
    scan = blobs(0, 60)
    assert find_pairs([]) == []
    assert find_pairs(views([scan])) == []
    assert find_pairs(views([scan, scan.resize((WIDTH, HEIGHT + 40))])) == []
    assert find_pairs(views([scan.resize((WIDTH, 30))] * 2)) == []  # 128 × 12 in small
    assert [pair.shift_xy for pair in find_pairs(views([scan, scan]))] == [(0.0, 0.0)]


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "RGBA", "CMYK", "I", "F", "I;16"])
def test_a_small_copy_is_grey_and_upright_whatever_the_mode(mode):
    grey = blobs(1, 6)
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    small = small_copy(image)
    assert (small.shape, small.dtype) == ((LONG * HEIGHT // WIDTH, LONG), np.uint8)
    assert np.corrcoef(small.ravel(), small_copy(grey).ravel())[0, 1] > 0.9
    image.getexif()[274] = 6  # seen upright it is turned by a quarter, clockwise
    assert np.array_equal(small_copy(image), np.rot90(small, -1))
    assert small_copy(blobs(1, 6, 40, 30)).shape == (30, 40)  # nothing is made larger


def two_labellings(first: list[list[float]], second: list[list[float]], **said) -> Agreement | None:
    """Return the agreement of labels on two cuts of a scan, the second 60 pixels to the right and 40 further down."""
    raw, scan = Raw("train"), blobs(3, 60, 900, 700)
    seen = views([cut(scan, 100, 100), cut(scan, 160, 140)], raw)
    for number, boxes in enumerate((first, second)):
        raw.boxes += [Box(f"{number}.{i}", number, "cell", box, **said) for i, box in enumerate(boxes)]
    return agreement(find_pairs(seen))


def test_labels_made_twice_agree_by_hand():
    """A box 100 wide and 50 high in both, once moved by 20: IoU (80 × 50) / (120 × 50) = 2/3; and one in one alone.

    The truth is 14.14 from each: IoU 85.86 / 114.14 = 0.752, which is within six of COCO's ten.
    """
    found = two_labellings([[100, 60, 100, 50], [200, 150, 40, 40]], [[60, 20, 100, 50]])
    assert found is not None
    assert found.pairs == 1
    assert (found.together.labels, found.together.paired) == (3, pytest.approx(2 / 3))
    assert found.together.iou == pytest.approx(2 / 3, abs=0.005)
    assert found.together.within == pytest.approx(0.4)  # at 0.50, 0.55, 0.60 and 0.65
    assert found.together.ideal in (0.5, 0.6)  # 0.752 is found to about half a pixel
    assert found.categories == {"cell": found.together}


@pytest.mark.parametrize(
    "box",
    [
        [50, 60, 40, 40],  # cut off in the second picture
        [61, 60, 40, 40],  # too near to its edge
        [280, 60, 40, 40],  # at the first's own edge
        [100, 60, 0, 40],
        [100, 60, float("nan"), 40],
    ],
)
def test_what_both_cannot_see_whole_is_no_label_made_twice(box):
    assert two_labellings([box], []) is None
    assert two_labellings([[100, 60, 40, 40]], [], crowd=True) is None
    alone = Twice(1, 0.0, None, None, None)
    assert two_labellings([[100, 60, 40, 40]], []) == Agreement(1, alone, {"cell": alone})


def test_a_label_whose_partner_just_fails_is_not_alone():
    """The label in the first picture lies whole in what both see, the one in the second reaches two pixels too far."""
    assert two_labellings([[100, 180, 60, 53]], [[40, 140, 60, 59]]) is None
    alone = two_labellings([[100, 180, 60, 53]], [[140, 40, 20, 20]])
    assert alone is not None
    assert (alone.together.labels, alone.together.paired) == (2, 0.0)


def test_what_has_moved_itself_and_what_stands_still_is_not_labelled_twice():
    scan, size = blobs(5, 60, 900, 700), (60, 40)
    for moves, labels in ((40, 0), (0, 2)):  # a car that drove on; one that stands, seen by a camera that has turned
        raw, images = Raw("train"), []
        for x, car in ((100, 200), (130, 200 + moves)):
            image = cut(scan, x, 100)
            left = car - x
            ImageDraw.Draw(image).rectangle([left, 90, left + size[0], 90 + size[1]], fill=255)
            ImageDraw.Draw(image).rectangle([left + 10, 100, left + 25, 120], fill=0)
            raw.boxes.append(Box(f"{x}", len(images), "car", [left, 90, *size]))
            images.append(image)
        found = agreement(find_pairs(views(images, raw)))
        assert (found.together.labels if found else 0) == labels
    raw = Raw("train", boxes=[Box("0", 0, "car", [50, 60, 40, 40]), Box("1", 1, "car", [50, 60, 40, 40])])
    pairs = find_pairs(views([cut(scan, 100, 100)] * 2, raw))
    assert len(pairs) == 1
    assert agreement(pairs) is None  # a copy: its labels may be copied, too


def scan_in_splits(folder: Path) -> Path:
    """Write a COCO set of three pictures: one for training, and two of which each shows a part of it."""
    scan = blobs(7, 80, 1000, 700)
    cuts = {"test": [(300, 200)], "train": [(380, 200)], "val": [(300, 320)]}
    for split, corners in cuts.items():
        (folder / split).mkdir(parents=True)
        images, boxes = [], []
        for i, (x, y) in enumerate(corners, 1):
            cut(scan, x, y).save(folder / split / f"{split}{i}.png")
            images.append({"id": i, "file_name": f"{split}{i}.png", "width": WIDTH, "height": HEIGHT})
            boxes.append({"id": i, "image_id": i, "category_id": 1, "bbox": [500 - x, 360 - y, 40, 40]})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


def test_the_doctor_says_what_two_splits_share_of_the_split_that_is_measured(tmp_path, monkeypatch):
    folder = scan_in_splits(tmp_path / "scan")
    assert diagnose(folder).twice is None  # six labels tell nothing
    monkeypatch.setattr(doctor, "FEWEST_LABELS", 6)
    report = diagnose(folder)
    said = sorted(finding.text for finding in report.findings if finding.kind == "splits-share-place")
    test, train, val = (folder / split / f"{split}1.png" for split in ("test", "train", "val"))
    assert said == [
        f"{test} (test) looks like {train} (train) moved 80 pixels to the right and 0 down, 75% of it one place: {PUT}",
        f"{val} (val) looks like {train} (train) moved 80 pixels to the right and 120 up, 38% of it one place: {PUT}",
    ]
    assert report.twice is not None
    assert (report.twice.pairs, report.twice.together.labels, report.twice.together.paired) == (3, 6, 1.0)
    assert "3 pairs of pictures show one place. Objects that both show whole have 6 labels; 100%" in summary_table(
        report
    )
    assert report.to_dict()["labelled_twice"]["categories"]["cell"]["labels"] == 6
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "3 pairs of pictures show one place." in page
    assert '<td class="number">6</td><td class="number">100 %</td>' in page
    assert f"and what it looks like, {train.name}" in page
    unseen = diagnose(folder, places="off")
    assert unseen.twice is None
    assert not [finding for finding in unseen.findings if finding.kind == "splits-share-place"]
    monkeypatch.setattr(places, "MOST_COMPARED", 2)
    assert "pictures of one place: not looked for (--places all" in summary_table(diagnose(folder))
    assert diagnose(folder, places="all").twice == report.twice


def test_before_a_camera_that_stands_not_every_two_pictures_are_looked_at(monkeypatch):
    """Each picture is tied to two before it, and to those that no other ties to it."""
    monkeypatch.setattr(places, "MOST_PARTNERS", 2)
    random, still = np.random.default_rng(0), np.asarray(blobs(5, 40), dtype=float)
    noisy = [still + random.normal(0, 3, still.shape) for _ in range(7)]
    pairs = find_pairs(views([Image.fromarray(each.clip(0, 255).astype(np.uint8)) for each in noisy]))
    assert Counter(pair.second.number for pair in pairs) == {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2}
    scan = blobs(7, 80, 1000, 700)
    cuts = [*[cut(scan, 100, 100 + 2 * i) for i in range(5)], cut(scan, 460, 100), cut(scan, 280, 100)]
    pairs = find_pairs(views(cuts))
    assert (5, 6) in {(pair.first.number, pair.second.number) for pair in pairs}
    assert Counter(pair.second.number for pair in pairs)[6] == 3


def test_a_place_within_one_split_is_no_finding():
    pairs = find_pairs(views([cut(blobs(3, 60, 900, 700), x, 100) for x in (100, 180)]))
    assert len(pairs) == 1
    assert shared_places(pairs) == []


def unsplit(folder: Path, count: int = 6) -> Path:
    """Write a COCO set of one split: three pictures of one scan, whose ends share nothing, and others."""
    (folder / "images").mkdir(parents=True)
    scan = blobs(7, 80, 1000, 700)
    images = [cut(scan, x, 100) for x in (100, 300, 500)] + [blobs(50 + i, 40) for i in range(count - 3)]
    boxes, entries = [], []
    for i, image in enumerate(images, 1):
        image.save(folder / "images" / f"{i}.png")
        entries.append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
        boxes.append({"id": i, "image_id": i, "category_id": 1, "bbox": [50, 60, 40, 40]})
    content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("seed", range(6))
def test_a_division_keeps_places_together(tmp_path, seed, capsys):
    source = unsplit(tmp_path / "source", 9)
    run(["split", str(source), str(tmp_path / "parts"), "--val", "0.4", "--test", "0.2", "--seed", str(seed)])
    assert "2 pictures stayed with others that show the same place" in capsys.readouterr().out
    names = {each.stem: each.parent.name for each in (tmp_path / "parts").rglob("*.png")}
    assert len(names) == 9
    assert set(names.values()) == {"train", "val", "test"}
    assert len({names["1"], names["2"], names["3"]}) == 1


def test_a_division_without_common_places_is_what_it_was():
    dataset = open_dataset("generated:digits?train=20&size=64", "train")
    as_before = divide(dataset, 0.3, 0.2, seed=5)
    alone = divide(dataset, 0.3, 0.2, seed=5, places=np.arange(20))
    assert [p.annotations.file_names.tolist() for p in alone.values()] == [
        p.annotations.file_names.tolist() for p in as_before.values()
    ]


def test_copies_stay_together_whatever_they_show(tmp_path):
    """Plain pages, of which pairs are not sought, lie there twice; so do pictures too small to compare."""
    whole = open_splits(str(unsplit(tmp_path / "source", 9)))["train"]
    drawn = [page(np.random.default_rng(i // 2)) for i in range(6)] + [blobs(i // 2, 5, 20, 12) for i in range(3)]
    for number, image in enumerate(drawn, 1):
        image.convert("RGB").save(tmp_path / "source" / "images" / f"{number}.png")
    sizes = [image.size[::-1] for image in drawn]
    whole = replace(whole, annotations=replace(whole.annotations, sizes=np.array(sizes)))
    assert places_of(whole).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.parametrize(("count", "val", "test"), [(10, 0.05, 0.05), (5, 0.1, 0.1), (20, 0.05, 0.02)])
def test_no_part_of_a_division_is_empty(count, val, test):
    dataset = open_dataset(f"generated:digits?train={count}&size=64", "train")
    for known in (None, np.arange(count)):
        said = rf"{count} pictures of {count} places leave none for (val|test); give larger"
        with pytest.raises(InputError, match=said):
            divide(dataset, val, test, seed=0, places=known)


def test_a_pair_that_moved_is_told_of_though_its_fingerprint_is_that_of_a_plain_picture(tmp_path):
    """Left to right both get brighter, so that all 64 bits of their fingerprints are ones."""
    random = np.random.default_rng(0)
    scan = np.linspace(0, 200, 900)[None] + random.normal(0, 12, (700, 900))
    scan = Image.fromarray(scan.clip(0, 255).astype(np.uint8)).resize((1800, 1400), Image.Resampling.BICUBIC)
    folder = scan_in_splits(tmp_path / "scan")
    cut(scan, 600, 500).save(folder / "train" / "train1.png")
    cut(scan, 670, 500).save(folder / "val" / "val1.png")
    kinds = [finding.kind for finding in diagnose(folder).findings if "looks like" in finding.text]
    assert kinds == ["splits-share-place"]


def test_one_place_cannot_be_divided(tmp_path, monkeypatch, capsys):
    source = unsplit(tmp_path / "source", 3)
    with pytest.raises(InputError, match=r"3 pictures of 1 place leave none for train; .*--places off"):
        run(["split", str(source), str(tmp_path / "parts")])
    with pytest.raises(InputError, match="leave none for train and val"):
        run(["split", str(source), str(tmp_path / "parts"), "--test", "0.4"])
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(places, "MOST_COMPARED", 2)
    run(["split", str(source), str(tmp_path / "parts")])
    assert "pictures of one place may lie in different parts (--places all" in capsys.readouterr().out


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"BCCD is not at {BCCD}")
def test_bccd_shows_forty_three_places_twice():
    """All 43 were looked at by eye. A fifth of the labels there have no partner, the others are a bit off."""
    report = diagnose(BCCD)
    said = [finding.text for finding in report.findings if finding.kind == "splits-share-place"]
    assert len({text.split()[0] for text in said}) == len(said) == 22
    assert sum("(test) looks like" in text for text in said) == 13
    assert sum("(test) looks like" in text and "(train)" in text for text in said) == 9
    assert report.twice is not None
    assert report.twice.pairs == 43
    assert report.twice.together.paired == pytest.approx(0.79, abs=0.01)
    assert report.twice.together.iou == pytest.approx(0.82, abs=0.01)
