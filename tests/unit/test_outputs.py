"""Objects that are cut out: what an earlier call cut out makes way, and what is the user's own stays."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.deployment.inputs import Frame, Source
from lucidetr.deployment.outputs import MADE, Crops, check_places
from lucidetr.errors import InputError
from lucidetr.structures import Detections

CATEGORIES = Categories(ids=(5, 9), names=("cat", "dog"))
IMAGE = torch.zeros(3, 30, 40, dtype=torch.uint8)
CLIP = Source(Path("clip.avi"), Path("clip.mp4"))
STILL = Source(Path("photo.png"), Path("photo.png"))
FOUND = Detections(torch.tensor([[2.0, 3, 12, 23]]), torch.tensor([0.75]), torch.tensor([0]), CATEGORIES)


def cut(out, *frames, categories=CATEGORIES, found=FOUND):
    """Cut objects out of frames by number, None for a picture; return the files that are there then."""
    with Crops(out, categories) as crops:
        for number in frames:
            crops.add(Frame(IMAGE, STILL if number is None else CLIP, number, rate=Fraction(5)), found)
    return sorted(str(file.relative_to(out / "crops")) for file in (out / "crops").rglob("*.png"))


def test_the_user_s_own_files_stay(tmp_path):
    mine = tmp_path / "crops" / "cat" / "photo-2024.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    for _ in range(2):
        assert cut(tmp_path, None) == ["cat/photo-000.png", "cat/photo-2024.png"]
    assert mine.read_bytes() == b"mine"


def test_the_user_s_own_file_of_the_same_name_is_not_written_over(tmp_path):
    mine = tmp_path / "crops" / "cat" / "photo-000.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"photo-000\.png: is there, and no earlier predict wrote it"):
        cut(tmp_path, None)
    assert mine.read_bytes() == b"mine"


def test_a_file_that_the_user_put_where_an_earlier_crop_was_stays(tmp_path):
    many = Detections(FOUND.boxes_xyxy.repeat(3, 1), FOUND.scores.repeat(3), FOUND.labels.repeat(3), CATEGORIES)
    assert len(cut(tmp_path, None, found=many)) == 3
    assert cut(tmp_path, None) == ["cat/photo-000.png"]
    mine = tmp_path / "crops" / "cat" / "photo-002.png"
    mine.write_bytes(b"mine")
    assert cut(tmp_path, None) == ["cat/photo-000.png", "cat/photo-002.png"]
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("line", ['"cat/../../../photo-000.png"', '"/photo-000.png"', "1", "[1]"])
def test_a_list_that_leads_elsewhere_is_refused_and_nothing_is_deleted(tmp_path, line):
    out = tmp_path / "out"
    cut(out, None)
    kept = tmp_path / "photo-000.png"
    kept.write_bytes(b"kept")
    (out / "crops" / MADE).write_text(line + "\n")
    with pytest.raises(InputError, match=r"made-by-predict: damaged .* is no name below this folder"):
        cut(out, None)
    assert kept.read_bytes() == b"kept"


def test_crops_without_a_list_are_refused_before_anything_is_written(tmp_path):
    cut(tmp_path, None)
    (tmp_path / "crops" / MADE).unlink()
    with pytest.raises(InputError, match="crops: kept no list of what was cut out"):
        check_places(["crops"], tmp_path, [STILL])


def test_other_frames_of_a_video_take_the_place_of_the_earlier_ones(tmp_path):
    assert len(cut(tmp_path, None, 0, 10, 20)) == 4
    assert cut(tmp_path, 0, 15) == ["cat/clip.mp4/000000-000.png", "cat/clip.mp4/000015-000.png", "cat/photo-000.png"]


def test_objects_of_classes_that_another_model_does_not_know_go_too(tmp_path):
    cut(tmp_path, None)
    others = Categories(ids=(1, 2), names=("kitten", "puppy"))
    assert cut(tmp_path, None, categories=others) == ["kitten/photo-000.png"]


def test_the_list_grows_by_a_line_for_each_new_name_alone(tmp_path):
    for _ in range(3):
        cut(tmp_path, None, 0)
    lines = (tmp_path / "crops" / MADE).read_text().splitlines()
    assert sorted(map(json.loads, lines)) == ["cat/clip.mp4/000000-000.png", "cat/photo-000.png"]
