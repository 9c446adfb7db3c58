"""The house stays readable: import order, sizes, no forbidden calls, nothing about anything but the project."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_import_order_holds():
    command = [str(Path(sys.executable).parent / "lint-imports")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: "/".join(p.parts[-2:]))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 9, f"{node.name} has too many arguments"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: "/".join(p.parts[-2:]))
def test_nothing_runs_foreign_code_or_swallows_errors(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load"}, f"line {node.lineno}"
            assert not called.endswith("extractall"), f"line {node.lineno}"
            assert keywords.get("shell") != "True", f"line {node.lineno}"
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"line {node.lineno}"


def test_the_package_speaks_only_when_asked():
    """Importing the package imports nothing heavy."""
    code = "import sys, lucidetr; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
