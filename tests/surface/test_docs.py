"""What the pages say is true: README commands run, tables are those the code makes, axis names are explained."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lucidetr.cli.recipes import recipe_table
from lucidetr.studies.ladder import ladder_page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# the README's commands at a size for tests: smaller and shorter, otherwise word for word
SMALLER = (
    (r"generated:digits(?=\s|$)", "generated:digits?train=8&val=4"),
    (r"--minutes \S+", "--minutes 0.02"),
    (r"--steps \d+", "--steps 1"),
    (r"--seeds \d+", "--seeds 1"),
    (r"^lucidetr train (?!--help)(.*)$", r"lucidetr train \1 --evaluations 1"),
)
ELSEWHERE = {"lucidetr demo", "lucidetr study"}  # they take minutes or hours, and have tests of their own


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shortened(line):
    """Return a command of the README as the tests run it."""
    line = line.split(" #")[0].strip()
    for long, short in SMALLER:
        line = re.sub(long, short, line)
    return line


def test_every_training_of_the_readme_is_short_here():
    for block in blocks("sh"):
        for line in map(shortened, block.splitlines()):
            if line.startswith("lucidetr train") and "--help" not in line:
                assert re.search(r"--minutes 0.02|--steps 1 ", line), line
                assert "--epochs" not in line, line


@pytest.mark.slow
def test_readme_commands_run_from_top_to_bottom(tmp_path):
    lines = [shortened(line) for block in blocks("sh") for line in block.splitlines()]
    lines = [line for line in lines if line and " ".join(line.split()[:2]) not in ELSEWHERE]
    assert len(lines) >= 6
    assert len({line.split()[1] for line in lines}) >= 4  # data, train, eval, predict
    for line in lines:
        program, *arguments = line.split()
        assert program == "lucidetr"
        subprocess.run([sys.executable, "-m", "lucidetr", *arguments], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "drawn" / "detections.json").is_file()
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, timeout=120)


def test_readme_shows_the_recipes_as_they_are():
    shown = README.split("<!-- recipes -->")[1].split("<!-- /recipes -->")[0]
    assert shown.strip() == recipe_table(), "paste what `lucidetr recipes` prints between the recipes marks"


def test_the_lucid_page_shows_the_ladder_as_it_was_measured():
    shown = (ROOT / "docs" / "lucid.md").read_text().split("<!-- ladder -->")[1].split("<!-- /ladder -->")[0]
    assert shown.strip() == ladder_page(), "paste what `lucidetr recipes --ladder` prints between the ladder marks"


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
        for shape in re.findall(r"(?:Float|Int|Bool|UInt8|Shaped)\[[\w.]+, \"([^\"]*)\"\]", path.read_text()):
            names |= {name.strip("*#{}"): path for name in shape.split()}
    return {name: path for name, path in names.items() if name and not name.isdigit()}


def test_every_axis_name_is_explained():
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "shapes.md").read_text(), re.MULTILINE)
    known = {word for row in rows for word in row.replace(" ", "").split(",")} | {"..."}
    unexplained = {name: path.name for name, path in axis_names().items() if name not in known}
    assert unexplained == {}


def test_the_readme_says_how_much_there_is_to_read():
    said = int(re.search(r"Model, loss and loop are about ([\d,]+) lines", README)[1].replace(",", ""))
    core = [path for path in SOURCES if path.parent.name in ("models", "layers", "criterion")]
    core += [path for path in SOURCES if path.name in ("loop.py", "prepare.py")]
    assert sum(len(path.read_text().splitlines()) for path in core) == pytest.approx(said, rel=0.05)


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [p for p in (ROOT / "src" / "lucidetr").iterdir() if not p.name.startswith("__")]
    for room in rooms:
        assert f"`{room.name}/`" in page or f"`{room.name}`" in page, room.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_modules_open_with_a_sentence(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith('"""'), path
    assert first.rstrip('"').rstrip().endswith((".", ":", "?")), f"{path}: {first}"


def test_the_glossary_is_in_order_and_says_each_word_once():
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)[1:]
    assert rows == sorted(rows, key=str.lower)
    assert len({row.lower() for row in rows}) == len(rows)


def test_the_rooms_of_the_architecture_page_are_in_the_order_that_is_held():
    """The page goes from the ground up, import-linter's list from the roof down."""
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    order = {room: i for i, layer in enumerate(reversed(layers)) for room in layer.split(" | ")}
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    named = [[name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([^`]+)`", row)] for row in rows]
    assert {name for row in named for name in row} == set(order)
    heights = [order[name] for row in named for name in row]
    assert heights == sorted(heights)


def kinds_of_findings() -> dict[str, str]:
    """Return every kind that the doctor's source can say, and whether training refuses it."""
    kinds = {}
    for name in ("raw.py", "examine.py", "sums.py", "places.py"):
        for node in ast.walk(ast.parse((ROOT / "src" / "lucidetr" / "data" / name).read_text())):
            if not isinstance(node, ast.Call):
                continue
            words = [each.value for each in node.args if isinstance(each, ast.Constant)]
            said = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if said in ("error", "warn") and words:
                kinds[words[0]] = "refused" if said == "error" else "odd"
            elif said == "Finding" and len(words) == 2:
                kinds[words[0]] = "refused" if words[1] == "error" else "odd"
    return kinds


def test_every_kind_of_finding_is_on_the_page_about_data():
    kinds, said = kinds_of_findings(), {}
    assert len(kinds) >= 60
    table = (ROOT / "docs" / "data.md").read_text().split("| of | faults | odd |")[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        _, _, *columns, _ = row.split("|")
        for verdict, cell in zip(("refused", "odd"), columns, strict=True):
            said |= dict.fromkeys(re.findall(r"`([a-z0-9-]+)`", cell), verdict)
    assert said == {kind: verdict for kind, verdict in kinds.items() if kind in said}
    assert set(kinds) - set(said) == set()
