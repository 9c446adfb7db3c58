"""One split that cannot be read hides nothing of the others from the doctor, and training still refuses it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lucidetr.data.doctor import diagnose
from lucidetr.data.splits import find_splits
from lucidetr.errors import InputError

YAML = "train: images/train\nval: images/val\ntest: images/test\nnames: [cat, dog]\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a YOLO set of three splits of two pictures each; one label of the test pictures is of no class."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for part in ("images", "labels"):
            (tmp_path / part / split).mkdir(parents=True)
        for name in "ab":
            pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{name}.png")
            label = 7 if (split, name) == ("test", "b") else 0
            (tmp_path / "labels" / split / f"{name}.txt").write_text(f"{label} 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text(YAML)
    return tmp_path


def faults(folder: Path) -> list[str]:
    return [finding.text for finding in diagnose(folder).findings if finding.severity == "error"]


def test_an_empty_split_hides_no_other(folder):
    for picture in (folder / "images" / "val").iterdir():
        picture.unlink()
    first, second = sorted(faults(folder), key=lambda text: "class 7" in text)
    assert "val: no picture in images/val" in first
    assert "b.txt, line 1: class 7 is not among the names" in second
    assert [(split.split, split.images, split.objects) for split in diagnose(folder).splits] == [
        ("train", 2, 2),
        ("test", 2, 1),
    ]
    with pytest.raises(InputError, match="val: no picture in images/val"):
        find_splits(folder).splits["val"]("refuse")
    assert len(find_splits(folder).splits["train"]("refuse")) == 2


def test_every_split_that_cannot_be_found_is_named(folder):
    (folder / "data.yaml").write_text(YAML.replace("images/train", "gone").replace("images/val", "../../etc"))
    found = faults(folder)
    assert [split for split in ("gone is neither of", "../../etc", "class 7") if any(split in f for f in found)] == [
        "gone is neither of",
        "../../etc",
        "class 7",
    ]


def test_a_yaml_without_splits_is_one_fault(folder):
    (folder / "data.yaml").write_text("names: [cat, dog]\n")
    assert len(faults(folder)) == 1
    assert "it names no split" in faults(folder)[0]
