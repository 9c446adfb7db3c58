"""docs/reference.md is true: its examples run, and its tables list the shapes that the code makes."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.reference.network import forward

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
ROW = re.compile(r"^\| `([\w.]+)` \| ([\d ×]+) \|", re.MULTILINE)
MODULE = re.compile(r"`(\w+\.py)`")


@pytest.fixture(scope="module")
def trace():
    config = recipe("detr-r50").model
    with torch.device("meta"):
        images, padding = torch.zeros(1, 3, 800, 1066), torch.zeros(1, 800, 1066, dtype=torch.bool)
        return forward(DETR(config).state_dict(), config, images, padding)[1]


def test_tables_list_the_shapes_of_a_real_picture(trace):
    rows = ROW.findall(PAGE.read_text())
    assert len(rows) == 30
    for name, shape in rows:
        assert tuple(trace[name].shape) == tuple(int(side) for side in shape.split("×")), name


def test_examples_run():
    failures, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 10
    assert failures == 0


def test_files_it_names_exist():
    source, tests = PAGE.parents[1] / "src" / "lucidetr" / "reference", Path(__file__).parent
    for name in MODULE.findall(PAGE.read_text()):
        assert (source / name).exists() or (tests / name).exists(), name
    for name in re.findall(r"`tests/oracle/(\w+\.py)`", PAGE.read_text()):
        assert (tests / name).exists(), name
