"""Folders as the world has them: layouts, notes and small faults of other programs that need not stop anybody."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from lucidetr.config import TrainConfig
from lucidetr.data.dataset import open_dataset, open_training_data
from lucidetr.data.doctor import diagnose
from lucidetr.data.splits import find_splits
from lucidetr.errors import InputError

COLOURS = ("black", "blue", "white", "red", "green")  # the doctor would find pictures that are alike


def picture(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), COLOURS[number]).save(path, format="PNG" if path.suffix == ".png" else "JPEG")
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def xml(path: Path, size: str = "<width>40</width><height>30</height>", name: str = "cat") -> Path:
    corners = "<xmin>5</xmin><ymin>6</ymin><xmax>15</xmax><ymax>26</ymax>"
    thing = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    return text(path, f"<annotation><size>{size}</size>{thing}</annotation>")


def coco(path: Path, names: list[str], categories: list[dict], used: int = 1, **box: object) -> Path:
    images = [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names, start=1)]
    boxes = [
        {"id": i, "image_id": i, "category_id": used, "bbox": [5, 6, 10, 20], **box}
        for i, _ in enumerate(names, start=1)
    ]
    return text(path, json.dumps({"images": images, "annotations": boxes, "categories": categories}))


def training(folder: Path, **changes):
    return open_training_data(TrainConfig(data=str(folder), **changes))


def errors(folder: Path) -> list[str]:
    return [finding.text for finding in diagnose(folder).findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("files", "pictures", "sizes"),
    [
        (["annotations/a.xml", "annotations/b.xml"], ["images/a.png", "images/b.png"], {"train": 2}),
        (["Annotations/one/a.xml", "Annotations/b.xml"], ["JPEGImages/a.jpg", "JPEGImages/b.jpg"], {"train": 2}),
        (
            ["train/annotations/a.xml", "valid/annotations/b.xml"],
            ["train/images/a.png", "valid/images/b.png"],
            {"train": 1, "val": 1},
        ),
        (["Annotations/a.xml"], ["JPEGImages/a.JPG"], {"train": 1}),
    ],
    ids=["lower case", "folders below", "splits with both", "suffix in capitals"],
)
def test_voc_layouts_are_found(tmp_path, files, pictures, sizes):
    for file in files:
        xml(tmp_path / file)
    for number, each in enumerate(pictures):
        picture(tmp_path / each, number)
    found = find_splits(tmp_path)
    assert found.format == "VOC"
    assert {split: len(read("refuse")) for split, read in found.splits.items()} == sizes
    assert open_dataset(str(tmp_path), "train").image(0).shape == (3, 30, 40)
    assert errors(tmp_path) == []


@pytest.mark.parametrize("size", ["<width>0</width><height>0</height>", ""])
def test_a_size_that_a_voc_file_does_not_say_is_the_pictures_own(tmp_path, size):
    xml(tmp_path / "a.xml", size)
    picture(tmp_path / "a.jpg")
    assert open_dataset(str(tmp_path), "train").annotations.sizes.tolist() == [[30, 40]]
    assert errors(tmp_path) == []


def test_cvats_own_xml_is_named(tmp_path):
    text(tmp_path / "annotations.xml", "<annotations><image><box/></image></annotations>")
    with pytest.raises(InputError, match="CVAT's own XML, of many pictures at once; export the task as COCO"):
        open_dataset(str(tmp_path), "train")


def test_notes_beside_a_list_of_names_are_no_coco_file(tmp_path):
    """Label Studio writes notes.json into its YOLO folders."""
    text(tmp_path / "notes.json", json.dumps({"categories": [{"id": 0, "name": "cat"}], "info": {}}))
    text(tmp_path / "classes.txt", "cat\n")
    picture(tmp_path / "images" / "a.jpg")
    text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    assert find_splits(tmp_path).format == "YOLO"
    assert diagnose(tmp_path).format == "YOLO"


def test_a_yaml_of_any_name_is_found_if_it_is_the_only_one_of_its_kind(tmp_path):
    text(tmp_path / "cells.yaml", "train: images\nnames: [cat]\n")
    text(tmp_path / "settings.yaml", "names: none\n")
    picture(tmp_path / "images" / "a.jpg")
    text(tmp_path / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    assert len(open_dataset(str(tmp_path), "train")) == 1
    text(tmp_path / "other.yaml", "train: images\nnames: [dog]\n")
    with pytest.raises(
        InputError, match=r"for the boxes in .*labels write .*classes\.txt, one class name on each line"
    ):
        open_dataset(str(tmp_path), "train")


def test_a_folder_one_too_high_names_the_right_one(tmp_path):
    xml(tmp_path / "VOC2012" / "Annotations" / "a.xml")
    with pytest.raises(InputError, match=r"no data set that can be read: .*VOC2012 looks like one: give that"):
        open_dataset(str(tmp_path), "train")


def test_a_test_split_that_is_not_there_does_not_stop_training(tmp_path):
    """Roboflow's yaml names one even where it exported none."""
    text(tmp_path / "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [cat]\n")
    for number, split in enumerate(("train", "valid")):
        picture(tmp_path / split / "images" / "a.jpg", number)
        text(tmp_path / split / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    train, val, _ = training(tmp_path)
    assert (len(train), len(val)) == (1, 1)
    with pytest.raises(InputError, match=r"\.\./test/images is neither of"):
        open_dataset(str(tmp_path), "test")


ROOT = {"id": 0, "name": "fish", "supercategory": "none"}


def test_roboflows_root_category_is_left_out_where_it_is_called_as_another(tmp_path):
    coco(tmp_path / "train.json", ["a.jpg"], [ROOT, {"id": 1, "name": "fish", "supercategory": "fish"}])
    picture(tmp_path / "a.jpg")
    train = open_dataset(str(tmp_path), "train").annotations
    assert (train.categories.ids, train.categories.names) == ((1,), ("fish",))
    assert train.mended == "category 0, fish, left out: it stands for the project, and has no box"


def test_another_root_category_stays_and_is_said(tmp_path):
    """Runs have been trained with it, and go on only with the same categories."""
    coco(tmp_path / "train.json", ["a.jpg"], [ROOT, {"id": 1, "name": "salmon", "supercategory": "fish"}])
    picture(tmp_path / "a.jpg")
    train = open_dataset(str(tmp_path), "train").annotations
    assert train.categories.names == ("fish", "salmon")
    assert train.mended.startswith("category 0, fish, has no box: if it only names the project, take it out of every")


@pytest.mark.parametrize(
    ("root", "used"), [(ROOT, 0), (ROOT | {"supercategory": "animal"}, 1), (ROOT | {"name": "cat"}, 1)]
)
def test_a_category_0_that_is_used_or_not_above_all_others_stays(tmp_path, root, used):
    coco(tmp_path / "train.json", ["a.jpg"], [root, {"id": 1, "name": "salmon", "supercategory": "fish"}], used)
    picture(tmp_path / "a.jpg")
    train = open_dataset(str(tmp_path), "train").annotations
    assert train.categories.ids == (0, 1)
    assert train.mended == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (r"images\\a.jpg", r"write / for Windows' \\ in file_name"),
        ("/home/x/a.jpg", "leave the folders of another machine"),
    ],
)
def test_names_of_another_machine_are_named(tmp_path, name, said):
    coco(tmp_path / "train.json", [name], [{"id": 1, "name": "cat"}])
    picture(tmp_path / "images" / "a.jpg")
    with pytest.raises(InputError, match=said):
        open_dataset(str(tmp_path), "train")


