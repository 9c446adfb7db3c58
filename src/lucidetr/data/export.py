"""Generated scenes as a COCO folder, so that any other program can train on the same files."""

from pathlib import Path

import numpy as np
from PIL import Image

from lucidetr.data.coco import write_coco
from lucidetr.data.dataset import open_dataset
from lucidetr.data.digits import SPLITS
from lucidetr.errors import InputError


def write_generated(source: str, folder: Path) -> dict[str, int]:
    """Write annotations/SPLIT.json and lossless SPLIT/NUMBER.png; return the number of images of each split."""
    if not source.startswith("generated:"):
        raise InputError(f"{source}: only generated data can be written, for example generated:digits")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; choose a new folder")
    counts = {}
    for split in SPLITS:
        dataset = open_dataset(source, split)
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(dataset.annotations.file_names):
            pixels = np.ascontiguousarray(dataset.image(index).permute(1, 2, 0).numpy())
            Image.fromarray(pixels).save(folder / split / str(name))
        write_coco(dataset.annotations, folder / "annotations" / f"{split}.json")
        counts[split] = len(dataset)
    return counts
