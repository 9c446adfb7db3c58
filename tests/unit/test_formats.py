"""VOC and YOLO folders: known layouts are found, each fault names file, place, value and fix, and all formats agree."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lucidetr.data.dataset import open_dataset
from lucidetr.data.doctor import diagnose
from lucidetr.data.export import divide, open_splits, write_splits
from lucidetr.data.sheet import draw_sheet
from lucidetr.data.splits import find_splits
from lucidetr.data.voc import find_voc
from lucidetr.errors import InputError

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


def picture(path: Path, width: int = 40, height: int = 30, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path, **options)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def voc_object(name: str, *corners: object) -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"


def voc_file(path: Path, *objects: str, filename: str = "", size: str = "<width>40</width><height>30</height>") -> Path:
    head = f"<filename>{filename or path.stem + '.jpg'}</filename><size>{size}</size>"
    return text(path, f"<annotation>{head}{''.join(objects)}</annotation>")


@pytest.fixture
def voc(tmp_path):
    """Return a devkit's folder: a is for training, b for validation."""
    for stem in "ab":
        picture(tmp_path / "JPEGImages" / f"{stem}.jpg")
        text(tmp_path / "ImageSets" / "Main" / f"{'train' if stem == 'a' else 'val'}.txt", f"{stem}\n")
    text(tmp_path / "ImageSets" / "Main" / "cat_train.txt", "a -1\n")
    voc_file(tmp_path / "Annotations" / "a.xml", voc_object("dog", 5, 6, 15, 26), voc_object("cat", 0, 0, 40, 30))
    voc_file(tmp_path / "Annotations" / "b.xml", voc_object("emu", 1, 2, 3, 4))
    return tmp_path


@pytest.fixture
def yolo(tmp_path):
    """Return a folder with train and val pictures and their labels."""
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "a.jpg")
        picture(tmp_path / "images" / split / "b.jpg")
        text(tmp_path / "labels" / split / "a.txt", "1 0.25 0.5 0.25 0.4\n\n0 0.5 0.5 1 1\n")
    text(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog]\nnc: 2\n")
    return tmp_path


def test_voc_is_read(voc):
    assert find_splits(voc).format == "VOC"
    train, val = (open_dataset(str(voc), split) for split in ("train", "val"))
    assert train.annotations.categories == val.annotations.categories
    assert train.annotations.categories.names == ("cat", "dog", "emu")  # those of all splits
    assert train.annotations.boxes_xywh.tolist() == [[5, 6, 10, 20], [0, 0, 40, 30]]
    assert train.annotations.labels.tolist() == [1, 0]
    assert train.image(0).shape == (3, 30, 40)
    assert val.annotations.labels.tolist() == [2]


def test_voc_beside_its_pictures_is_read(tmp_path):
    for split in ("train", "valid"):
        picture(tmp_path / split / "x.png")
        voc_file(tmp_path / split / "x.xml", voc_object("cat", 1, 2, 3, 4), filename="x.png")
    found = find_splits(tmp_path)
    assert (found.format, sorted(found.splits)) == ("VOC", ["train", "val"])
    assert len(open_dataset(str(tmp_path), "val")) == 1


def test_what_only_sounds_like_a_split_hides_none(tmp_path):
    """A file, or a folder without boxes, whose name holds train or val."""
    for split in ("train", "valid"):
        voc_file(tmp_path / split / "x.xml", voc_object("cat", 1, 2, 3, 4), filename="x.png")
        picture(tmp_path / split / "x.png")
        for odd in (f"{split}.zip", f"{split}-old.zip"):
            text(tmp_path / odd, "")
        picture(tmp_path / f"{split}_masks" / "x.png")
    assert {split: [path.parent.name for path in files] for split, files in find_voc(tmp_path).items()} == {
        "train": ["train"],
        "val": ["valid"],
    }
    voc_file(tmp_path / "val" / "x.xml", voc_object("cat", 1, 2, 3, 4))
    with pytest.raises(InputError, match="both val and valid look like val; keep one"):
        open_dataset(str(tmp_path), "train")
    assert any("both val and valid look like val" in finding.text for finding in diagnose(tmp_path).findings)


