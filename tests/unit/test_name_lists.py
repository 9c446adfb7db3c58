"""YOLO folders that labelling tools write without a data.yaml: a list of names says what they hold."""

from pathlib import Path

import pytest
from PIL import Image

from lucidetr.data.dataset import open_dataset
from lucidetr.data.doctor import diagnose
from lucidetr.data.splits import find_splits
from lucidetr.errors import InputError

BOX = "1 0.5 0.5 0.5 0.4\n"
COLOURS = ("black", "blue", "white")  # the doctor would find pictures that are alike


def fill(folder: Path, names: str, *pictures: str) -> Path:
    """Write pictures of 40 × 30 pixels, each with one dog where YOLO looks for its boxes, and a list of names."""
    from lucidetr.data.yolo import label_file

    for number, picture in enumerate(pictures):
        path = folder / picture
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), COLOURS[number]).save(path)
        label_file(path).parent.mkdir(parents=True, exist_ok=True)
        label_file(path).write_text(BOX)
    (folder / names).write_text("cat\nfire dog\n\n")
    return folder


LAYOUTS = {
    "LabelImg, all in one folder": ("classes.txt", ("a.jpg", "b.jpg"), {"train": 2}),
    "LabelImg, boxes saved in labels": ("labels/classes.txt", ("images/a.jpg", "images/b.jpg"), {"train": 2}),
    "Label Studio": ("classes.txt", ("images/a.jpg",), {"train": 1}),
    "divided by hand": ("classes.txt", ("images/train/a.jpg", "images/train/b.jpg", "images/val/c.jpg"),
                        {"train": 2, "val": 1}),
    "divided, splits outside": ("classes.txt", ("train/images/a.jpg", "valid/images/b.jpg", "test/images/c.jpg"),
                                        {"train": 1, "val": 1, "test": 1}),
    "CVAT's Darknet": ("obj.names", ("obj_train_data/a.jpg", "obj_valid_data/b.jpg"), {"train": 1, "val": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("names", "pictures", "sizes"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_list_of_names_is_enough(tmp_path, names, pictures, sizes):
    fill(tmp_path, names, *pictures)
    found = find_splits(tmp_path)
    assert found.format == "YOLO"
    assert {split: len(read("refuse")) for split, read in found.splits.items()} == sizes
    train = open_dataset(str(tmp_path), "train")
    assert train.annotations.categories.names == ("cat", "fire dog")
    assert train.annotations.boxes_xywh.tolist()[0] == [10, 9, 20, 12]
    assert train.image(0).shape == (3, 30, 40)
    assert [finding.text for finding in diagnose(tmp_path).findings if finding.severity == "error"] == []


def test_what_says_more_than_a_list_of_names_comes_first(tmp_path):
    fill(tmp_path, "classes.txt", "images/train/a.jpg")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [emu, owl]\n")
    assert open_dataset(str(tmp_path), "train").annotations.categories.names == ("emu", "owl")


def test_a_relative_folder_is_read_as_well(tmp_path, monkeypatch):
    fill(tmp_path / "cells", "classes.txt", "images/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("cells", "train")) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat\n\ndog\n", r"classes\.txt, line 2: empty, with names behind it"),
        ("cat\n", r"a\.txt, line 1: class 1 is not among the names in .*classes\.txt: 0 cat"),
        ("\n", r"classes\.txt: no class name in it"),
        ("cat\ncat\n", r"classes\.txt: classes 0 and 1 are both called cat"),
    ],
)
def test_faulty_lists_are_named(tmp_path, names, message):
    fill(tmp_path, "classes.txt", "a.jpg")
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(InputError, match=message):
        open_dataset(str(tmp_path), "train")
    assert any(finding.severity == "error" for finding in diagnose(tmp_path).findings)
