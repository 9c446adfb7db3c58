"""Exported files that predict, behind the calling convention of `DETR`: ONNX Runtime, OpenVINO, torch.export."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lucidetr.config import ModelCard, ModelConfig
from lucidetr.errors import InputError, imported
from lucidetr.structures import Predictions
from lucidetr.training.checkpoint import read_card
from lucidetr.training.precision import choose_precision

OUTPUTS = ("logits", "boxes_cxcywh")
EXTRA = "'lucidetr[export]'"  # what brings these packages
CARD = ["lucidetr", "card"]  # where OpenVINO keeps it
Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Exported(nn.Module):
    """Predict by an exported file, on the CPU: images and padding in, predictions of one layer out, the last."""

    def __init__(self, compute: Compute, card: ModelCard, origin: tuple[Path, str] | None = None):
        super().__init__()
        self.compute, self.origin = compute, origin
        self.least, self.most = sides(card.model)
        # whoever runs a network asks its parameters for device and number format
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle the file's place and the precision: it is opened anew."""
        return (_open_again, self.origin) if self.origin else super().__reduce__()

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "batch 3 height width"], padding: Bool[Tensor, "batch height width"]
    ) -> Predictions:
        """Return logits and boxes of the last layer; a side that the file does not take is an InputError."""
        height, width = images.shape[-2:]
        if min(height, width) < self.least or (self.most and max(height, width) > self.most):
            upper = f" and at most {self.most}" if self.most else ""
            raise InputError(
                f"an input of {height} × {width} pixels (height × width, after the resize): this exported model takes "
                f"sides of at least {self.least}{upper}; use the run itself for such pictures"
            )
        logits, boxes_cxcywh = self.compute(images.contiguous(), padding.contiguous())
        return Predictions(logits=logits[None], boxes_cxcywh=boxes_cxcywh[None])


def sides(config: ModelConfig) -> tuple[int, int | None]:
    """Return the shortest and the longest side, in pixels, that an exported model takes; None: no limit.

    The graph is written for at least two cells along each side of the coarsest map and for as many tokens as queries
    choose from, and a learned position knows only so many cells.

    >>> sides(ModelConfig()), sides(ModelConfig(position="learned", position_table=40))
    ((33, None), (33, 1280))
    """
    strides = config.backbone.strides
    least = strides[-1] + 1
    if config.selects:
        cells = math.isqrt(config.num_queries - 1) + 1
        stride = config.fused[-1] if config.fused else strides[-1]
        least = max(least, (cells - 1) * stride + 1)
    finest = config.fused[-1] if config.fused else strides[-1]
    return least, config.position_table * finest if config.position == "learned" else None


def open_exported(path: Path, precision: str = "auto") -> tuple[Exported, ModelCard, str]:
    """Open a file that `lucidetr export` wrote; return what predicts, its card, and the precision that it computes in.

    Only OpenVINO computes in bf16. A .pt2 file is a program: open only files whose origin you trust.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    computes = ("fp32", "bf16") if path.suffix == ".xml" else ("fp32",)
    if precision not in ("auto", *computes):
        raise InputError(
            f"--precision {precision}: {path} computes in {' or '.join(computes)}"
            f"{'' if 'bf16' in computes else '; export --format openvino for bf16'}"
        )
    precision = choose_precision(precision, torch.device("cpu")) if len(computes) > 1 else "fp32"
    compute, metadata = OPENERS[path.suffix](path, precision)
    if not metadata.get("card"):
        raise InputError(f"{path}: this file carries no lucidetr card; lucidetr export writes files that do")
    card = read_card(path, metadata["card"])
    return Exported(compute, card, (path.absolute(), precision)), card, precision


def _open_again(path: Path, precision: str) -> Exported:
    return open_exported(path, precision)[0]


def open_onnx(path: Path, precision: str) -> tuple[Compute, dict[str, str]]:
    """Open an ONNX file with ONNX Runtime; return what computes, and the metadata."""
    runtime = imported("onnxruntime", EXTRA)
    failures = imported("onnxruntime.capi.onnxruntime_pybind11_state", EXTRA)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
    except (
        failures.Fail,
        failures.InvalidProtobuf,
        failures.InvalidGraph,
        failures.InvalidArgument,
        UnicodeDecodeError,  # of damaged names
    ) as error:
        raise unreadable(path, error) from None

    def compute(images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {"images": images.float().cpu().numpy(), "padding": padding.cpu().numpy()}
        logits, boxes_cxcywh = session.run(list(OUTPUTS), inputs)
        return torch.from_numpy(logits), torch.from_numpy(boxes_cxcywh)

    return compute, metadata


def open_openvino(path: Path, precision: str) -> tuple[Compute, dict[str, str]]:
    """Open an OpenVINO model, an .xml file with its weights in a .bin file beside it; likewise."""
    openvino = imported("openvino", EXTRA)
    core = openvino.Core()
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise InputError(f"{path}: its weights {weights} are not there; OpenVINO needs both files in one folder")
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise unreadable(path, error) from None
    # left alone, OpenVINO takes bfloat16 wherever the processor has it
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(model, "CPU", hints)

    def compute(images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        found = compiled({"images": images.float().cpu().numpy(), "padding": padding.cpu().numpy()})
        logits, boxes_cxcywh = (torch.from_numpy(found[name]) for name in OUTPUTS)
        return logits, boxes_cxcywh

    return compute, {"card": model.get_rt_info(CARD).astype(str)} if model.has_rt_info(CARD) else {}


def open_torch(path: Path, precision: str) -> tuple[Compute, dict[str, str]]:
    """Open a program that torch.export wrote; likewise."""
    metadata = {"card": ""}
    try:
        module = torch.export.load(path, extra_files=metadata).module()
    except (BadZipFile, RuntimeError, ValueError, AssertionError, KeyError) as error:  # all are raised on damaged files
        raise unreadable(path, error) from None
    return lambda images, padding: module(images.float().cpu(), padding.cpu()), metadata


def unreadable(path: Path, error: Exception) -> InputError:
    """Return what to say of a file that an engine cannot read."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1 if lines[0].startswith("Exception from") else 0]  # OpenVINO's first says where, its last why
    return InputError(f"{path}: not a model that can be read ({reason}); export it again")


OPENERS = {".onnx": open_onnx, ".xml": open_openvino, ".pt2": open_torch}
