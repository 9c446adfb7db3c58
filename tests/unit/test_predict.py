"""Predictions on files: what is found among them, and what is written of known detections."""

import csv
import io
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lucidetr.categories import Categories
from lucidetr.cli.predict import kinds_of
from lucidetr.data.decoding import read_image
from lucidetr.deployment.detector import Detector
from lucidetr.deployment.inputs import Frame, Source, find_sources, safe_names
from lucidetr.deployment.outputs import MADE, WRITERS, Drawn
from lucidetr.deployment.predict import find, predict_files
from lucidetr.deployment.tiles import Tiling
from lucidetr.drawing import draw_boxes
from lucidetr.errors import InputError
from lucidetr.structures import Detections

CATEGORIES = Categories(ids=(5, 9), names=("cat", "../dog"))
FOUND = Detections(
    boxes_xyxy=torch.tensor([[2.0, 3, 12, 23], [-5, 10, 8, 100], [50, 50, 60, 60]]),
    scores=torch.tensor([0.75, 0.5, 0.25]),
    labels=torch.tensor([1, 0, 0]),
    categories=CATEGORIES,
)
ANY = torch.zeros(2, dtype=torch.float64)


class Knows(Detector):
    """Find the same in every picture, but refuse those of one width."""

    def __init__(self, found=FOUND, refused=0):
        self.card = SimpleNamespace(categories=found.categories)
        self.found, self.refused = found, refused

    def prepare(self, picture):
        return picture

    def detect(self, samples):
        if any(sample.shape[-1] == self.refused for sample in samples):
            raise InputError("too thin for this model")
        return [self.found for _ in samples]


