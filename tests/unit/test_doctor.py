"""The doctor: every planted fault is found, with its file, id and value; sound sets and pictures are left in peace."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lucidetr.data.doctor import diagnose
from lucidetr.data.export import open_splits, write_splits

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


def noise(seed: int, height: int = 64, width: int = 80) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def plant_sound(folder: Path) -> Path:
    """Write a COCO set of two splits that has nothing wrong but its size."""
    for number, split in enumerate(("train", "val")):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range((20, 5)[number]):
            noise(100 * number + i).save(folder / split / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{i}.png", "width": 80, "height": 64})
            annotations.append({"id": 2 * i + 1, "image_id": i + 1, "category_id": 1, "bbox": [4, 5, 30, 20 + i]})
            annotations.append({"id": 2 * i + 2, "image_id": i + 1, "category_id": 2, "bbox": [40, 8, 20 + i, 30]})
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        write(folder, split, {"images": images, "annotations": annotations, "categories": categories})
    return folder


def read(folder: Path, split: str = "train") -> dict:
    return json.loads((folder / "annotations" / f"{split}.json").read_text())


def write(folder: Path, split: str, content: object) -> None:
    path = folder / "annotations" / f"{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def changed(key: str, index: int, **values):
    """Return a plant that changes fields of one entry of train.json; None takes a field away."""

    def plant(folder: Path) -> None:
        content = read(folder)
        entry = content[key][index]
        for name, value in values.items():
            if value is None:
                del entry[name]
            else:
                entry[name] = value
        write(folder, "train", content)

    return plant


def entry(key: str, value: object):
    def plant(folder: Path) -> None:
        content = read(folder)
        content[key].append(value)
        write(folder, "train", content)

    return plant


def whole(text: str):
    return lambda folder: write(folder, "train", text)


def picture(save, name: str = "3.png"):
    """Return a plant that overwrites one training picture."""
    return lambda folder: save(folder / "train" / name)


def save_as(mode: str, height: int = 64, width: int = 80, **options):
    def save(path: Path) -> None:
        image = noise(7, height, width)
        if mode in ("I;16", "I", "F"):
            image = Image.fromarray(
                np.asarray(image.convert("L")).astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
            )
        else:
            image = image.convert(mode)
        form = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
        image.save(path, format=form, **options)

    return save


def bright(path: Path) -> None:
    Image.fromarray(np.asarray(noise(7, 64, 80).convert("L")).astype("uint16") * 257).save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    noise(7).save(path, format="JPEG", exif=exif)


def frames(path: Path) -> None:
    noise(7).save(path, format="GIF", save_all=True, append_images=[noise(8)])


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path, format="PNG")


def copy_into_val(folder: Path) -> None:
    (folder / "val" / "3.png").write_bytes((folder / "train" / "3.png").read_bytes())


def brighter_into_val(folder: Path) -> None:
    pixels = np.asarray(Image.open(folder / "train" / "3.png")).astype(int)
    Image.fromarray((pixels * 0.9 + 10).astype(np.uint8)).save(folder / "val" / "3.png")


def boxes(function):
    def plant(folder: Path) -> None:
        content = read(folder)
        for annotation in content["annotations"]:
            annotation["bbox"] = function(annotation["bbox"])
        write(folder, "train", content)

    return plant


def many(folder: Path) -> None:
    content = read(folder)
    content["annotations"] += [
        {"id": 1000 + i, "image_id": 1, "category_id": 1, "bbox": [i / 4, i / 4, 20, 20]} for i in range(101)
    ]
    write(folder, "train", content)


def keep_objects(few: int):
    def plant(folder: Path) -> None:
        content = read(folder)
        content["annotations"] = content["annotations"][:few]
        write(folder, "train", content)

    return plant


def other_categories(folder: Path) -> None:
    content = read(folder, "val")
    content["categories"][1]["name"] = "wolf"
    write(folder, "val", content)


def no_dogs(folder: Path) -> None:
    content = read(folder)
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] == 1]
    write(folder, "train", content)


def imbalanced(folder: Path) -> None:
    content = read(folder)
    for each in content["annotations"][1:]:
        each["category_id"] = 1
    content["annotations"][0]["category_id"] = 2
    content["annotations"] += [
        {"id": 500 + i, "image_id": 1 + i % 20, "category_id": 1, "bbox": [1 + i / 5, 1, 9, 9]} for i in range(20)
    ]
    write(folder, "train", content)


def few(folder: Path) -> None:
    content = read(folder)
    content["images"] = content["images"][:5]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] <= 5]
    write(folder, "train", content)


COCO = {
    "json": (whole('{"images": ['), r"train\.json: not JSON \(line 1, column \d+"),
    "json-constant": (lambda f: write(f, "train", json.dumps(read(f)).replace("[4, 5", "[NaN, 5", 1)), "holds NaN"),
    "json-list-twice": (
        lambda f: write(f, "train", json.dumps(read(f)).replace("{", '{"annotations": [], ', 1)),
        "'annotations' stands twice in an object",
    ),
    "json-key-twice": (
        lambda f: write(
            f, "train", json.dumps(read(f)).replace('"bbox": [4, 5', '"bbox": [1, 2, 3, 4], "bbox": [4, 5', 1)
        ),
        r"'bbox' stands twice in an object, and only the last of both counts; .* \(.*id 1",
    ),
    "json-text": (lambda f: (f / "annotations" / "train.json").write_bytes(b"\xff\xfe{\x00"), "not a readable JSON"),
    "coco-lists": (whole('{"images": [], "annotations": []}'), "has no list categories"),
    "no-images": (
        whole('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'),
        "images is empty",
    ),
    "no-categories": (lambda f: write(f, "train", read(f) | {"categories": []}), "categories is empty"),
    "image-no-object": (entry("images", "x.png"), r"images\[20\] is 'x\.png'"),
    "image-id": (changed("images", 3, id="four"), r"images\[3\] has the id 'four'"),
    "image-id-twice": (changed("images", 3, id=1), "image 1: its id is used more than once"),
    "image-name": (changed("images", 3, file_name=""), "image 4 has the file_name ''"),
    "path-leaves": (changed("images", 3, file_name="../val/3.png"), r"image 4: \.\./val/3\.png leads out of"),
    "image-listed-twice": (changed("images", 3, file_name="2.png"), r"image 4 and image 3 are the same file 2\.png"),
    "image-size": (changed("images", 3, width=0), r"image 4 \(3\.png\): width 0 and height 64"),
    "image-missing": (lambda f: (f / "train" / "3.png").unlink(), r"image 4 \(3\.png\): .*3\.png does not exist"),
    "image-empty": (picture(lambda path: path.write_bytes(b"")), r"3\.png: a file of 0 bytes"),
    "image-format": (picture(lambda path: path.write_bytes(b"nothing")), r"3\.png: not an image"),
    "image-damaged": (picture(lambda path: path.write_bytes(path.read_bytes()[:3000])), r"3\.png: damaged .* bytes"),
    "image-huge": (picture(bomb), r"3\.png: more than 100,000,000 pixels"),
    "size-differs": (changed("images", 3, width=81), r"stated as 81 × 64 but .*3\.png is 80 × 64"),
    "size-turned": (picture(turned), r"stated as 80 × 64, its pixels before the EXIF note .* 64 × 80"),
    "mode-16-bit": (picture(bright), r"3\.png: 16-bit grey, read as brightness / 257"),
    "mode-16-bit-dark": (picture(save_as("I;16")), r"3\.png: 16-bit grey whose brightest pixel is \d+, read as "),
    "mode-32-bit": (picture(save_as("F")), r"3\.png: 32-bit pixels \(F\)"),
    "mode-cmyk": (picture(save_as("CMYK")), r"3\.png: CMYK"),
    "mode-alpha": (picture(save_as("RGBA")), r"3\.png: transparent pixels"),
    "frames": (picture(frames), r"3\.png: has 2 frames"),
    "image-tiny": (picture(save_as("RGB", 8, 10)), r"3\.png: 10 × 8 pixels; there is little to see"),
    "image-long": (picture(save_as("RGB", 40, 500)), r"3\.png: 500 × 40 pixels; cut such strips"),
    "annotation-no-object": (entry("annotations", 5), r"annotations\[40\] is 5"),
    "annotation-id": (changed("annotations", 3, id=None), r"annotations\[3\] has the id None"),
    "annotation-id-twice": (changed("annotations", 3, id=1), "annotation 1: its id is used more than once"),
    "annotation-id-zero": (changed("annotations", 3, id=0), "annotation 0: pycocotools takes the id 0"),
    "annotation-image": (changed("annotations", 3, image_id=99), "annotation 4: image_id 99 is no image"),
    "annotation-category": (changed("annotations", 3, category_id=9), "annotation 4: category_id 9 is no category"),
    "category-id": (changed("categories", 1, id="two"), r"categories\[1\] has the id 'two'"),
    "category-id-twice": (changed("categories", 1, id=1), "category id 1 stands for cat and dog"),
    "category-name": (changed("categories", 1, name=" "), "category 2 has the name ' '"),
    "category-name-twice": (changed("categories", 1, name="cat"), "two categories are called 'cat'"),
    "category-names-alike": (changed("categories", 1, name="Cat "), "the categories 'cat', 'Cat ' differ in case"),
    "box-numbers": (changed("annotations", 3, bbox=[1, 2, "3", 4]), r"annotation 4: bbox \[1, 2, '3', 4\]"),
    "box-not-finite": (changed("annotations", 3, bbox=[1, 2, 1e999, 4]), r"annotation 4: box \[1, 2, nan, 4\]"),
    "box-no-area": (changed("annotations", 3, bbox=[1, 2, 0, 4]), r"annotation 4: box \[1, 2, 0, 4\] has no area"),
    "box-negative": (
        changed("annotations", 3, bbox=[9, 2, -3, 4]),
        r"annotation 4: box \[9, 2, -3, 4\] has a neg",
    ),
    "box-outside": (changed("annotations", 3, bbox=[90, 2, 9, 4]), r"annotation 4: box \[90, 2, 9, 4\] lies outside"),
    "box-over-edge": (
        changed("annotations", 3, bbox=[70, 2, 15, 4]),
        r"annotation 4: .* reaches 5 pixels over its",
    ),
    "box-tiny": (changed("annotations", 3, bbox=[7, 2, 1.5, 4]), r"annotation 4: box \[7, 2, 1\.5, 4\] is less than 2"),
    "box-twice": (
        lambda f: entry("annotations", read(f)["annotations"][3] | {"id": 77})(f),
        "annotation 77: the same box .* of dog as .*annotation 4",
    ),
    "box-whole-picture": (changed("annotations", 3, bbox=[0, 0, 80, 64]), "annotation 4: .* is the whole picture"),
    "boxes-are-corners": (
        boxes(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]),
        "all boxes make sense as .left, top, right",
    ),
    "boxes-are-shares": (boxes(lambda b: [v / 80 for v in b]), "all boxes are below 1"),
    "area": (changed("annotations", 3, area=-5), "annotation 4: area -5"),
    "crowd": (changed("annotations", 3, iscrowd=2), "annotation 4: iscrowd 2"),
    "many-empty": (keep_objects(8), "train: 16 of 20 pictures hold no object"),
    "category-unused": (no_dogs, "train: no object of dog"),
    "category-only-outside-train": (no_dogs, "val has objects of dog, train has none"),
    "imbalance": (imbalanced, "train: 59 objects of cat but 1 of dog"),
    "few-images": (few, "train: 5 pictures"),
    "more-objects-than-queries": (many, "up to 103 objects in a picture, but 100 queries"),
    "categories-differ": (other_categories, "val and train have other categories: 2 dog, 2 wolf"),
    "no-validation": (lambda f: (f / "annotations" / "val.json").unlink(), "no validation split"),
    "no-training": (
        lambda f: (f / "annotations" / "train.json").rename(f / "annotations" / "test.json"),
        "no training split, only test, val",
    ),
    "image-twice": (
        lambda f: (f / "train" / "4.png").write_bytes((f / "train" / "3.png").read_bytes()),
        r"4\.png is the same picture as .*3\.png",
    ),
    "splits-share-image": (copy_into_val, r"val/3\.png \(val\) is the same picture as .*train/3\.png \(train\)"),
    "splits-look-alike": (brighter_into_val, r"train/3\.png \(train\) looks like .*val/3\.png \(val\)"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return plant_sound(tmp_path_factory.mktemp("sound"))


def copy_of(folder: Path, target: Path) -> Path:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            new = target / path.relative_to(folder)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(path.read_bytes())
    return target


def test_every_key_that_stands_twice_is_told(sound, tmp_path):
    folder = copy_of(sound, tmp_path / "set")
    content = json.dumps(read(folder)).replace(
        "{", '{"info": {"images": 1, "images": 2}, "info": {}, "images": [], ', 1
    )
    write(folder, "train", content)
    found = [(f.kind, f.text.split("'")[1]) for f in diagnose(folder).findings if f.kind.endswith("-twice")]
    assert found == [("json-key-twice", "images"), ("json-key-twice", "info"), ("json-list-twice", "images")]


def test_a_sound_set_is_left_in_peace(sound):
    report = diagnose(sound)
    assert report.format == "COCO"
    assert report.findings == []
    train = next(split for split in report.splits if split.split == "train")
    assert (train.images, train.objects, train.objects_per_image) == (20, 40, (2, 2.0, 2))
    assert train.per_category == {"cat": 20, "dog": 20}


@pytest.mark.parametrize("kind", COCO)
def test_a_planted_fault_is_found(sound, tmp_path, kind):
    plant, message = COCO[kind]
    folder = copy_of(sound, tmp_path / "set")
    plant(folder)
    before = tree(folder)
    findings = diagnose(folder, num_queries=100).findings
    mine = [finding.text for finding in findings if finding.kind == kind]
    assert len(mine) == 1, [finding for finding in findings if finding.kind not in ("category-unused",)]
    assert re.search(message, mine[0]), mine[0]
    assert tree(folder) == before


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def in_form(form: str):
    """Return a sound set in another form."""

    def make(folder: Path) -> Path:
        splits = open_splits("generated:digits?train=20&val=4&size=64&objects=2-3")
        write_splits(splits, folder, form)
        return folder

    return make


def line(text: str):
    return lambda folder: (folder / "labels" / "train" / "000001.txt").write_text(text)


def yaml_line(old: str, new: str):
    def plant(folder: Path) -> None:
        path = folder / "data.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return plant


def listed_twice(folder: Path) -> None:
    pictures = sorted((folder / "images" / "train").iterdir())
    (folder / "train.txt").write_text("".join(f"images/train/{path.name}\n" for path in [*pictures, pictures[0]]))
    yaml_line("train: images/train", "train: train.txt")(folder)


YOLO = {
    "label-line": (line("0 0.5 0.5 0.1"), r"000001\.txt, line 1: 3 numbers after the class"),
    "label-class": (line("12 0.5 0.5 0.1 0.1"), r"000001\.txt, line 1: class 12 is not among the names 0 … 9"),
    "label-pixels": (line("1 30 20 10 10"), r"000001\.txt, line 1: '1 30 20 10 10' looks like pixels"),
    "label-text": (lambda f: (f / "labels/train/000001.txt").write_bytes(b"\xff\xfe\x00"), r"000001\.txt: not a text"),
    "label-missing": (lambda f: (f / "labels/train/000001.txt").unlink(), r"1 pictures have no label file, .*000001"),
    "label-orphan": (lambda f: (f / "labels/train/zzz.txt").write_text(""), r"1 label files .* zzz\.txt"),
    "no-labels": (lambda f: [p.unlink() for p in (f / "labels/train").iterdir()], "none of 20 pictures has a label"),
    "yaml": (yaml_line("nc: 10", "nc: 11"), r"data\.yaml: nc is 11 but there are 10 names"),
    "box-no-area": (line("0 0.5 0.5 0 0.1"), r"000001\.txt, line 1: box .* has no area"),
    "image-listed-twice": (listed_twice, r"000001\.png is listed twice in train"),
}


def xml(old: str, new: str):
    def plant(folder: Path) -> None:
        path = folder / "train" / "000001.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return plant


def other_filename(folder: Path) -> None:
    (folder / "train" / "9.png").write_bytes((folder / "train" / "000003.png").read_bytes())
    xml("<filename>000001.png", "<filename>9.png")(folder)


VOC = {
    "voc-file": (xml("<annotation>", "<annotatio>"), r"000001\.xml: not XML"),
    "voc-object": (xml("<name>", "<naem></naem><nam>"), r"000001\.xml"),
    "image-size": (xml("<width>64", "<width>0"), r"000001\.xml: <size> says 0 × 64"),
    "image-listed-twice": (
        xml("<filename>000001", "<filename>000002"),
        r"000002\.xml: its picture .*000002\.png is that of 000001\.xml, too",
    ),
    "filename-other": (other_filename, r"000001\.xml: <filename> says 9\.png, though 000001\.png is there"),
    "size-differs": (xml("<width>64", "<width>65"), r"stated as 65 × 64 but .*000001\.png is 64 × 64"),
    "box-reversed": (
        lambda f: (f / "train" / "000001.xml").write_text(
            "<annotation><filename>000001.png</filename><size><width>64</width><height>64</height></size>"
            "<object><name>3</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>5</xmax><ymax>20</ymax></bndbox></object>"
            "</annotation>"
        ),
        r"000001\.xml, object 1: corners 9 9 5 20 are exchanged",
    ),
}


@pytest.mark.parametrize(
    ("form", "kind"), [("yolo", kind) for kind in YOLO] + [("voc", kind) for kind in VOC if kind != "voc-object"]
)
def test_a_fault_of_another_form_is_found(tmp_path, form, kind):
    plant, message = {"yolo": YOLO, "voc": VOC}[form][kind]
    folder = in_form(form)(tmp_path / "set")
    odd = {"category-unused", "category-only-outside-train", "box-tiny", "imbalance"}
    assert {finding.kind for finding in diagnose(folder).findings} <= odd
    plant(folder)
    mine = [finding.text for finding in diagnose(folder).findings if finding.kind == kind]
    assert len(mine) == 1
    assert re.search(message, mine[0]), mine[0]


def test_what_the_disk_refuses_is_named_and_the_rest_is_looked_at(sound, tmp_path, monkeypatch):
    """Two pictures and a file of annotations without rights; root may read all, so the disk is played."""
    folder = copy_of(sound, tmp_path / "set")
    changed("annotations", 5, bbox=[1, 2, 0, 4])(folder)
    forbidden, real_bytes, real_text = (
        {folder / "train" / "3.png", folder / "train" / "4.png"},
        Path.read_bytes,
        Path.read_text,
    )

    def refuse(read):
        def reading(path, *args, **kwargs):
            if path in forbidden:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path, *args, **kwargs)

        return reading

    monkeypatch.setattr(Path, "read_bytes", refuse(real_bytes))
    monkeypatch.setattr(Path, "read_text", refuse(real_text))
    found = [(finding.kind, finding.text) for finding in diagnose(folder).findings if finding.severity == "error"]
    assert [kind for kind, _ in found].count("image-unreadable") == 2
    assert any(f"{folder}/train/3.png: cannot be read (Permission denied)" in text for _, text in found)
    assert any("annotation 6: box [1, 2, 0, 4] has no area" in text for _, text in found)
    forbidden.add(folder / "annotations" / "val.json")
    (kind,) = [finding.kind for finding in diagnose(folder).findings if "val.json" in finding.text]
    assert kind == "json-unreadable"


def test_more_than_sixty_kinds_are_planted():
    assert len(COCO) + len(YOLO) + len(VOC) >= 60


def test_the_verb_says_it_all_and_ends_with_1(sound, tmp_path):
    folder = copy_of(sound, tmp_path / "set")
    changed("annotations", 3, bbox=[1, 2, 0, 4])(folder)
    command = [sys.executable, "-m", "lucidetr", "doctor", str(folder), "--json", str(tmp_path / "report.json")]
    said = subprocess.run(
        [*command, "--sheet", str(tmp_path / "sheet.png")], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1, said.stderr
    assert "annotation 4: box [1, 2, 0, 4] has no area" in said.stdout
    assert "1 fault, 0 things that are odd" in said.stdout
    written = json.loads((tmp_path / "report.json").read_text())
    assert [finding["kind"] for finding in written["findings"]] == ["box-no-area"]
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"BCCD is not at {BCCD}")
def test_bccd_has_one_look_alike_and_its_voc_files_two_faults(tmp_path):
    """One slide of BCCD was photographed twice, and one photograph of it lies in train, the other in val."""
    findings = diagnose(BCCD, places="off").findings
    assert [finding.kind for finding in findings] == ["splits-look-alike"]
    assert "BloodImage_00038" in findings[0].text
    (tmp_path / "JPEGImages").mkdir()
    for name in ("Annotations", "ImageSets"):
        shutil.copytree(BCCD / "voc" / name, tmp_path / name)
    for path in BCCD.glob("*/*.jpg"):
        shutil.copyfile(path, tmp_path / "JPEGImages" / path.name)
    faults = [finding.text for finding in diagnose(tmp_path, places="off").findings if finding.severity == "error"]
    assert len(faults) == 2
    assert "BloodImage_00338.xml, object 13: box [504, 337, 0, 0] has no area" in "".join(faults)
    assert "BloodImage_00343.xml, object 4: box [181, 329, 0, 0] has no area" in "".join(faults)
