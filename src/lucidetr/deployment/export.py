"""Export: a file that predicts without this package, its card inside, compared with its model before it is kept."""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from jaxtyping import Bool, Float, UInt8
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lucidetr.config import ModelCard
from lucidetr.data.preprocessing import make_batch, prepare
from lucidetr.deployment.exported import CARD, EXTRA, OUTPUTS, open_exported, sides
from lucidetr.errors import InputError, imported
from lucidetr.fields import to_dict
from lucidetr.models.backbones import ResNet
from lucidetr.models.detr import DETR
from lucidetr.models.postprocess import postprocess
from lucidetr.structures import Predictions
from lucidetr.training.checkpoint import write_atomically

ALLOWED = 1e-4
TOGETHER = 3  # pictures in the one padded batch of the comparison
POOLS = "2.13.0a0"  # the first torch that exports a max pool for any height and width
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")


class LastLayer(nn.Module):
    """Return the last layer's answer alone, as two tensors: what an exported file computes."""

    def __init__(self, model: DETR):
        super().__init__()
        self.model = model

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], padding: Bool[Tensor, "batch height width"]
    ) -> tuple[Float[Tensor, "batch query category"], Float[Tensor, "batch query 4"]]:
        """Return logits and boxes_cxcywh."""
        predictions = self.model(images, padding)
        return predictions.logits[-1], predictions.boxes_cxcywh[-1]


def trace(model: DETR) -> ExportedProgram:
    """Return a model's graph for any number of images of any height and width from `sides` on.

    No parameter may ask for a gradient: the layout of attention's output would depend on it. A ResNet asks for
    torch 2.13; an older one is an InputError.
    """
    if isinstance(model.backbone, ResNet) and torch.__version__ < POOLS:
        raise InputError(
            f"torch {torch.__version__} cannot export {model.config.backbone.name} for any height and width: "
            f"pip install 'torch>=2.13', or train one without a ResNet (lucid-xs, lucid-s)"
        )
    last = LastLayer(copy.deepcopy(model)).eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    least, most = sides(model.config)
    shape = (2, least + 31, least + 63) if most is None else (2, least, least + 1)
    images, padding = torch.zeros(2, 3, *shape[1:]), torch.zeros(shape, dtype=torch.bool)
    batch, height, width = Dim("batch"), Dim("height", min=least, max=most), Dim("width", min=least, max=most)
    shapes = {"images": {0: batch, 2: height, 3: width}, "padding": {0: batch, 1: height, 2: width}}
    with torch.no_grad(), quiet():
        program = torch.export.export(last, (images, padding), dynamic_shapes=shapes, strict=False)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def quiet() -> warnings.catch_warnings:
    """Return what to open around an exporter: it warns of its own insides, which nobody here can change."""
    return warnings.catch_warnings(action="ignore")


def group_norm(
    x: Float[Tensor, "batch channel h w"],
    groups: int,
    weight: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"],
    eps: float,
    cudnn_enabled: bool,
) -> Float[Tensor, "batch channel h w"]:
    """Return group norm by means of means, one axis at a time.

    torch's exporter writes it as instance norm, and engines sum its whole group in one go: on large maps whose values
    lie far from zero, that was ten to a hundred times less exact than torch.
    """
    x = x.unflatten(1, (groups, -1))
    x = x - mean_of_means(x)
    x = x * (mean_of_means(x.square()) + eps).rsqrt()
    return x.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]


def mean_of_means(x: Float[Tensor, "batch group channel h w"]) -> Float[Tensor, "batch group 1 1 1"]:
    """Return the mean over each group of channels, over one axis after the other."""
    return x.mean(-1, keepdim=True).mean(-2, keepdim=True).mean(-3, keepdim=True)


def metadata(card: ModelCard) -> dict[str, str]:
    """Return what a file says of itself, as JSON: the card, and from it preprocessing and categories, for others."""
    values = to_dict(card)
    parts = {"card": values, "images": values["images"], "categories": values["categories"]}
    return {name: json.dumps(part) for name, part in parts.items()}


