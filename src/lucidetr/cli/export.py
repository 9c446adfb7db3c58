"""lucidetr export: a model as one file for ONNX Runtime, OpenVINO or torch, compared with itself before it is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lucidetr.errors import InputError
from lucidetr.fields import HUGE, check_ranges

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Export a model for any number of pictures of any size; the file is kept only if it agrees with the model."""

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, or a model file."""
    format: Literal["onnx", "openvino", "torch"] = "onnx"
    out: str = ""
    """The file: .onnx, .xml (OpenVINO, its weights beside it as .bin) or .pt2 (torch). Left out: model.* in the run's
    folder."""
    pictures: int = 8
    """So many of the run's validation pictures are compared; of generated scenes where these cannot be read."""


def run(arguments: list[str]) -> None:
    """Export, compare, say how well both agree."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr export")
    check_ranges(options, "--", {"pictures": (1, HUGE)})

    from lucidetr.deployment.detector import load
    from lucidetr.deployment.export import SUFFIXES, export
    from lucidetr.models.detr import DETR

    source = Path(options.run)
    folder = source if source.is_dir() else source.parent
    suffix = SUFFIXES[options.format]
    out = Path(options.out) if options.out else folder / f"model{suffix}"
    if out.suffix != suffix:
        raise InputError(f"--out {out}: give a file of --format {options.format} a name that ends in {suffix}")
    written = [out, out.with_name(f"{out.name}.parity.json")]
    if options.format == "openvino":
        written.append(out.with_suffix(".bin"))
    for file in written:
        if file.exists():
            raise InputError(f"{file} exists already; choose another name")
    if source.suffix in SUFFIXES.values():
        raise InputError(f"{source} is an exported model itself; give the run that it came from")
    detector = load(source, device="cpu", precision="fp32")
    name, pictures = some_pictures(folder, options.pictures)
    assert isinstance(detector.model, DETR)
    parity = export(detector.model, detector.card, options.format, out, pictures, name)
    files = [file for file in written if file.suffix != ".json"]
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{' and '.join(map(str, files))}: {detector.card.recipe}, {size:.1f} MB, {options.format}")
    print(
        f"agrees with the model on {len(pictures)} pictures of {name}: "
        f"logits within {parity.logits:.1e}, boxes within {parity.boxes:.1e}, scores within {parity.scores:.1e}"
    )
    print(f"figures: {out}.parity.json")


def some_pictures(folder: Path, number: int) -> "tuple[str, list[Tensor]]":
    """Return the name of the run's validation split, else of generated scenes, and pictures spread over it."""
    from lucidetr.data.dataset import evenly, open_dataset, open_training_data
    from lucidetr.training.run_log import asked_of

    try:
        if (asked := asked_of(folder)) and (dataset := open_training_data(asked)[1]):
            return dataset.name, [dataset.image(index) for index in evenly(len(dataset), number)]
    except InputError as error:  # of the data, or of one of these pictures
        print(f"the run's data cannot be read, generated scenes are compared instead ({error})")
    dataset = open_dataset("generated:digits", "val")  # there is none, or no picture in it
    return dataset.name, [dataset.image(index) for index in evenly(len(dataset), number)]