def test_an_area_of_null_is_that_of_the_box(tmp_path):
    coco(tmp_path / "train.json", ["a.jpg"], [{"id": 1, "name": "cat"}], area=None)
    picture(tmp_path / "a.jpg")
    assert open_dataset(str(tmp_path), "train").annotations.areas.tolist() == [200]
    assert errors(tmp_path) == []


CATS = [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]


def test_a_split_may_name_fewer_categories_and_no_others(tmp_path):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg", 1)
    coco(tmp_path / "train.json", ["a.jpg"], CATS, 5)
    coco(tmp_path / "val.json", ["b.jpg"], CATS[1:], 5)
    train, val, _ = training(tmp_path)
    assert val.annotations.categories == train.annotations.categories
    assert val.annotations.labels.tolist() == [1]
    for other in ({"id": 5, "name": "emu"}, {"id": 7, "name": "dog"}):
        coco(tmp_path / "val.json", ["b.jpg"], [other], other["id"])
        with pytest.raises(InputError, match="have different categories"):
            training(tmp_path)


def test_training_without_objects_is_refused_and_with_few_is_said(tmp_path):
    text(tmp_path / "classes.txt", "cat\n")
    for number in range(5):
        picture(tmp_path / "images" / f"{number}.jpg", number)
        text(tmp_path / "labels" / f"{number}.txt", "")
    with pytest.raises(
        InputError, match="none of 5 images holds an object, so there is nothing to learn; where that is"
    ):
        training(tmp_path)
    text(tmp_path / "labels" / "0.txt", "0 0.5 0.5 0.5 0.5\n")
    assert any("warning: 4 of 5 training images hold no object" in note for note in training(tmp_path)[2])
    for number in range(3):
        text(tmp_path / "labels" / f"{number}.txt", "0 0.5 0.5 0.5 0.5\n")
    assert not any("hold no object" in note for note in training(tmp_path)[2])