def paint(file: Path, size=(40, 30)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a folder of pictures, in two folders of their own, and stand in it."""
    for name in ("in/a.png", "in/b.jpg", "in/deep/a.png", "in/deep/c.PNG"):
        paint(tmp_path / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found_places(*inputs, out="out"):
    return [(str(source.file), str(source.place)) for source in find_sources(inputs, Path(out))]


def test_folders_files_and_patterns(folder):
    everything = [
        ("in/a.png", "a.png"),
        ("in/b.jpg", "b.jpg"),
        ("in/deep/a.png", "deep/a.png"),
        ("in/deep/c.PNG", "deep/c.png"),
    ]
    assert found_places("in") == everything
    assert found_places("in/**") == found_places("in/**/*") == everything
    assert found_places("in/*.png") == [("in/a.png", "a.png")]
    assert found_places(str(folder / "in" / "d*" / "?.png")) == [(str(folder / "in/deep/a.png"), "deep/a.png")]
    assert found_places("in/deep/../*.png") == [("in/deep/../a.png", "a.png")]
    assert found_places("in/*/../a.png") == [("in/deep/../a.png", "deep/a.png")]
    odd = paint(folder / "a[1].png")
    assert found_places("a[1].png") == [(odd.name, odd.name)]


def test_names_that_meet_are_numbered(folder):
    paint(folder / "in" / "a.bmp")
    (folder / "in" / "a.avi").write_text("")
    (folder / "in" / "a.mov").write_text("")
    assert found_places("in/a.*", "in/deep/a.png") == [
        ("in/a.avi", "a.mp4"),
        ("in/a.bmp", "a.png"),
        ("in/a.mov", "a-2.mp4"),
        ("in/a.png", "a-2.png"),
        ("in/deep/a.png", "a-3.png"),
    ]


def test_a_list_on_standard_input(folder, monkeypatch):
    paint(folder / "a[1].png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/b.jpg\n\na[1].png\r\nin/deep")))
    assert found_places("-") == [
        ("in/b.jpg", "b.jpg"),
        ("a[1].png", "a[1].png"),
        ("in/deep/a.png", "a.png"),
        ("in/deep/c.PNG", "c.png"),
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/*.png\n")))  # a list holds names, no patterns
    with pytest.raises(InputError, match=r"in/\*\.png: no such picture, video or folder"):
        find_sources(["-"], Path("out"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match="no pictures: name files"):
        find_sources(["-"], Path("out"))


def test_what_is_not_there_is_refused(folder):
    (folder / "empty").mkdir()
    for text in ("gone.png", "empty", "in/*.gif", "gone/**/*.png"):
        with pytest.raises(InputError, match="no "):
            find_sources([text], Path("out"))


def test_what_was_drawn_earlier_does_not_count(folder):
    paint(folder / "in" / "out" / "a.png")
    for inputs in (["in"], ["in/**"]):
        assert len(find_sources(inputs, Path("in/out"))) == 4
        assert len(find_sources(inputs, Path("elsewhere"))) == 5
    assert len(find_sources(["in/out/a.png"], Path("in/out"))) == 1  # named itself
    for inputs in (["in/deep"], ["in/deep/*"]):
        for out in (".", "in"):  # the pictures lie below it, and were not drawn into it
            assert len(find_sources(inputs, Path(out))) == 2


def test_nothing_that_is_read_is_written_over(folder):
    before = {file: file.read_bytes() for file in (folder / "in").rglob("*") if file.is_file()}
    sources = find_sources(["in"], Path("in"))
    with pytest.raises(InputError, match=r"in/a\.png: drawing would overwrite the picture itself"):
        predict_files(Knows(), sources, Path("in"), ["jsonl", "drawn"], ANY)
    crop = paint(folder / "in" / "crops" / "cat" / "a-001.png")
    with pytest.raises(InputError, match="lies where objects that are cut out are written"):
        predict_files(Knows(), find_sources([str(crop)], Path("in")), Path("in"), ["crops"], ANY)
    crop.unlink()
    (folder / "in" / "crops" / "cat").rmdir()
    (folder / "in" / "crops").rmdir()
    predict_files(Knows(), sources, Path("in"), ["crops", "jsonl", "csv", "coco"], ANY)
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("name", ["a.png", "detections.json", "crops"])
def test_nothing_is_replaced_but_what_predict_wrote(folder, name):
    """As in photos/val drawn into photos, where pictures of the same name lie."""
    theirs, sources = folder / "own" / name, find_sources(["in/a.png"], Path("own"))
    theirs.parent.mkdir()
    theirs.write_bytes(b"of the user")
    with pytest.raises(InputError, match=rf"own/{name}: is there, and no earlier predict wrote it"):
        predict_files(Knows(), sources, Path("own"), ["drawn", "coco", "crops"], ANY)
    assert [path.name for path in (folder / "own").iterdir()] == [name]
    assert theirs.read_bytes() == b"of the user"
    theirs.unlink()
    for _ in range(2):  # what it wrote itself it writes again
        predict_files(Knows(), sources, Path("own"), ["drawn", "coco", "crops"], ANY)


def test_lines_of_json(folder):
    done = predict_files(Knows(), find_sources(["in"], Path("out")), Path("out"), ["jsonl"], ANY)
    assert (done.pictures, done.frames, done.boxes, done.share, done.refused) == (4, 0, 12, 1.0, [])
    lines = [json.loads(line) for line in (folder / "out" / "detections.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["in/a.png", "in/b.jpg", "in/deep/a.png", "in/deep/c.PNG"]
    assert lines[1] == {
        "file": "in/b.jpg",
        "frame": None,
        "seconds": None,
        "width": 40,
        "height": 30,
        "detections": [
            {"box_xyxy": [2, 3, 12, 23], "score": 0.75, "category_id": 9, "name": "../dog"},
            {"box_xyxy": [-5, 10, 8, 100], "score": 0.5, "category_id": 5, "name": "cat"},
            {"box_xyxy": [50, 50, 60, 60], "score": 0.25, "category_id": 5, "name": "cat"},
        ],
    }
    assert sorted(file.name for file in (folder / "out").iterdir()) == [MADE, "detections.jsonl"]


def test_rows_of_a_table_above_each_class_s_threshold(folder):
    least = torch.tensor([0.5, 0.8], dtype=torch.float64)
    predict_files(Knows(), find_sources(["in/*"], Path("out")), Path("out"), ["csv"], least)
    with open("out/detections.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["file", "frame", "name", "category_id", "score", "x0", "y0", "x1", "y1"],
        ["in/a.png", "", "cat", "5", "0.5", "-5.0", "10.0", "8.0", "100.0"],
        ["in/b.jpg", "", "cat", "5", "0.5", "-5.0", "10.0", "8.0", "100.0"],
    ]


def test_a_file_whose_name_is_no_text_is_written_too(folder):
    name = b"in/\xff,\"'.png"
    (folder / "in" / "b.jpg").rename(Path(name.decode(errors="surrogateescape")))
    predict_files(Knows(), find_sources(["in"], Path("out")), Path("out"), ["csv", "jsonl", "coco", "crops"], ANY)
    with open("out/detections.csv", newline="", errors="surrogateescape") as file:
        assert name.decode(errors="surrogateescape") in {row[0] for row in csv.reader(file)}
    assert (
        json.loads(Path("out/detections.jsonl").read_text().splitlines()[3])["file"].encode(errors="surrogateescape")
        == name
    )


def test_a_coco_file(folder):
    predict_files(Knows(), find_sources(["in"], Path("out")), Path("out"), ["coco"], ANY)
    content = json.loads((folder / "out" / "detections.json").read_text())
    assert content["categories"] == [{"id": 5, "name": "cat"}, {"id": 9, "name": "../dog"}]
    assert content["images"][1] == {"id": 2, "file_name": "in/b.jpg", "width": 40, "height": 30}
    assert len(content["annotations"]) == 12
    row = {"id": 4, "image_id": 2, "category_id": 9, "bbox": [2, 3, 10, 20], "area": 200, "score": 0.75, "iscrowd": 0}
    assert content["annotations"][3] == row


def test_objects_are_cut_out_into_folders_that_no_name_leads_out_of(folder):
    predict_files(Knows(), find_sources(["in"], Path("out")), Path("out"), ["crops"], ANY)
    made = sorted(str(file.relative_to(folder / "out")) for file in (folder / "out").rglob("*.png"))
    stems = ["a", "b", "deep/a", "deep/c"]
    assert made == sorted(
        [f"crops/___dog/{stem}-000.png" for stem in stems] + [f"crops/cat/{s}-001.png" for s in stems]
    )
    sizes = [read_image(folder / "out" / "crops" / name).shape for name in ("___dog/a-000.png", "cat/a-001.png")]
    assert sizes == [(3, 20, 10), (3, 20, 8)]  # cut to the picture; the third box lies outside it
    assert sorted(file.name for file in folder.iterdir()) == ["in", "out"]


def test_objects_of_an_earlier_call_make_way_for_those_of_the_same_picture(folder):
    def cut(*inputs, least=ANY):
        predict_files(Knows(), find_sources(list(inputs), Path("out")), Path("out"), ["crops"], least)
        return sorted(str(file.relative_to(folder / "out" / "crops")) for file in (folder / "out").rglob("*.png"))

    cut("in")
    for name in ("sorted-by-hand.png", "a-best.png"):
        (folder / "out" / "crops" / "cat" / name).write_bytes(b"")
    left = cut("in/a.png", least=torch.full((2,), 0.6, dtype=torch.float64))
    assert "___dog/a-000.png" in left and "cat/a-001.png" not in left
    assert {"cat/b-001.png", "cat/deep/a-001.png", "cat/sorted-by-hand.png", "cat/a-best.png"} <= set(left)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:\\x", "nul\0", "x" * 300, "日本"]
)
def test_any_category_name_is_one_folder(name, tmp_path):
    (safe,) = safe_names([name])
    (tmp_path / "crops" / safe).mkdir(parents=True)
    assert [file.name for file in (tmp_path / "crops").iterdir()] == [safe]


def test_drawn_pictures_lie_as_their_sources(folder):
    predict_files(Knows(), find_sources(["in"], Path("out")), Path("out"), ["drawn"], ANY)
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/c.png"):
        with Image.open(folder / "out" / name) as picture:
            assert picture.size == (40, 30)
            assert len(picture.getcolors(10_000)) > 1


def test_what_cannot_be_read_is_named_and_the_others_are_done(folder):
    (folder / "in" / "b.jpg").write_text("broken")
    done = predict_files(Knows(), find_sources(["in"], Path("out")), Path("out"), ["jsonl"], ANY)
    assert (done.pictures, len(done.refused)) == (3, 1)
    assert done.refused[0].startswith("in/b.jpg: not an image")


@pytest.mark.parametrize("tiling", [None, Tiling(32, whole=False)])
def test_what_the_model_cannot_take_is_named_and_the_others_are_done(folder, tiling):
    paint(folder / "in" / "b.jpg", (11, 30))
    sources = find_sources(["in"], Path("out"))
    done = predict_files(Knows(refused=11), sources, Path("out"), ["jsonl"], ANY, tiling=tiling)
    assert (done.pictures, done.refused) == (3, ["in/b.jpg: too thin for this model"])
    lines = [json.loads(line)["file"] for line in (folder / "out" / "detections.jsonl").read_text().splitlines()]
    assert lines == ["in/a.png", "in/deep/a.png", "in/deep/c.PNG"]


def test_every_frame_of_a_video_is_refused_by_one_sentence():
    clip, refused = Source(Path("clip.avi"), Path("clip.mp4")), []
    frames = [Frame(torch.zeros(3, 9, 11, dtype=torch.uint8), clip, number) for number in range(9)]
    assert list(find(Knows(refused=11), frames, ANY, refused)) == []
    assert refused == ["clip.avi: too thin for this model"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stop_keeps_what_was_written_under_another_name(folder, stop):
    kinds = ["coco", "csv", "jsonl"]
    sources = find_sources(["in"], Path("out"))
    predict_files(Knows(), sources[:1], Path("out"), kinds, ANY)
    earlier = {file.name: file.read_bytes() for file in (folder / "out").iterdir()}

    def progress(done):
        if done.pictures == 2:
            raise stop

    with pytest.raises(stop):
        predict_files(Knows(), sources, Path("out"), kinds, ANY, progress=progress)
    after = {file.name: file.read_bytes() for file in (folder / "out").iterdir()}
    assert after.items() >= earlier.items()
    assert set(after) == set(earlier) | {f"{name}.partial" for name in earlier if name != MADE}
    assert len(after["detections.jsonl.partial"].splitlines()) == 2
    assert len(after["detections.csv.partial"].splitlines()) == 1 + 2 * 3
    content = json.loads(after["detections.json.partial"])
    assert (len(content["images"]), len(content["annotations"])) == (2, 6)


def test_progress_is_told_in_order_and_ends_at_the_end(folder):
    shares = []
    predict_files(
        Knows(),
        find_sources(["in"], Path("o")),
        Path("o"),
        ["csv"],
        ANY,
        progress=lambda done: shares.append(done.share),
    )
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_unknown_outputs_are_refused():
    assert kinds_of(("csv, coco", "csv")) == ("csv", "coco")
    with pytest.raises(InputError, match="--write cocoo: did you mean coco"):
        kinds_of(("csv,cocoo",))
    assert set(WRITERS) == {"drawn", "coco", "jsonl", "csv", "crops"}


def test_a_video_that_is_drawn_ends_where_the_next_source_begins(tmp_path):
    from av import open as open_video

    drawn = Drawn(tmp_path, CATEGORIES)
    clip, still = Source(Path("clip.avi"), Path("clip.mp4")), Source(Path("a.png"), Path("a.png"))
    image = torch.zeros(3, 33, 47, dtype=torch.uint8)
    for number in range(3):
        drawn.add(Frame(image, clip, number, number / 5, Fraction(5)), FOUND)
        assert not (tmp_path / "clip.mp4").exists()
    drawn.add(Frame(image, still), FOUND)
    with open_video(str(tmp_path / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == [MADE, "a.png", "clip.mp4"]


def test_only_some_classes():
    assert FOUND.of_classes(["cat"]).scores.tolist() == [0.5, 0.25]
    assert len(FOUND.of_classes([])) == 0
    with pytest.raises(InputError, match="unknown category 'cta': did you mean cat"):
        FOUND.of_classes(["cta"])


@pytest.mark.filterwarnings("ignore:OpenCV")  # supervision would rather have it
def test_as_a_table_and_for_supervision():
    table = FOUND.to_dataframe()
    assert list(table.columns) == ["name", "category_id", "score", "x0", "y0", "x1", "y1"]
    assert table.iloc[1].tolist() == ["cat", 5, 0.5, -5.0, 10.0, 8.0, 100.0]
    theirs = FOUND.to_supervision()
    assert theirs.xyxy.tolist() == FOUND.boxes_xyxy.tolist()
    assert (theirs.class_id.tolist(), theirs.confidence.tolist()) == ([1, 0, 0], [0.75, 0.5, 0.25])
    assert theirs.data["class_name"].tolist() == ["../dog", "cat", "cat"]
    nothing = FOUND.above(1.0)
    assert (len(nothing.to_dataframe()), len(nothing.to_supervision())) == (0, 0)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    for name, call in (("pandas", FOUND.to_dataframe), ("supervision", FOUND.to_supervision)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=f"pip install {name}"):
            call()


def test_a_box_without_a_caption_is_four_lines():
    drawn = draw_boxes(torch.zeros(3, 60, 60, dtype=torch.uint8), torch.tensor([[10.0, 20.0, 50.0, 50.0]]), [""], [0])
    coloured = np.asarray(drawn).any(-1)
    assert coloured.sum() == 2 * (41 + 31) - 4
    assert not coloured[:20].any()


def test_letters_of_most_scripts_are_drawn_as_themselves():
    blank, box = torch.full((3, 60, 90), 255, dtype=torch.uint8), torch.tensor([[5.0, 30.0, 80.0, 55.0]])
    drawn = {letter: draw_boxes(blank, box, [letter * 3], [0]).tobytes() for letter in ("é", "ß", "ş", "я", "α", "e")}
    assert len(set(drawn.values())) == len(drawn)
