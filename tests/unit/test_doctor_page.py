"""The doctor's page: planted faults with their pictures, names escaped, nothing from outside, nothing into the data."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lucidetr.data.doctor import diagnose
from lucidetr.data.doctor_page import MOST_PICTURES, box_shapes, worst_pictures, write_page
from surface_tools import lucidetr

EVIL = '<script>alert("x")</script>'


def plant(folder: Path, pictures: int = 4) -> Path:
    """Write a COCO set with a box over the edge in its first picture, a broken second one, and evil names."""
    random = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, pictures + 1):
        name = "<img src=x onerror=alert(1)> &.png" if i == 1 else f"{i}.png"
        Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / "train" / name)
        images.append({"id": i, "file_name": name, "width": 80, "height": 60})
        box = [70, 10, 20, 20] if i in (1, *range(5, pictures + 1)) else [10, 10, 20, 10 + i]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": box})
        annotations.append({"id": 1000 + i, "image_id": i, "category_id": 2, "bbox": [40, 10, 20, 10]})
    (folder / "train" / "2.png").write_bytes(b"no picture")
    categories = [{"id": 1, "name": EVIL}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


class Elements(HTMLParser):
    """Collect the elements of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_of_planted_faults(tmp_path):
    data, page = plant(tmp_path / "data"), tmp_path / "page.html"
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    said = lucidetr("doctor", data, "--html", page, status=1)
    assert f"page: {page}" in said
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert {tag for tag, _ in elements.found}.isdisjoint({"script", "link", "iframe", "object", "embed"})
    assert not [attributes for _, attributes in elements.found if any(name.startswith("on") for name in attributes)]
    assert not re.search(r"https?://|url\(|@import", text)
    assert EVIL in elements.text
    assert "annotation 1: box [70, 10, 20, 20] reaches 10 pixels over its 80 × 60 picture" in elements.text
    assert "2 faults" in elements.text
    pictures = [attributes for tag, attributes in elements.found if tag == "img"]
    assert [attributes["alt"] for attributes in pictures] == ["<img src=x onerror=alert(1)> &.png with its boxes"]
    assert elements.text.count("This picture cannot be read.") == 1
    head, data_uri = pictures[0]["src"].split(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data_uri))) as thumbnail:
        assert thumbnail.size == (80, 60)


def test_a_page_shows_no_more_than_24_pictures_and_faults_first(tmp_path):
    report = diagnose(plant(tmp_path / "data", pictures=40))
    shown = worst_pictures(report.raws, sorted(report.findings, key=lambda each: each.severity != "error"))
    assert len(shown) == MOST_PICTURES
    assert [finding.kind for finding in shown[0].findings] == ["image-format"]
    assert all("error" in {finding.severity for finding in each.findings} for each in shown)
    assert shown[0].uri is None
    assert all(each.uri for each in shown[1:])


def test_a_picture_is_shown_with_the_one_it_looks_like(tmp_path):
    data = plant(tmp_path / "data")
    (data / "valid").mkdir()
    pixels = np.asarray(Image.open(data / "train" / "3.png"))
    Image.fromarray(pixels).save(data / "valid" / "twin.png", compress_level=0)
    images = [{"id": 1, "file_name": "twin.png", "width": 80, "height": 60}]
    content = json.loads((data / "train" / "_annotations.coco.json").read_text())
    content |= {"images": images, "annotations": [content["annotations"][0] | {"bbox": [10, 10, 20, 20]}]}
    (data / "valid" / "_annotations.coco.json").write_text(json.dumps(content))
    report = diagnose(data)
    (finding,) = [each for each in report.findings if each.kind == "splits-look-alike"]
    (shown,) = worst_pictures(report.raws, [finding])
    assert {shown.path.name, shown.twin.path.name} == {"3.png", "twin.png"}
    write_page(report, tmp_path / "page.html")
    assert f"what it looks like, {shown.twin.path.name}" in (tmp_path / "page.html").read_text()


def test_box_shapes_are_counted(tmp_path):
    shares, sides, ratios = (bars for _, bars in box_shapes(diagnose(plant(tmp_path / "data")).raws))
    # sides: 20 (annotation 1), √(20 · 12), √(20 · 13), √(20 · 14), and √200 four times; of pictures of √4800 = 69.3
    assert {bar.name: bar.number for bar in shares if bar.number} == {"20% to 40%": 8}
    assert {bar.name: bar.number for bar in sides} == {"below 32": 8, "32 to 96": 0, "96 and more": 0}
    assert {bar.name: bar.number for bar in ratios if bar.number} == {"0.8 to 1.25": 1, "1.25 to 2": 3, "2 to 4": 4}


@pytest.mark.parametrize("option", ["--html", "--json", "--sheet"])
def test_nothing_is_written_into_the_data_set(tmp_path, option):
    data = plant(tmp_path / "data")
    said = lucidetr("doctor", data, option, data / "train" / "report.png", status=2)
    assert "lies in the data set" in said
    assert not (data / "train" / "report.png").exists()


@pytest.mark.parametrize(("verb", "options"), [("sample", ()), ("augment", ("lucid-xs", "--augmentation.flip", 0.5))])
def test_no_sheet_takes_the_place_of_a_picture(tmp_path, verb, options):
    data = plant(tmp_path / "data")
    picture = sorted((data / "train").glob("*.png"))[0]
    before = picture.read_bytes()
    where = (data, picture) if verb == "sample" else (*options, "--data", data, "--out", picture)
    assert "lies in the data set" in lucidetr("data", verb, *where, status=2)
    assert picture.read_bytes() == before


def test_what_is_drawn_may_lie_beside_a_coco_file_but_not_on_it_or_its_pictures(tmp_path):
    data = plant(tmp_path / "data") / "train" / "_annotations.coco.json"
    before = {file: file.read_bytes() for file in data.parent.iterdir()}
    beside = data.with_name("page.html")
    for _ in range(2):  # what was drawn may be drawn again
        lucidetr("doctor", data, "--html", beside, status=1)
    beside.unlink()
    for option in (("--json", data), ("--sheet", data.with_name("2.png"))):
        assert "lies in the data set" in lucidetr("doctor", data, *option, status=2)
    sheet = data.with_name("2.png")
    said = lucidetr("data", "sample", data, sheet, "--bad-boxes", "drop", status=2)
    assert "lies in the data set" in said
    said = lucidetr(
        "data", "augment", "lucid-xs", "--train-json", data, "--bad-boxes", "drop", "--out", sheet, status=2
    )
    assert "lies in the data set" in said
    assert {file: file.read_bytes() for file in data.parent.iterdir()} == before


@pytest.mark.parametrize("name", ["sheet.pdfx", "sheet"])
def test_a_sheet_that_is_no_picture_is_refused_before_the_work(tmp_path, name):
    said = lucidetr("doctor", plant(tmp_path / "data"), "--sheet", tmp_path / name, status=2)
    assert "give the sheet a name that ends in one of .png" in said.splitlines()[0]


def test_a_sound_set_has_a_page_without_pictures(tmp_path):
    lucidetr("data", "convert", "generated:digits?train=4&val=2&size=64", tmp_path / "set", "--to", "yolo")
    report = diagnose(tmp_path / "set")
    report.findings.clear()
    write_page(report, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "No faults" in text
    assert "<img" not in text
