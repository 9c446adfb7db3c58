"""lucidetr convert: other projects' weights to ours, and ours to theirs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lucidetr.errors import InputError


@dataclass(frozen=True)
class Options:
    """Convert weights; what kind the source is, is seen by the names inside."""

    source: Annotated[str, tyro.conf.Positional]
    """facebookresearch/detr .pth, Hugging Face DetrForObjectDetection folder, torchvision ResNet .pth, or ours."""
    out: Annotated[str, tyro.conf.Positional]
    """A .safetensors file; with --to hugging-face a folder, with --to facebook a .pth file."""
    to: Literal["lucidetr", "hugging-face", "facebook"] = "lucidetr"
    dilation: bool | None = None
    """DC5: only for a facebookresearch file that does not say."""
    num_heads: int | None = None
    """Only for a facebookresearch file that does not say."""


def run(arguments: list[str]) -> None:
    """Convert and say what came out."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr convert")

    from lucidetr.conversion.convert import convert, export_facebook, export_hugging_face
    from lucidetr.training.checkpoint import has_card, load_model, save_model

    source, out = Path(options.source), Path(options.out)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if out.exists():
        raise InputError(f"{out} exists already; choose another name")
    if has_card(source):
        if options.dilation is not None or options.num_heads is not None:
            raise InputError(f"{source} says itself what it is: leave --dilation and --num-heads out")
        state, card = load_model(source)
    else:
        converted = convert(source, options.dilation, options.num_heads)
        state, card = converted.state, converted.card
        for note in converted.notes:
            print(note)
    if options.to == "hugging-face":
        export_hugging_face(state, card, out)
    elif options.to == "facebook":
        export_facebook(state, card, out)
    else:
        if out.suffix != ".safetensors":
            raise InputError(f"{out}: give the file a name that ends in .safetensors")
        save_model(out, state, card)
    parameters = sum(tensor.numel() for tensor in state.values())
    what = f"{len(card.categories)} categories" if card.categories else "a backbone alone"
    print(f"{out}: {card.recipe}, {len(state)} tensors of {parameters:,} numbers, {what}")