def test_names_in_voc_lists_may_have_spaces_and_the_list_a_mark_at_its_head(voc):
    voc_file(voc / "Annotations" / "my photo 1.xml", voc_object("cat", 1, 2, 3, 4))
    picture(voc / "JPEGImages" / "my photo 1.jpg")
    (voc / "ImageSets" / "Main" / "train.txt").write_text("a -1\nmy photo 1\n", encoding="utf-8-sig")
    assert open_dataset(str(voc), "train").annotations.file_names.tolist() == [
        "JPEGImages/a.jpg",
        "JPEGImages/my photo 1.jpg",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", r"a\.xml: not XML .*line 1"),
        ("<!DOCTYPE x [<!ENTITY y 'z'>]><annotation/>", r"a\.xml: it defines a document type"),
        ("<annotation><size><width>40</width></size></annotation>", r"a\.xml: <size> has no <height>"),
        (
            "<annotation><size><width>0</width><height>9</height></size></annotation>",
            r"a\.xml: <size> says 0 × 9 pixels",
        ),
        (
            "<annotation><filename>../b.jpg</filename><size><width>4</width><height>9</height></size></annotation>",
            r"a\.xml: <filename>: \.\./b\.jpg leads out of",
        ),
    ],
)
def test_faulty_voc_files_are_named(voc, content, message):
    text(voc / "Annotations" / "a.xml", content)
    with pytest.raises(InputError, match=message):
        open_dataset(str(voc), "train")


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([voc_object("cat", 5, 6, 5, 9)], r"a\.xml, object 1 \(cat\): .*\[5\.0, 6\.0, 0\.0, 3\.0\] has no area"),
        ([voc_object("dog", 1, 1, 2, 2), voc_object("cat", 5, 6, 50, 9)], r"a\.xml, object 2 \(cat\): .* 10 pixels"),
        ([voc_object("cat", 5, "six", 7, 9)], r"a\.xml: <bndbox/ymin> is 'six'"),
        ([voc_object("", 5, 6, 7, 9)], r"a\.xml: <object> has no <name>"),
    ],
)
def test_faulty_voc_boxes_are_named(voc, objects, message):
    voc_file(voc / "Annotations" / "a.xml", *objects)
    with pytest.raises(InputError, match=message):
        open_dataset(str(voc), "train")


def test_missing_voc_files_are_named(voc):
    (voc / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"a\.xml: its picture a\.jpg is in none of .*JPEGImages"):
        open_dataset(str(voc), "train")
    text(voc / "ImageSets" / "Main" / "train.txt", "a\nzebra\n")
    with pytest.raises(InputError, match=r"train\.txt: 1 of 2 names have no file .*zebra"):
        open_dataset(str(voc), "train")


def test_a_voc_list_without_names_is_refused_or_no_split(voc):
    for name in ("val", "test"):
        text(voc / "ImageSets" / "Main" / f"{name}.txt", "\n")
    assert list(find_splits(voc).splits) == ["train"]
    text(voc / "ImageSets" / "Main" / "train.txt", "")
    with pytest.raises(InputError, match=r"train\.txt: no name in it; list the training pictures, or take"):
        open_dataset(str(voc), "train")


def test_a_voc_list_of_train_and_val_is_train_where_there_is_no_other(voc):
    def ids(split):
        return open_dataset(str(voc), split).annotations.file_names.tolist()

    both = text(voc / "ImageSets" / "Main" / "trainval.txt", "nobody looks at it where there is a train.txt\n")
    assert ids("train") == ["JPEGImages/a.jpg"]  # train.txt counts
    (both.parent / "train.txt").unlink()
    text(both, "b\n")
    with pytest.raises(InputError, match=r"lists no picture that val\.txt does not list as well"):
        ids("train")
    text(both, "a\nb\n")
    assert (ids("train"), ids("val")) == (["JPEGImages/a.jpg"], ["JPEGImages/b.jpg"])
    (both.parent / "val.txt").rename(both.parent / "test.txt")
    assert (ids("train"), ids("test")) == (["JPEGImages/a.jpg", "JPEGImages/b.jpg"], ["JPEGImages/b.jpg"])
    text(both, "a\n")
    (both.parent / "test.txt").unlink()
    assert ids("train") == ["JPEGImages/a.jpg"], "what no list names is for no split"


def test_bad_voc_boxes_can_be_dropped(voc):
    voc_file(voc / "Annotations" / "a.xml", voc_object("cat", 5, 6, 5, 9), voc_object("dog", 1, 1, 2, 2))
    annotations = open_dataset(str(voc), "train", "drop").annotations
    assert annotations.boxes_xywh.tolist() == [[1, 1, 1, 1]]
    assert annotations.mended == "of 2 boxes, 1 left out and 0 cut at the picture's edge"


