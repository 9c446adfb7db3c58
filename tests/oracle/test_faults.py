"""Would the oracle notice? One line of each fast module is made wrong in a copy, and some check must fail there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
CHECKS = ("test_parts", "test_matching", "test_set_loss", "test_network", "test_average_precision", "test_coco_cases")

# module, and a word where it has several faults: what the line says, and what it says when wrong
FAULTS = {
    "boxes.py": ("low = torch.minimum(a_xyxy[..., :2]", "low = torch.maximum(a_xyxy[..., :2]"),
    "layers/attention.py": ("attn_mask=mask,", "attn_mask=None,"),
    "layers/attention.py dropout": (
        "return drop(scores.softmax(-1).to(value.dtype), dropout)",
        "return scores.softmax(-1)",
    ),
    "layers/dropout.py": ("return x * factors(x, rate)", "return x * factors(x, rate).flip(-1)"),
    "layers/feed_forward.py": (
        "self.contract(self.dropout(F.relu(self.expand(x))))",
        "self.dropout(self.contract(F.relu(self.expand(x))))",
    ),
    "layers/feed_forward.py two": ("self.output(F.relu(self.hidden(x)))", "self.output(self.hidden(x))"),
    "layers/norms.py": ("(norm.running_var + norm.eps).rsqrt()", "norm.running_var.rsqrt()"),
    "layers/norms.py frozen": ("F.conv2d(x, weight, shift, *settings)", "F.conv2d(x, weight, None, *settings)"),
    "layers/positions.py": ("column / (column[:, :, -1:] + 1e-6)", "column / (column.shape[2] + 1e-6)"),
    "layers/positions.py octaves": ("MOST_WAVES**exponent", "2**exponent"),
    "layers/positions.py centres": ("inside[:, :, 0].sum(1, keepdim=True)", "inside.shape[1]"),
    "layers/positions.py none": (
        "return torch.zeros(batch, self.d_model",
        "return torch.ones(batch, self.d_model",
    ),
    "layers/positions.py once": (
        "return tokens + position, torch.zeros_like(position)",
        "return tokens + position, position",
    ),
    "layers/positions.py keys": (
        '"""Return the tokens as they are."""\n        return tokens',
        '"""Return the tokens as they are."""\n        return tokens + position',
    ),
    "layers/attention.py bias": (
        "~hidden if bias is None else bias.masked_fill(hidden, -torch.inf)",
        "~hidden if bias is None else bias",
    ),
    "layers/box_bias.py gaussian": (
        "middle = (centre + shape[..., :2] * size)",
        "middle = (centre + shape[..., :2])",
    ),
    "layers/box_bias.py rpb": (
        "along_one_axis(self.x, x, width, grid.columns)",
        "along_one_axis(self.x, x, height, grid.columns)",
    ),
    "layers/box_bias.py stretch": ("distance.sign() * torch.log2", "torch.log2"),
    "layers/residual.py": (
        "return x + self.dropout(part(self.norm(x)))",
        "return self.norm(x) + self.dropout(part(self.norm(x)))",
    ),
    "layers/residual.py none": (
        "return self.norm(self.dropout(part(x)))",
        "return self.norm(x + self.dropout(part(x)))",
    ),
    "models/backbones.py": (
        "blocks = [block(channels, width, stride, 1, norm)]",
        "blocks = [block(channels, width, stride, dilation, norm)]",
    ),
    "models/encoder.py": (
        "self.attention(x + position, x + position, x, key_padding=padding)",
        "self.attention(x + position, x + position, x + position, key_padding=padding)",
    ),
    "models/encoder.py none": (
        '"no_residual": (NoResidual, NoResidual)',
        '"no_residual": (NoResidual, PostNorm)',
    ),
    "models/encoder.py no part": (
        "nn.Identity(), NoPart()",
        "nn.Identity(), feed_forward_path(config.d_model, config.dropout)",
    ),
    "models/convnet.py": (
        "return F.relu(normed(self.conv, self.norm, x), inplace=True)",
        "return self.norm(F.relu(self.conv(x)))",
    ),
    "models/fusion.py": ("self.smooth(self.lateral(fine) + spread)", "self.smooth(self.lateral(fine)) + spread"),
    "models/detr.py": ("fused = self.fusion(coarse, maps)", "fused = coarse"),
    "models/queries.py": ("Start(content=torch.zeros_like(position)", "Start(content=position"),
    "models/queries.py content": ("position=torch.zeros_like(content)", "position=content"),
    "models/queries.py anchors": ("self.box.sigmoid()", "self.box"),
    "models/queries.py selected": (
        "self.category(tokens).masked_fill(memory.padding[..., None], SILENT)",
        "self.category(tokens)",
    ),
    "models/queries.py start": ("centre, size = boxes.detach().split", "centre, size = boxes.split"),
    "models/queries.py groups": ("else [self[0]]", "else [self[-1]]"),
    "models/detr.py hints": (
        "side_by_side([self.hints(hints, queries), start])",
        "side_by_side([start, self.hints(hints, queries)])",
    ),
    "models/detr.py proposals": (
        "stacked([start.proposals, predictions]) if",
        "stacked([predictions, start.proposals]) if",
    ),
    "models/queries.py pick": ("values.gather(1, chosen[", "values.gather(1, chosen.flip(1)["),
    "models/decoder.py": ("heads.of(index)(self.norm(content))", "heads.of(index)(content := self.norm(content))"),
    "models/decoder.py look": (
        "bias = self.box_bias(x, boxes_cxcywh",
        "bias = self.box_bias(x + position, boxes_cxcywh",
    ),
    "models/decoder.py groups": ("asking = apart(x + position, groups)", "groups, asking = 1, x + position"),
    "models/decoder.py shared": ("SamePath(self.self_attention_path) if", "attention_path(*path) if"),
    "models/decoder.py sum": ("(PostNorm, NoNorm)", "(PostNorm, PostNorm)"),
    "models/decoder.py heads": ('nn.Identity() if config.decoder_block == "shared_norm" else', ""),
    "models/decoder.py no part": ("nn.Identity(), NoPart()", "nn.Identity(), feed_forward_path(*path)"),
    "models/decoder.py relative": (
        "return move(moved, delta), seen, moved",
        "return (move(moved, delta),) * 3",
    ),
    "models/decoder.py refined": ("box.detach(), box.detach()", "box.detach(), box"),
    "models/decoder.py twice": ("own.detach(), own", "own, own"),
    "models/heads.py": ("hidden = F.relu(layer(hidden))", "hidden = layer(hidden)"),
    "models/heads.py move": ("clamp(-LARGEST_LOG, LARGEST_LOG).exp()", "exp()"),
    "models/heads.py own": ("return self[layer]", "return self[0]"),
    "models/memory.py": (
        "torch.arange(grid_w, device=padding.device) * width // grid_w",
        "(2 * torch.arange(grid_w, device=padding.device) + 1) * width // (2 * grid_w)",
    ),
    "structures.py": (".movedim(2, 1).flatten(0, 1)", ".movedim(2, 0).flatten(0, 1)"),
    "criterion/matcher.py": ("-logits.softmax(-1)", "-logits.sigmoid()"),
    "criterion/matcher.py focal": ("focal_positive(logits) - ", ""),
    "criterion/set_loss.py": ("iou(found_xyxy, truth_xyxy).detach()", "giou(found_xyxy, truth_xyxy).detach()"),
    "criterion/set_loss.py groups": ("1.0) * groups", "1.0)"),
    "criterion/classification.py": ("weight[-1] = no_object", "weight[0] = no_object"),
    "criterion/classification.py focal": ("logits.sigmoid() ** GAMMA", "logits.detach().sigmoid() ** GAMMA"),
    "criterion/classification.py varifocal": ("return overlap * F.binary", "return F.binary"),
    "criterion/classification.py ia_bce": (".clamp(min=SMALLEST_TARGET)", ""),
    "criterion/classification.py mal": (
        "one_and_a_half(logits.detach().sigmoid())",
        "one_and_a_half(logits.sigmoid())",
    ),
    "evaluation/coco.py": (
        "np.arange(1, len(annotations.annotation_ids) + 1)",
        "np.arange(len(annotations.annotation_ids))",
    ),
    "criterion/matcher.py taught wish": (
        "costs = cost.masked_fill(~wanted, torch.inf)[layer, image, query]",
        "costs = cost[layer, image, query]",
    ),
    "criterion/set_loss.py taught": ("objects=times * norm.objects", "objects=norm.objects"),
    "models/queries.py score": ("logits[0].detach().amax(-1", "logits[0].amax(-1"),
    "models/queries.py base": ("content=self.base + score", "content=score"),
    "models/queries.py taught": (
        "logits = self.taught_category(tokens).masked_fill(padding[..., None], SILENT)",
        "logits = self.taught_category(tokens)",
    ),
}


def run_checks(copy: Path) -> tuple[int, list[str]]:
    """Run the oracle on the copy and return its exit code and the checks that failed, the first one only."""
    files = [f"tests/oracle/{name}.py" for name in CHECKS]
    # values alone must tell: without the checks of shapes, which take as long again
    plainly = ["-o", "addopts=--import-mode=importlib", "-m", "not record"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *plainly, *files]
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
    file = copy / "src" / "lucidetr" / module.split()[0]
    source = file.read_text()
    where = source.rindex(right)
    file.write_text(source[:where] + wrong + source[where + len(right) :])
    code, failed = run_checks(copy)
    assert code == 1
    assert failed
    print(f"{module}: {wrong} → {failed[0]}")