def write_onnx(program: ExportedProgram, about: Mapping[str, str], path: Path) -> None:
    """Write an ONNX file, weights and all."""
    for name in ("onnx", "onnxscript"):
        imported(name, EXTRA)
    with quiet():
        written = torch.onnx.export(
            program.run_decompositions({torch.ops.aten.group_norm.default: group_norm}),
            dynamo=True,
            input_names=["images", "padding"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    assert written is not None
    axes = written.model.graph.inputs[0].shape
    assert axes is not None
    written.rename_axes({str(axes[0]): "batch", str(axes[2]): "height", str(axes[3]): "width"})
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine
    written.model.metadata_props.update(about)
    written.save(path, external_data=False)


def write_openvino(program: ExportedProgram, about: Mapping[str, str], path: Path) -> None:
    """Write an OpenVINO model, PATH and its weights beside it, from the same graph by way of ONNX."""
    imported("openvino", EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / "model.onnx"
        write_onnx(program, about, between)
        onnx_to_openvino(between, about, path)


def onnx_to_openvino(source: Path, about: Mapping[str, str], path: Path) -> None:
    """Write an ONNX file's graph as an OpenVINO model, its weights in float32."""
    openvino = imported("openvino", EXTRA)
    model = openvino.Core().read_model(source)
    for name, text in about.items():
        model.set_rt_info(text, [CARD[0], name])
    openvino.save_model(model, path, compress_to_fp16=False)


def write_torch(program: ExportedProgram, about: Mapping[str, str], path: Path) -> None:
    """Write the graph as torch keeps it; the metadata are its extra files."""
    with quiet():
        torch.export.save(program, path, extra_files=dict(about))


WRITERS = {"onnx": write_onnx, "openvino": write_openvino, "torch": write_torch}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}


@dataclass(frozen=True)
class Agreement:
    """Hold how far an exported file and its model are apart on one batch."""

    batch: int
    height: int
    width: int
    logits: float
    """Largest difference, as a share of the largest logit, or of 1 where that is larger."""
    boxes: float
    """Largest difference, as a fraction of the picture."""
    scores: float
    """Largest difference of the detections' scores, best first."""


@dataclass(frozen=True)
class Parity:
    """Hold the comparison of an exported file with its model, as it is written beside the file."""

    recipe: str
    format: str
    pictures: str
    """Where the compared pictures are from."""
    allowed: float
    logits: float
    boxes: float
    scores: float
    versions: dict[str, str]
    batches: list[Agreement]


def differences(found: Predictions, truth: Predictions) -> tuple[float, float]:
    """Return the largest difference of the last layers' logits, as a share of the scale, and of their boxes.

    Predictions are a set: queries chosen by scores that differ in the last digit may come in another order. So each
    is compared with its match, the most alike pairing of an image's queries.
    """
    scale = max(1.0, truth.logits[-1].abs().max().item())
    logits = (found.logits[-1][:, :, None] - truth.logits[-1][:, None]).abs().amax(-1) / scale
    boxes = (found.boxes_cxcywh[-1][:, :, None] - truth.boxes_cxcywh[-1][:, None]).abs().amax(-1)
    logits, boxes = (each.nan_to_num(nan=1e9, posinf=1e9) for each in (logits, boxes))
    worst_logits = worst_boxes = 0.0
    for of_logits, of_boxes in zip(logits, boxes, strict=True):
        pairs = linear_sum_assignment((of_logits + of_boxes).numpy())
        worst_logits = max(worst_logits, of_logits[pairs].max().item())
        worst_boxes = max(worst_boxes, of_boxes[pairs].max().item())
    return worst_logits, worst_boxes


@torch.no_grad()
def compare(
    exported: nn.Module, model: DETR, card: ModelCard, pictures: Sequence[UInt8[Tensor, "3 _ _"]]
) -> list[Agreement]:
    """Return how far an exported file and its model are apart on each picture alone, and on some in a padded batch."""
    samples = [prepare(picture, card.images) for picture in pictures]
    groups = [[sample] for sample in samples]
    if len(samples) > 1:
        groups.append(samples[:TOGETHER])
    agreements = []
    for group in groups:
        batch = make_batch(group, card.images)
        found, truth = (each(batch.images, batch.padding) for each in (exported, model))
        logits, boxes = differences(found, truth)
        scores = max(
            (one.scores - other.scores).abs().max().item()
            for one, other in zip(
                *(postprocess(each, batch.sizes, card.categories) for each in (found, truth)), strict=True
            )
        )
        _, _, height, width = batch.images.shape
        agreements.append(Agreement(len(group), height, width, logits, boxes, scores))
    return agreements


def installed(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def export(
    model: DETR, card: ModelCard, form: str, out: Path, pictures: Sequence[UInt8[Tensor, "3 _ _"]], source: str
) -> Parity:
    """Write a model (in float32, on the CPU) as an exported file, once it agrees with the model on every picture.

    The figures are written beside it, into OUT.parity.json. A file that is further than 1e-4 from its model, relative
    to the scale of logits and boxes, is not written; that is an InputError. `source` says where the pictures are from.
    """
    versions = installed(PACKAGES[:1] if form == "torch" else PACKAGES)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
        draft = Path(folder) / out.name
        WRITERS[form](trace(model), metadata(card), draft)
        exported, _, _ = open_exported(draft, "fp32")
        batches = compare(exported, model.eval(), card, pictures)
        worst = {name: max(getattr(each, name) for each in batches) for name in ("logits", "boxes", "scores")}
        if any(value > ALLOWED for value in worst.values()):
            far = max(batches, key=lambda each: max(each.logits, each.boxes, each.scores))
            raise InputError(
                f"{out}: not written, the file and the model differ by {worst['logits']:.1e} of the logits' scale, "
                f"{worst['boxes']:.1e} of a picture and {worst['scores']:.1e} in scores, more than {ALLOWED:g} "
                f"(most on {far.batch} × {far.height} × {far.width}, {source}); try another --format"
            )
        for file in sorted(Path(folder).iterdir()):  # OpenVINO's weights before the .xml that names them
            os.replace(file, out.with_name(file.name))
    parity = Parity(card.recipe, form, source, ALLOWED, **worst, versions=versions, batches=batches)
    write_atomically(out.with_name(f"{out.name}.parity.json"), json.dumps(asdict(parity), indent=1).encode())
    return parity