def test_yolo_is_read(yolo):
    assert find_splits(yolo).format == "YOLO"
    train = open_dataset(str(yolo), "train").annotations
    assert train.categories.names == ("cat", "dog")
    assert train.categories.ids == (0, 1)
    assert train.boxes_xywh.tolist() == [[5, 9, 10, 12], [0, 0, 40, 30]]
    assert train.objects_per_image().tolist() == [2, 0]  # a picture without a label file holds nothing
    assert train.file_names.tolist() == ["a.jpg", "b.jpg"]
    assert open_dataset(str(yolo / "data.yaml"), "val").image(0).shape == (3, 30, 40)


def test_yolo_layouts_are_found(yolo):
    text(yolo / "train.txt", "./images/train/b.jpg\n./images/train/a.jpg\n")
    text(yolo / "data.yaml", f"path: {yolo}\ntrain: train.txt\nval: [images/val]\nnames: {{0: cat, 7: dog, 1: emu}}\n")
    train = open_dataset(str(yolo), "train").annotations
    assert train.categories.ids == (0, 1, 7)
    assert train.file_names.tolist() == ["b.jpg", "a.jpg"]
    roboflow = text(yolo / "data.yaml", "train: ../images/train\nval: ../images/val\nnames: [cat, dog]\n")
    assert len(open_dataset(str(roboflow), "train")) == 2


def test_a_polygon_becomes_the_box_it_spans(yolo):
    text(yolo / "labels" / "train" / "a.txt", "0 0.25 0.5 0.5 0.1 0.75 0.9\n")
    assert open_dataset(str(yolo), "train").annotations.boxes_xywh.tolist() == [[10, 3, 20, 24]]


def test_a_turned_photo_has_its_upright_size(yolo):
    exif = Image.Exif()
    exif[274] = 6
    picture(yolo / "images" / "train" / "a.jpg", exif=exif)
    train = open_dataset(str(yolo), "train")
    assert train.annotations.sizes[0].tolist() == [40, 30]
    assert train.image(0).shape == (3, 40, 30)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", r"a\.txt, line 1: 3 numbers after the class"),
        ("0 a b c d", r"a\.txt, line 1: '0 a b c d'; expected a class number"),
        ("5 0.5 0.5 0.1 0.1", r"a\.txt, line 1: class 5 is not among the names .*0 cat, 1 dog"),
        ("0 0.5 0.5 0 0.1", r"a\.txt, line 1: .* has no area"),
        ("0 50 50 10 10", r"a\.txt, line 1: .* pixels outside the 40 × 30 picture"),
    ],
)
def test_faulty_yolo_lines_are_named(yolo, line, message):
    text(yolo / "labels" / "train" / "a.txt", line)
    with pytest.raises(InputError, match=message):
        open_dataset(str(yolo), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [", r"data\.yaml: not a readable YAML text"),
        ("- cat", r"data\.yaml: expected lines such as"),
        ("names: [cat]", r"data\.yaml: it names no split"),
        ("train: nowhere\nnames: [cat]", r"data\.yaml: nowhere is neither of"),
        ("train: images/train\nnames: cat", r"data\.yaml: names is 'cat'; expected a list"),
        ("train: images/train\nnames: [cat, dog]\nnc: 3", r"data\.yaml: nc is 3 but there are 2 names"),
        ("train: images/train\nnames: [cat, off]", r"data\.yaml: class 1 is called False: .*put quotes around"),
    ],
)
def test_faulty_yaml_is_named(yolo, content, message):
    text(yolo / "data.yaml", content)
    with pytest.raises(InputError, match=message):
        open_dataset(str(yolo), "train")


def test_places_in_a_yaml_may_be_absolute_and_relative_at_once(yolo, monkeypatch):
    monkeypatch.chdir(yolo.parent)
    text(yolo / "data.yaml", f"train: [images/train, {yolo / 'images' / 'val'}]\nnames: [cat, dog]\n")
    dataset = open_dataset(yolo.name, "train")
    assert dataset.annotations.file_names.tolist() == ["train/a.jpg", "train/b.jpg", "val/a.jpg", "val/b.jpg"]
    assert dataset.annotations.folder.resolve() == (yolo / "images").resolve()
    assert dataset.image(3).shape == (3, 30, 40)


