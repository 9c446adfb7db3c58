"""The package as its users get it: built, installed in an empty environment, run."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ["train", "detr-xs", "--data", "generated:digits?train=4&val=2", "--out", "run", "--steps", "1"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_sources_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    sources = [p for p in (ROOT / "src").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert packed == {p.relative_to(ROOT / "src").as_posix(): p.read_bytes() for p in sources}


@pytest.fixture
def python(tmp_path):
    """An empty environment's Python. With all dependencies it holds 6 GB, so it goes even where a test fails."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=True)
    yield folder / "bin" / "python"
    shutil.rmtree(folder)


def run_installed(python, cwd):
    lucidetr = str(python.parent / "lucidetr")
    assert (
        "detr-r50" in subprocess.run([lucidetr, "recipes"], capture_output=True, text=True, check=True, cwd=cwd).stdout
    )
    subprocess.run([lucidetr, *RUN], check=True, cwd=cwd, timeout=300)
    where = subprocess.run(
        [python, "-c", "import lucidetr; print(lucidetr.__file__)"], capture_output=True, text=True, check=True, cwd=cwd
    )
    assert str(python.parent.parent) in where.stdout
    assert (cwd / "run" / "best.safetensors").is_file()


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(wheel, python, tmp_path):
    """The dependencies are borrowed from the tests' environment; the package itself is only the wheel."""
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    site = next((tmp_path / "env").rglob("site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    run_installed(python, tmp_path)


@pytest.mark.slow
def test_the_wheel_installs_all_that_it_needs(wheel, python, tmp_path):
    constraints = str(ROOT / "constraints.txt")
    command = [python, "-m", "pip", "install", "--quiet", "-c", constraints, str(wheel)]
    subprocess.run(command, check=True, timeout=1200)
    run_installed(python, tmp_path)
