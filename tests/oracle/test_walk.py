"""docs/reference.md is true: its examples run, and its tables list the shapes that the code makes."""

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
ROW = re.compile(r"^\| `([\w.]+)` \| ([\d ×]+) \|", re.MULTILINE)
MODULE = re.compile(r"`(\w+\.py)`")
OPTIONS = "## 9. Where a config departs from the paper"


@pytest.fixture(scope="module")
def walked():
    """Return the page after its examples were run: with all the names that they made."""
    page = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    runner = doctest.DocTestRunner()
    runner.run(page, clear_globs=False)
    return page, runner.summarize()


def test_examples_run(walked):
    failures, tried = walked[1]
    assert tried > 10
    assert failures == 0


@pytest.mark.parametrize(("part", "trace", "number"), [(0, "trace", 30), (1, "lucid_trace", 19)])
def test_tables_list_the_shapes_of_a_real_picture(walked, part, trace, number):
    rows = ROW.findall(PAGE.read_text().split(OPTIONS)[part])
    assert len(rows) == number
    for name, shape in rows:
        assert tuple(walked[0].globs[trace][name].shape) == tuple(int(side) for side in shape.split("×")), name


def test_files_it_names_exist():
    source, tests = PAGE.parents[1] / "src" / "lucidetr" / "reference", Path(__file__).parent
    for name in MODULE.findall(PAGE.read_text()):
        assert (source / name).exists() or (tests / name).exists(), name
    for name in re.findall(r"`tests/oracle/(\w+\.py)`", PAGE.read_text()):
        assert (tests / name).exists(), name