def test_splits_of_other_categories_are_not_written_under_one_list_of_names(tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("val", ["dog"])):
        picture(tmp_path / split / "a.png")
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=3 - len(names))]
        box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}
        images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
        content = {"images": images, "annotations": [box], "categories": categories}
        text(tmp_path / "annotations" / f"{split}.json", json.dumps(content))
    splits = open_splits(str(tmp_path))
    with pytest.raises(InputError, match=r"train.*and.*val.*have different categories"):
        write_splits(splits, tmp_path / "yolo", "yolo")
    assert not (tmp_path / "yolo").exists()
    write_splits(splits, tmp_path / "voc", "voc")
    val = open_dataset(str(tmp_path / "voc"), "val").annotations
    assert [val.categories.names[label] for label in val.labels] == ["dog"]
    one = open_splits(str(tmp_path / "annotations" / "train.json"))
    assert list(one) == ["train"]
    assert one["train"].annotations.labels.tolist() == [1]


def test_a_split_without_any_label_file_is_refused(yolo):
    (yolo / "labels" / "train" / "a.txt").unlink()
    with pytest.raises(InputError, match=r"none of 2 pictures has a label file; that of .*labels/train/a\.txt"):
        open_dataset(str(yolo), "train")


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_what_is_written_in_any_form_is_read_again(tmp_path, form):
    before = open_splits("generated:digits?train=5&val=3&size=64&objects=1-3")
    write_splits(before, tmp_path / form, form)
    assert find_splits(tmp_path / form).format == form.upper()
    for split, dataset in before.items():
        again = open_dataset(str(tmp_path / form), split)
        one, two = dataset.annotations, again.annotations
        assert np.allclose(one.boxes_xywh, two.boxes_xywh, rtol=0, atol=1e-9)
        assert one.objects_per_image().tolist() == two.objects_per_image().tolist()
        names = [[each.categories.names[label] for label in each.labels] for each in (one, two)]
        assert names[0] == names[1]
        assert all(torch.equal(dataset.image(i), again.image(i)) for i in range(len(dataset)))


def test_a_picture_is_copied_byte_by_byte_and_the_source_is_left_alone(yolo):
    before = {path: path.read_bytes() for path in yolo.rglob("*") if path.is_file()}
    write_splits(open_splits(str(yolo)), yolo / "out", "coco")
    assert (yolo / "out" / "train" / "a.jpg").read_bytes() == before[yolo / "images" / "train" / "a.jpg"]
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(InputError, match="not empty; choose a new folder"):
        write_splits(open_splits(str(yolo)), yolo / "out", "coco")


def test_a_set_is_divided_into_three():
    whole = open_dataset("generated:digits?train=20&val=3&size=64&objects=1-3", "train")
    parts = divide(whole, 0.2, 0.1, seed=3)
    assert {split: len(part) for split, part in parts.items()} == {"train": 14, "val": 4, "test": 2}
    ids = [number for part in parts.values() for number in part.annotations.image_ids.tolist()]
    assert sorted(ids) == whole.annotations.image_ids.tolist()
    with pytest.raises(InputError, match=r"--val 0\.8 --test 0\.4"):
        divide(whole, 0.8, 0.4, seed=3)


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_boxes_of_two_pictures_never_land_in_one_file(yolo, tmp_path, form):
    picture(yolo / "images" / "train" / "a.png")
    with pytest.raises(InputError, match=r"a\.jpg and a\.png would share one file of boxes"):
        write_splits(open_splits(str(yolo)), tmp_path / "new", form)
    assert not (tmp_path / "new").exists()


def test_a_picture_listed_twice_is_refused(yolo):
    """Set aside at random, it would be in both halves."""
    text(yolo / "list.txt", "images/train/a.jpg\nimages/train/a.jpg\n")
    text(yolo / "data.yaml", "train: list.txt\nnames: [cat, dog]\n")
    with pytest.raises(InputError, match=r"the picture .*a\.jpg is there twice: .*; list it once"):
        open_dataset(str(yolo), "train")


