"""What the pages say is true: README commands run, tables are those the code makes, axis names are explained."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lucidetr.cli.recipes import recipe_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# the README's commands at a size for tests: fewer and shorter, otherwise word for word
SMALLER = {
    "generated:digits scenes": "generated:digits?train=8&val=4 scenes",
    "--minutes 5": "--minutes 0.02 --evaluations 1",
    "--steps 20": "--steps 1 --evaluations 1",
    "--steps 600": "--steps 1 --evaluations 1",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_commands_run_from_top_to_bottom(tmp_path):
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 7
    used = set()
    for line in commands:
        small = line
        for long, short in SMALLER.items():
            if long in small:
                used.add(long)
                small = small.replace(long, short)
        program, *arguments = small.split()
        assert program == "lucidetr"
        subprocess.run([sys.executable, "-m", "lucidetr", *arguments], cwd=tmp_path, check=True, timeout=300)
    assert used == set(SMALLER)
    assert (tmp_path / "drawn" / "detections.json").is_file()
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, timeout=120)


def test_readme_shows_the_recipes_as_they_are():
    shown = README.split("<!-- recipes -->")[1].split("<!-- /recipes -->")[0]
    assert shown.strip() == recipe_table(), "paste what `lucidetr recipes` prints between the recipes marks"


def test_readme_names_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)) - {"sense"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def axis_names():
    """Return every axis name in a shape of a public function, and where it stands."""
    names: dict[str, Path] = {}
    for path in SOURCES:
        for shape in re.findall(r"(?:Float|Int|Bool|UInt8|Shaped)\[\w+, \"([^\"]*)\"\]", path.read_text()):
            names |= {name.strip("*#{}"): path for name in shape.split()}
    return {name: path for name, path in names.items() if name and not name.isdigit()}


def test_every_axis_name_is_explained():
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "shapes.md").read_text(), re.MULTILINE)
    known = {word for row in rows for word in row.replace(" ", "").split(",")} | {"..."}
    unexplained = {name: path.name for name, path in axis_names().items() if name not in known}
    assert unexplained == {}


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [p for p in (ROOT / "src" / "lucidetr").iterdir() if not p.name.startswith("__")]
    for room in rooms:
        assert f"`{room.name}/`" in page or f"`{room.name}`" in page, room.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_modules_open_with_a_sentence(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith('"""'), path
    assert first.rstrip('"').rstrip().endswith((".", ":")), f"{path}: {first}"
