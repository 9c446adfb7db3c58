"""Would the oracle notice? One line of each fast module is made wrong in a copy, and some check must fail there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
CHECKS = ("test_parts", "test_matching", "test_set_loss", "test_average_precision", "test_network")

# module: what the line says, and what it says when wrong
FAULTS = {
    "boxes.py": ("low = torch.minimum(a_xyxy[..., :2]", "low = torch.maximum(a_xyxy[..., :2]"),
    "layers/attention.py": ("attn_mask=visible,", "attn_mask=None,"),
    "layers/feed_forward.py": (
        "self.contract(self.dropout(F.relu(self.expand(x))))",
        "self.dropout(self.contract(F.relu(self.expand(x))))",
    ),
    "layers/norms.py": ("(self.running_var + self.eps).rsqrt()", "self.running_var.rsqrt()"),
    "layers/positions.py": ("column / (column[:, :, -1:] + 1e-6)", "column / (column.shape[2] + 1e-6)"),
    "layers/residual.py": (
        "return x + self.dropout(part(self.norm(x)))",
        "return self.norm(x) + self.dropout(part(self.norm(x)))",
    ),
    "models/backbones.py": (
        "blocks = [block(channels, width, stride, 1, norm)]",
        "blocks = [block(channels, width, stride, dilation, norm)]",
    ),
    "models/encoder.py": (
        "self.attention(x + position, x + position, x, key_padding=padding)",
        "self.attention(x + position, x + position, x + position, key_padding=padding)",
    ),
    "models/queries.py": ("return torch.zeros_like(position), position", "return position, position"),
    "models/decoder.py": ("hidden.append(self.norm(content))", "hidden.append(content := self.norm(content))"),
    "models/heads.py": ("hidden = F.relu(layer(hidden))", "hidden = layer(hidden)"),
    "models/detr.py": ("columns = [i * width // grid_w", "columns = [(2 * i + 1) * width // (2 * grid_w)"),
    "criterion/matcher.py": ("predictions.logits.softmax(-1)", "predictions.logits.sigmoid()"),
    "criterion/set_loss.py": ("weight[-1] = config.no_object", "weight[0] = config.no_object"),
    "evaluation/coco.py": ('enumerate(content["annotations"], start=1)', 'enumerate(content["annotations"], start=0)'),
}


def run_checks(copy: Path) -> tuple[int, list[str]]:
    """Run the oracle on the copy and return its exit code and the checks that failed, the first one only."""
    files = [f"tests/oracle/{name}.py" for name in CHECKS]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)


@pytest.fixture
def copy(tmp_path):
    for part in ("src/lucidetr", "tests/oracle"):
        shutil.copytree(PROJECT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (PROJECT / "pyproject.toml", *PROJECT.glob("*.py"), *PROJECT.glob("tests/*.py")):
        shutil.copy(file, tmp_path / file.relative_to(PROJECT))
    return tmp_path


@pytest.mark.slow
def test_the_copy_itself_is_sound(copy):
    assert run_checks(copy) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("module", FAULTS)
def test_a_wrong_line_is_noticed(module, copy):
    right, wrong = FAULTS[module]
    file = copy / "src" / "lucidetr" / module
    source = file.read_text()
    where = source.rindex(right)
    file.write_text(source[:where] + wrong + source[where + len(right) :])
    code, failed = run_checks(copy)
    assert code == 1
    assert failed
    print(f"{module}: {wrong} → {failed[0]}")
