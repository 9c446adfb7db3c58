"""What torch.compile writes computes the same: gradients of a training step, and a detector's boxes.

In processes of their own: shapes are checked in this one, and a compiler cannot follow the checks.
"""

import subprocess
import sys

import pytest

GRADIENTS = """
import torch
from dataclasses import replace
from lucidetr.data.dataset import open_dataset
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe
from lucidetr.training.memory import add_gradients, largest_batch
from lucidetr.training.precision import autocast
from lucidetr.training.recompute import recompute

torch.manual_seed(0)
config = recipe("lucid-xs")
config = replace(config, images=replace(config.images, size=64, max_size=64))
batch = largest_batch(config, open_dataset("generated:digits?train=4&val=1&size=64", "train").annotations, 2)
model = DETR(config.model).train()
precision = autocast("fp32", torch.device("cpu"))
found = []
sparing = DETR(config.model).train()
sparing.load_state_dict(model.state_dict())
recompute(sparing, compiled=True)
# as it is, with --compile, and with --recompute --compile
for model, computing in (
    (model, model),
    (model, torch.compile(model, backend="BACKEND")),
    (sparing, torch.compile(sparing, backend="BACKEND")),
):
    model.zero_grad()
    add_gradients(config, computing, batch, precision, batch.counts.tolist())
    found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
eager, *others = found
largest = max(float(g.abs().max()) for g in eager.values())
for other in others:
    assert eager.keys() == other.keys()
    worst = max(float((eager[name] - other[name]).abs().max()) for name in eager) / largest
    assert worst < 1e-4, worst
assert int(sparing.backbone.stem.norm.num_batches_tracked) == 1, "a batch was counted twice"
"""

BOXES = """
import numpy as np
import torch
from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard
from lucidetr.deployment.detector import Detector
from lucidetr.models.detr import DETR
from lucidetr.recipes import recipe

torch.manual_seed(0)
model = DETR(recipe("detr-xs").model).eval()
names = tuple(map(str, range(recipe("detr-xs").model.num_classes)))
categories = Categories(tuple(range(len(names))), names)
card = ModelCard(model.config, ImageConfig(size=64, max_size=96), categories, "detr-xs")
eager, compiled = (Detector(model, card, "cpu", "fp32", engine) for engine in ("torch", "compile"))
for height, width in ((64, 64), (64, 90), (90, 64)):
    picture = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    one, two = eager.predict(picture), compiled.predict(picture)
    torch.testing.assert_close(two.scores, one.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(two.boxes_xyxy, one.boxes_xyxy, rtol=0, atol=1e-2)
print(height, width)
"""


@pytest.mark.parametrize(
    "program",
    [
        # all of the compiler but its last step, which writes machine code for minutes
        pytest.param(GRADIENTS.replace("BACKEND", "aot_eager"), id="gradients", marks=pytest.mark.slow),
        pytest.param(GRADIENTS.replace("BACKEND", "inductor"), id="machine code", marks=pytest.mark.record),
        pytest.param(BOXES, id="boxes", marks=pytest.mark.slow),
    ],
)
def test_compiled_code_computes_the_same(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
