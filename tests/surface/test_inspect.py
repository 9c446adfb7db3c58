"""lucidetr inspect as a user meets it: one page from a run of seconds, and refusals with the way out."""

import re
import shutil

import pytest

from lucidetr.inspection.report import SECTIONS
from lucidetr.training.loop import train
from run_tools import tiny
from surface_tools import lucidetr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("inspect") / "run", steps=3, evaluations=1))


@pytest.fixture(scope="module")
def inspected(trained):
    out = trained.parent / "figures"
    said = lucidetr("inspect", trained, "--images", "1", "--save-figures", out, "--most", 3)
    return said, (trained / "report.html").read_text(), out


def test_one_page_of_every_section(inspected, trained):
    said, page, _ = inspected
    assert said.splitlines()[-1] == f"report: {trained / 'report.html'}"
    sections = re.findall(r'<section id="([^"]+)"', page)
    assert sections == ["summary", *SECTIONS]
    contents = re.findall(r'<li><a href="#([^"]+)">', page.split("</nav>")[0])
    assert contents == sections
    assert len(page) < 5_000_000


def test_the_page_needs_nothing_but_itself(inspected):
    _, page, _ = inspected
    plain = re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert re.search(r"https?:|@import|<script", plain) is None
    ids = re.findall(r' id="([^"]+)"', plain)
    assert len(ids) == len(set(ids))
    anchors = {each for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', plain) for each in pair if each}
    assert anchors <= set(ids)
    assert page.count("<svg ") == page.count("</svg>") == page.count('role="img" aria-label=')


def test_every_warning_is_printed_and_in_the_page(inspected):
    said, page, _ = inspected
    warned = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert warned
    assert page.count("<strong>Warning:</strong>") == len(warned)
    assert "AP is 0 at the end" in said or "AP is 0" not in page


def test_every_figure_is_saved_twice(inspected):
    _, page, out = inspected
    names = re.findall(r'<figure id="figure-([^"]+)"', page)
    assert len(names) > 10
    assert len(set(names)) == len(names)
    assert {f"{name}.{kind}" for name in names for kind in ("png", "svg")} == {file.name for file in out.iterdir()}


def test_a_run_without_statistics_still_has_its_page(trained, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    (old / "statistics.jsonl").unlink()
    lucidetr("inspect", old, "--images", "1", "--most", 2, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("This run holds no statistics.jsonl") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a run's folder: there is no run.json in it"),
        (["RUN", "--images", "one"], "--images one: one is no image id"),
        (["RUN", "--images", "999"], "has no image 999; its ids are"),
        (["RUN", "--most", "0"], "--most = 0: choose at least 1"),
        (["RUN", "--image", "1"], "--images"),
    ],
)
def test_mistakes_are_refused_with_the_way_out(trained, arguments, said):
    arguments = [str(trained) if word == "RUN" else word for word in arguments]
    assert said in lucidetr("inspect", *arguments, status=2)
