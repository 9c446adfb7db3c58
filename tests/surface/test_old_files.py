"""Model files of earlier versions, kept as they were written: they load, and find what they found then.

`files/` holds a small untrained model of each family, of schema 1, and what it found in the picture below. A change
that breaks this test breaks files on users' disks; a new schema adds files here and keeps these.
"""

import json
from pathlib import Path

import pytest
import torch

import lucidetr

FILES = Path(__file__).parent / "files"
FOUND = json.loads((FILES / "detections.json").read_text(encoding="utf-8"))


def old_picture():
    """Return a picture of 60 × 80 pixels that nothing but this formula defines."""
    row, column = torch.arange(60)[None, :, None], torch.arange(80)[None, None, :]
    rows, columns = torch.tensor([3, 5, 7])[:, None, None] * row, torch.tensor([2, 11, 4])[:, None, None] * column
    return ((rows + columns + row * column // 7) % 256).to(torch.uint8)


@pytest.mark.parametrize("name", FOUND)
def test_a_file_of_schema_1_finds_what_it_found(name):
    detector = lucidetr.load(FILES / f"{name}.safetensors", "cpu", "fp32")  # what is written down was found in float32
    assert (detector.card.schema, detector.card.step, detector.card.metrics) == (1, 7, {"AP": 0.25})
    assert detector.card.categories.names == ("round cell", "Zelle", "細胞")
    found, then = detector.predict(old_picture()), FOUND[name]
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor(then["boxes_xyxy"]), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.scores, torch.tensor(then["scores"]), atol=2e-5, rtol=0)
    assert (found.names, found.category_ids) == (then["names"], then["ids"])
