"""The COCO reader: every fault is named with file, id, value and fix; every known layout is found."""

import json

import numpy as np
import pytest
from PIL import Image

from lucidetr.data.coco import find_coco, read_coco, write_coco
from lucidetr.data.examine import examine
from lucidetr.data.raw import raw_coco
from lucidetr.data.splits import find_splits
from lucidetr.errors import InputError


def content(**changes):
    """Return a sound file of two images and three objects, with ids that have gaps."""
    base = {
        "images": [
            {"id": 11, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 5, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 3, "image_id": 5, "category_id": 9, "bbox": [1, 2, 10, 10.5], "area": 60.0, "iscrowd": 0},
            {"id": 0, "image_id": 11, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1},
            {"id": 8, "image_id": 11, "category_id": 2, "bbox": [5, 5, 6, 7]},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    return base | changes


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    return tmp_path


def write(folder, values, name="train.json"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_a_sound_file_keeps_the_users_ids_and_numbers(folder):
    read = read_coco(write(folder, content()), folder)
    assert read.categories.ids == (2, 9)
    assert read.categories.names == ("cat", "dog")
    assert read.image_ids.tolist() == [11, 5]
    assert read.annotation_ids.tolist() == [0, 8, 3]
    assert read.labels.tolist() == [0, 0, 1]
    assert read.boxes_xywh[2].tolist() == [1, 2, 10, 10.5]
    assert read.areas.tolist() == [1200, 42, 60]
    assert read.crowd.tolist() == [True, False, False]
    assert read.objects_per_image().tolist() == [1, 1]
    assert read.target(0).boxes_xyxy.tolist() == [[5, 5, 11, 12]]
    assert read.target(1).labels.tolist() == [1]


def test_what_is_written_is_read_again(folder, tmp_path):
    read = read_coco(write(folder, content()), folder)
    write_coco(read, tmp_path / "again.json")
    again = read_coco(tmp_path / "again.json", folder)
    assert again.to_coco() == read.to_coco()


def test_a_subset_keeps_each_images_objects(folder):
    read = read_coco(write(folder, content()), folder).subset(np.array([1]))
    assert read.image_ids.tolist() == [5]
    assert read.annotation_ids.tolist() == [3]
    assert len(read.target(0).labels) == 1


@pytest.mark.parametrize("stated", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}])
def test_a_size_that_is_not_stated_is_the_pictures_own(folder, stated):
    images = [{"id": 11, "file_name": "a.png"} | stated, {"id": 5, "file_name": "b.png", "width": 40, "height": 30}]
    path = write(folder, content(images=images))
    assert read_coco(path, folder).sizes.tolist() == [[30, 40], [30, 40]]
    assert not [finding for finding in examine([raw_coco("train", path)]).findings if "size" in finding.kind]


def test_images_without_boxes_are_legal(folder):
    read = read_coco(write(folder, content(annotations=[])), folder)
    assert len(read) == 2
    assert read.target(0).boxes_xyxy.shape == (0, 4)
    assert read.subset(np.array([0])).target(0).labels.shape == (0,)


ANNOTATION = {"id": 3, "image_id": 5, "category_id": 9, "bbox": [1, 2, 10, 10]}
IMAGE = {"id": 11, "file_name": "a.png", "width": 40, "height": 30}
FAULTS = {
    "not json": ("{", r"train.json: not JSON \(line 1, column 2"),
    "a list": ("[]", "not a COCO file: it has no list 'images'"),
    "no annotations": ({"images": [], "categories": []}, "it has no list 'annotations'"),
    "a nan": ('{"images": NaN}', "the value NaN"),
    "an image that is a number": (content(images=[3]), r"images\[0\] is 3"),
    "no images": (content(images=[], annotations=[]), "list of images is empty"),
    "no categories": (content(categories=[], annotations=[]), "list of categories is empty"),
    "a category without name": (content(categories=[{"id": 2}, {"id": 9, "name": "x"}]), "category 2 has no name"),
    "a name twice": (content(categories=[{"id": 2, "name": "x"}, {"id": 9, "name": "x"}]), "name 'x' is given twice"),
    "a category id twice": (content(categories=[{"id": 2, "name": "x"}, {"id": 2, "name": "y"}]), "id 2 is given"),
    "an image id twice": (content(images=[IMAGE, IMAGE]), "image ids used more than once: 11"),
    "an annotation id twice": (content(annotations=[ANNOTATION] * 2), "annotation ids used more than once: 3"),
    "a text as id": (content(images=[IMAGE | {"id": "11"}]), "id = '11'; expected an integer"),
    "an unknown image": (content(annotations=[ANNOTATION | {"image_id": 6}]), "annotation 3 has image_id 6"),
    "an unknown category": (content(annotations=[ANNOTATION | {"category_id": 1}]), "3 has category_id 1"),
    "a field missing": (content(annotations=[{"id": 1}]), "has no field 'image_id'"),
    "no box": (content(annotations=[ANNOTATION | {"bbox": [1, 2, 3]}]), r"annotation 3 has bbox \[1, 2, 3\]; expected"),
    "a missing file": (content(images=[IMAGE | {"file_name": "c.png"}], annotations=[]), "1 of 1 image files .* c.png"),
    "a way out": (content(images=[IMAGE | {"file_name": "../a.png"}]), "leads out of"),
    "an absolute path": (content(images=[IMAGE | {"file_name": "/etc/passwd"}]), "leads out of"),
    "a size of zero": (content(images=[IMAGE | {"height": 0}]), "image 11 has height × width 0 × 40"),
    "zero width": (
        content(annotations=[ANNOTATION | {"bbox": [1, 2, 0, 10]}]),
        r"annotation 3 in b.png: bbox \[1.0, 2.0, 0.0, 10.0\] has no area .*--bad-boxes drop",
    ),
    "negative height": (content(annotations=[ANNOTATION | {"bbox": [1, 2, 3, -1]}]), "has no area"),
    "outside": (
        content(annotations=[ANNOTATION | {"bbox": [30, 2, 20, 10]}]),
        "annotation 3 in b.png: .* reaches 10 pixels outside the 40 × 30 picture",
    ),
    "an area that is a text": (content(annotations=[ANNOTATION | {"area": "abc"}]), "annotation 3 has area 'abc'"),
    "an area below 0": (content(annotations=[ANNOTATION | {"area": -1}]), "annotation 3 has area -1"),
    "a crowd that is a text": (content(annotations=[ANNOTATION | {"iscrowd": "1"}]), "annotation 3 has iscrowd '1'"),
    "a crowd of two": (
        content(annotations=[ANNOTATION | {"iscrowd": 2}]),
        "annotation 3 has iscrowd 2; expected 0 or 1",
    ),
    "a file twice": (
        content(images=[IMAGE, IMAGE | {"id": 5}]),
        "images 11 and 5 are the same file a.png; keep one entry",
    ),
    "nothing left inside": (content(annotations=[ANNOTATION | {"bbox": [40, 2, 1.5, 10]}]), "has no area"),
    "corners": (
        content(annotations=[ANNOTATION | {"bbox": [20, 15, 38, 28]}]),
        r"fit as corners \[left, top, right, bottom\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(folder, fault):
    values, message = FAULTS[fault]
    with pytest.raises(InputError, match=message):
        read_coco(write(folder, values), folder)


def test_bad_boxes_can_be_dropped_or_cut(folder):
    boxes = [[1, 2, 0, 10], [30, 2, 20, 10], [50, 50, 5, 5], [1, 1, 5, 5]]
    annotations = [ANNOTATION | {"id": i, "bbox": box} for i, box in enumerate(boxes)]
    read = read_coco(write(folder, content(annotations=annotations)), folder, bad_boxes="drop")
    assert read.annotation_ids.tolist() == [1, 3]
    assert read.boxes_xywh.tolist() == [[30, 2, 10, 10], [1, 1, 5, 5]]
    assert read.areas.tolist() == [100, 25]
    assert read.mended == "of 4 boxes, 2 left out and 1 cut at the picture's edge"


def test_the_area_of_a_box_that_is_cut_is_that_of_what_is_left(folder):
    stated = ANNOTATION | {"bbox": [30, 2, 20, 10], "area": 180.0}
    assert read_coco(write(folder, content(annotations=[stated])), folder, bad_boxes="drop").areas.tolist() == [100]
    stated["area"] = 90.0  # a mask's, smaller than what is left of the box
    assert read_coco(write(folder, content(annotations=[stated])), folder, bad_boxes="drop").areas.tolist() == [90]


def test_rounding_over_the_edge_is_no_fault(folder):
    read = read_coco(write(folder, content(annotations=[ANNOTATION | {"bbox": [30, 2, 11.5, 10]}])), folder)
    assert read.boxes_xywh[0].tolist() == [30, 2, 11.5, 10]
    assert read.target(1).boxes_xyxy.tolist() == [[30, 2, 40, 12]]


LAYOUTS = {
    "coco": ({"train": ("annotations/instances_train2017.json", "train2017"),
              "val": ("annotations/instances_val2017.json", "val2017")}),
    "plain": ({"train": ("annotations/train.json", "train"), "val": ("annotations/val.json", "val"),
               "test": ("annotations/test.json", "test")}),
    "one image folder": ({"train": ("annotations/train.json", "images"), "val": ("annotations/val.json", "images")}),
    "folders in images": ({"train": ("train.json", "images/train"), "val": ("valid.json", "images/valid")}),
    "roboflow": ({"train": ("train/_annotations.coco.json", "train"),
                  "val": ("valid/_annotations.coco.json", "valid")}),
    "beside": ({"train": ("labels.json", ".")}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts_are_found(tmp_path, layout):
    for annotations, images in LAYOUTS[layout].values():
        (tmp_path / images).mkdir(parents=True, exist_ok=True)
        for name in ("a.png", "b.png"):
            Image.new("RGB", (40, 30)).save(tmp_path / images / name)
        write(tmp_path, content(), annotations)
    found = find_coco(tmp_path)
    assert found == {split: tmp_path / annotations for split, (annotations, _) in LAYOUTS[layout].items()}
    for split, (_, images) in LAYOUTS[layout].items():
        read = read_coco(found[split])
        assert (read.folder / "a.png").resolve() == (tmp_path / images / "a.png").resolve()


def test_captions_beside_instances_are_passed_over(folder):
    write(folder, content(), "annotations/instances_train2017.json")
    write(folder, content(), "annotations/captions_train2017.json")
    assert find_coco(folder)["train"].name == "instances_train2017.json"


def test_a_folder_that_cannot_be_understood_says_what_was_looked_for(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_splits(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no COCO json in .*no data.yaml .*no XML files"):
        find_splits(folder)
    write(folder, content(), "one.json")
    write(folder, content(), "two.json")
    with pytest.raises(InputError, match=r"none of one.json, two.json has train, val or test in its name"):
        find_coco(folder)
    write(folder, content(), "train_a.json")
    write(folder, content(), "train_b.json")
    with pytest.raises(InputError, match="more than one file for the split train"):
        find_coco(folder)


def test_images_that_are_nowhere_say_where_was_looked(tmp_path):
    path = write(tmp_path, content(), "annotations/train.json")
    with pytest.raises(InputError, match=r"its first image a.png is in none of .*annotations/train, .*"):
        read_coco(path)


def test_a_split_does_not_need_the_images_of_another(folder):
    for name in ("a.png", "b.png"):
        (folder / "val").mkdir(exist_ok=True)
        (folder / name).rename(folder / "val" / name)
    write(folder, content(), "annotations/train.json")
    write(folder, content(), "annotations/val.json")
    assert len(read_coco(find_coco(folder)["val"])) == 2