def test_a_validation_split_of_training_images_is_said(tmp_path):
    for number, name in enumerate("abc"):
        picture(tmp_path / f"{name}.jpg", number)
    coco(tmp_path / "train.json", ["a.jpg", "b.jpg"], CATS)
    coco(tmp_path / "val.json", ["b.jpg", "c.jpg"], CATS)
    said = "warning: 1 of 2 validation images are training images, too: what they show means little"
    assert said in training(tmp_path)[2]
    coco(tmp_path / "val.json", ["c.jpg"], CATS)
    assert not any("too: what they show" in note for note in training(tmp_path)[2])


@pytest.mark.skipif(not hasattr(Path, "symlink_to"), reason="has no links")
@pytest.mark.parametrize("file", ["Annotations/a.xml", "annotations/below/a.xml", "train/annotations/a.xml"])
def test_a_folder_of_pictures_that_leads_outside_is_refused_in_every_layout(tmp_path, file):
    picture(tmp_path / "outside" / "a.jpg")
    xml(tmp_path / "set" / file)
    home = tmp_path / "set" / "train" if file.startswith("train") else tmp_path / "set"
    (home / "images").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="leads out of"):
        open_dataset(str(tmp_path / "set"), "train")


def test_folders_below_the_annotations_are_splits_if_they_are_called_so(tmp_path):
    for number, (split, name) in enumerate((("train", "a"), ("train", "b"), ("val", "c"))):
        xml(tmp_path / "Annotations" / split / f"{name}.xml")
        picture(tmp_path / "JPEGImages" / f"{name}.jpg", number)
    splits = find_splits(tmp_path).splits
    assert {split: len(read("refuse")) for split, read in splits.items()} == {"train": 2, "val": 1}


def test_copies_that_programs_keep_are_no_annotations_and_equal_names_no_list(tmp_path):
    xml(tmp_path / "Annotations" / "a.xml")
    xml(tmp_path / "Annotations" / ".ipynb_checkpoints" / "a-checkpoint.xml")
    picture(tmp_path / "JPEGImages" / "a.jpg")
    assert len(open_dataset(str(tmp_path), "train")) == 1
    xml(tmp_path / "Annotations" / "more" / "a.xml")
    text(tmp_path / "ImageSets" / "Main" / "train.txt", "a\n")
    with pytest.raises(InputError, match="have one name, which lists cannot tell apart; rename one"):
        open_dataset(str(tmp_path), "train")


@pytest.mark.parametrize(("beside", "content"), [("classes.txt", "dog\n"), ("coco.yaml", "train: x\nnames: [dog]\n")])
def test_a_coco_file_says_more_than_lists_of_names_and_yamls_beside_it(tmp_path, beside, content):
    coco(tmp_path / "annotations.json", ["a.jpg"], CATS)
    picture(tmp_path / "a.jpg")
    text(tmp_path / beside, content)
    assert find_splits(tmp_path).format == "COCO"
    assert diagnose(tmp_path).format == "COCO"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may look into everything")
def test_a_folder_that_may_not_be_looked_into_is_passed_over(tmp_path):
    (tmp_path / "lost+found").mkdir(mode=0)
    with pytest.raises(InputError, match="no data set that can be read"):
        open_dataset(str(tmp_path), "train")