def test_files_of_voc_that_name_one_picture_are_refused(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.jpg")
        box = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        size = "<size><width>40</width><height>30</height></size>"
        thing = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
        text(tmp_path / f"{name}.xml", f"<annotation><filename>a.jpg</filename>{size}{thing}</annotation>")
    with pytest.raises(InputError, match=r"a\.jpg is there twice: a\.xml and b\.xml; correct <filename>"):
        open_dataset(str(tmp_path), "train")


@pytest.mark.parametrize("shape", ["[2, 2]", "[2, 3]"])
def test_key_points_of_poses_are_passed_over(yolo, shape):
    more = " 0.45" * (4 if shape == "[2, 2]" else 6)
    text(yolo / "data.yaml", f"train: images/train\nnames: [cat, dog]\nkpt_shape: {shape}\n")
    text(yolo / "labels" / "train" / "a.txt", f"1 0.5 0.5 0.2 0.4{more}\n")
    boxes = open_dataset(str(yolo), "train").annotations.boxes_xywh
    assert np.allclose(boxes, [[16, 9, 8, 12]])
    text(yolo / "labels" / "train" / "a.txt", "1 0.5 0.5 0.2 0.4 0.1 0.1\n")
    with pytest.raises(InputError, match=r"a\.txt, line 1: 6 numbers after the class; expected x y width height and"):
        open_dataset(str(yolo), "train")
    text(yolo / "data.yaml", "train: images/train\nnames: [cat, dog]\nkpt_shape: 17\n")
    with pytest.raises(InputError, match=r"kpt_shape is 17; expected \[points, 2 or 3 numbers of each\]"):
        open_dataset(str(yolo), "train")


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "@eaDir"])
def test_folders_of_programs_hold_no_pictures(yolo, hidden):
    before = len(open_dataset(str(yolo), "train"))
    picture(yolo / "images" / "train" / hidden / "a.jpg")
    assert len(open_dataset(str(yolo), "train")) == before


def test_names_with_a_folder_images_come_back(tmp_path):
    picture(tmp_path / "coco" / "train" / "images" / "a.png")
    entry = {"id": 1, "file_name": "images/a.png", "width": 40, "height": 30}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    content = {"images": [entry], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    text(tmp_path / "coco" / "annotations" / "train.json", json.dumps(content))
    write_splits(open_splits(str(tmp_path / "coco")), tmp_path / "new", "yolo")
    assert np.allclose(open_dataset(str(tmp_path / "new"), "train").annotations.boxes_xywh, [[1, 2, 3, 4]])


def test_crowds_cannot_be_said_in_yolo(yolo, tmp_path):
    train = open_splits(str(yolo))["train"]
    crowd = np.ones_like(train.annotations.crowd)
    crowded = replace(train, annotations=replace(train.annotations, crowd=crowd))
    with pytest.raises(InputError, match="2 crowd boxes cannot be said in yolo"):
        write_splits({"train": crowded}, tmp_path / "new", "yolo")


def test_a_sheet_shows_boxes(voc):
    sheet = draw_sheet(open_dataset(str(voc), "train"), 5, seed=0)
    assert sheet.size[0] == 336
    assert len(sheet.getcolors(100_000)) > 3  # black picture, grey paper, boxes


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"BCCD is not at {BCCD}")
def test_bccd_is_the_same_from_its_voc_and_its_coco_files(tmp_path):
    """The two known boxes without area aside, which the source's own XML files have."""
    (tmp_path / "JPEGImages").mkdir()
    for name in ("Annotations", "ImageSets"):
        shutil.copytree(BCCD / "voc" / name, tmp_path / name)
    for split in ("train", "val", "test"):
        for path in (BCCD / split).glob("*.jpg"):
            shutil.copyfile(path, tmp_path / "JPEGImages" / path.name)
    refused = []
    for split in ("train", "val", "test"):
        coco = open_dataset(str(BCCD), split).annotations
        try:
            open_dataset(str(tmp_path), split)
        except InputError as error:
            refused.append(str(error))
        voc = open_dataset(str(tmp_path), split, "drop").annotations
        mine = {Path(name).name: i for i, name in enumerate(voc.file_names)}
        assert sorted(mine) == sorted(coco.file_names.tolist())
        for index, name in enumerate(coco.file_names):
            there, here = coco.rows(index), voc.rows(mine[name])
            assert np.array_equal(coco.boxes_xywh[there], voc.boxes_xywh[here])
            names = [
                [each.categories.names[label] for label in each.labels[rows]]
                for each, rows in ((coco, there), (voc, here))
            ]
            assert names[0] == names[1]
    assert "BloodImage_00338" in "".join(refused)
    assert "BloodImage_00343" in "".join(refused)
    assert sum(message.count("has no area") for message in refused) == 2
