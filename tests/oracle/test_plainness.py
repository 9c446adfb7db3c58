"""The reference stays independent: nothing from the library that does its work, nothing from the fast modules."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import lucidetr.reference

FOLDER = Path(lucidetr.reference.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))

MODULES = {"torch", "jaxtyping", "lucidetr.config", "lucidetr.structures"}
FROM_TORCH = {"Tensor"}
BUILTINS = {"getattr", "eval", "exec", "__import__", "globals", "vars"}
# All of torch.nn.functional by name, wherever it hangs (torch.softmax, x.softmax, …), and what else does the work.
# Allowed: Tensor.unfold, which is a view by strides and no arithmetic; tanh, which is elementary; autograd.grad.
LIBRARY = {name for name in dir(torch.nn.functional) if not name.startswith("_")} - {"unfold", "tanh", "grad"}
LIBRARY |= {"nn", "functional", "special", "linalg", "ops", "_C", "compile", "overrides"}
LIBRARY |= {"std", "var", "std_mean", "var_mean", "logsumexp", "logaddexp", "cdist", "dist", "norm", "expit", "cov"}
LIBRARY |= {name for name in dir(torch) if any(word in name for word in ("conv", "norm", "pool", "softmax", "dropout"))}
FIELDS = {"here.config.backbone.norm", "self.config.dropout"}  # of the config, that happen to have such a name


def allowed(module: str) -> bool:
    """Return whether the reference may import a module."""
    first = module.split(".")[0]
    return module in MODULES or module.startswith("lucidetr.reference.") or first in sys.stdlib_module_names


def faults(source: str) -> list[str]:
    """Return what in a module breaks the rule."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if not allowed(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "."
            if node.level or not allowed(module):
                found.append(module)
            elif module == "torch":
                found += [f"torch.{alias.name}" for alias in node.names if alias.name not in FROM_TORCH]
        elif isinstance(node, ast.Attribute) and node.attr in LIBRARY and ast.unparse(node) not in FIELDS:
            found.append(node.attr)
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append(node.id)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_arithmetic_and_indexing(file):
    assert not faults(file.read_text())


def test_there_is_something_to_check():
    names = {file.name for file in FILES}
    assert {"network.py", "attention.py", "matching.py", "set_loss.py", "average_precision.py"} <= names


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import torch.nn", "torch.nn"),
        ("from torch import nn", "torch.nn"),
        ("from torch.nn import functional as F", "torch.nn"),
        ("import numpy", "numpy"),
        ("from lucidetr.boxes import giou", "lucidetr.boxes"),
        ("from lucidetr.layers.attention import MultiHeadAttention", "lucidetr.layers.attention"),
        ("from ..layers import attention", "layers"),
        ("y = x.softmax(-1)", "softmax"),
        ("y = torch.conv2d(x, w)", "conv2d"),
        ("y = torch.nn.functional.relu(x)", "relu"),
        ("y = x.var(0)", "var"),
        ("y = torch.native_layer_norm(x)", "native_layer_norm"),
        ("y = getattr(torch, 'soft' + 'max')(x)", "getattr"),
    ],
)
def test_the_check_itself(source, fault):
    assert fault in faults(source)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_reads_like_a_lecture(file):
    """Small files, small functions, every one with a sentence; every module says what it is."""
    source = file.read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) < 400
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
            code = node.end_lineno - node.lineno + 1
            assert code < 60, f"{node.name} has {code} lines"
            nested = node.name in ("mix", "think", "agree", "look")
            stub = isinstance(node.body[0], ast.Expr) and isinstance(getattr(node.body[0], "value", None), ast.Constant)
            assert nested or stub, f"{node.name} has no docstring"
