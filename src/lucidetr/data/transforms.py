"""Random changes of training images and their boxes (DETR, section 4), as torchvision transforms.

Every sample has its own random seed, so its changes do not depend on which process makes it, or when.
"""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lucidetr.config import AugmentationConfig, ImageConfig
from lucidetr.data.preprocessing import resized_size
from lucidetr.errors import InputError
from lucidetr.structures import Target


class ResizeShortSide(v2.Transform):
    """Resize to a short side drawn from `scales`, by the same rule as in evaluation."""

    def __init__(self, scales: tuple[int, ...], images: ImageConfig):
        super().__init__()
        self.scales, self.images = scales, images

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the scale."""
        height, width = v2.query_size(flat_inputs)
        scale = self.scales[int(torch.randint(len(self.scales), ()))]
        return {"size": list(resized_size(height, width, self.images, scale))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or boxes."""
        return self._call_kernel(v2.functional.resize, inpt, params["size"], antialias=True)


class RandomSizeCrop(v2.Transform):
    """Cut out a part whose height and width are drawn from `sides`, anywhere in the picture."""

    def __init__(self, sides: tuple[int, int]):
        super().__init__()
        self.sides = sides

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw size and place of the crop; a side shorter than the range is kept whole."""
        whole = v2.query_size(flat_inputs)
        size = [_integer(min(self.sides[0], side), min(self.sides[1], side)) for side in whole]
        top, left = (_integer(0, side - part) for side, part in zip(whole, size, strict=True))
        return {"top": top, "left": left, "height": size[0], "width": size[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image or boxes."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


def _integer(low: int, high: int) -> int:
    """Draw an integer from low … high, both included."""
    return int(torch.randint(low, high + 1, ()))


class QuarterTurn(v2.Transform):
    """Turn by 90° to the left or to the right."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the direction."""
        return {"angle": float(_integer(0, 1) * 180 - 90)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn an image or boxes; height and width change places."""
        if isinstance(inpt, tv_tensors.BoundingBoxes) and not len(inpt):  # none: torchvision would keep their canvas
            height, width = inpt.canvas_size
            return tv_tensors.wrap(inpt, like=inpt, canvas_size=(width, height))
        return self._call_kernel(v2.functional.rotate, inpt, params["angle"], expand=True)


class Augmentation:
    """Change and resize training images one by one: to any size, with crops and scales, but without mosaics."""

    def __init__(self, config: AugmentationConfig, images: ImageConfig):
        for name, wanted in (("mosaic", config.mosaic > 0), ("start_size", config.start_size < 1)):
            if wanted:
                raise InputError(
                    f"augmentation.{name} = {getattr(config, name)} needs images of one square side: "
                    "choose images.resize = square, augmentation.crop = 0 and no augmentation.scales"
                )
        self.config = config
        steps: list[Any] = []
        if config.flip:
            steps.append(v2.RandomHorizontalFlip(config.flip))
        if config.flip_vertical:
            steps.append(v2.RandomVerticalFlip(config.flip_vertical))
        if config.turn:
            steps.append(v2.RandomApply([QuarterTurn()], p=config.turn))
        if config.crop:
            crop = [ResizeShortSide(config.crop_scales, images), RandomSizeCrop(config.crop_sides)]
            steps.append(v2.RandomApply(crop, p=config.crop))
        steps.append(ResizeShortSide(config.scales or (images.size,), images))
        if config.zoom or config.shift:
            grey = [255 * channel for channel in images.mean]
            scale, shift = (1 - config.zoom, 1 + config.zoom), (config.shift, config.shift)
            bilinear = v2.InterpolationMode.BILINEAR
            steps.append(v2.RandomAffine([0.0, 0.0], translate=shift, scale=scale, fill=grey, interpolation=bilinear))
        if config.colour:
            steps.append(v2.ColorJitter(config.colour, config.colour, config.colour))
        self.steps = v2.Compose([*steps, v2.ClampBoundingBoxes()])

    def __call__(
        self, image: UInt8[Tensor, "3 height width"], target: Target, seed: int
    ) -> tuple[UInt8[Tensor, "3 h w"], Target]:
        """Return the changed image and target, without what lies outside; the same seed gives the same change."""
        height, width = image.shape[-2:]
        canvas: dict[str, Any] = {"format": "XYXY", "canvas_size": (height, width)}
        boxes = tv_tensors.BoundingBoxes(target.boxes_xyxy, **canvas)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' dropout, too
            out = self.steps({"image": tv_tensors.Image(image), "boxes": boxes, "labels": target.labels})
        moved = out["boxes"].as_subclass(Tensor).float()
        left = (moved[:, 2:] > moved[:, :2]).all(1)  # however little: DETR's code drops what has no area
        return out["image"].as_subclass(Tensor), Target(moved[left], out["labels"][left])
