"""Pictures in memory become pixels of their own, or are refused in words."""

import numpy as np
import pytest
import torch
from PIL import Image

from lucidetr.data.decoding import as_image
from lucidetr.errors import InputError

PIXELS = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def test_a_pillow_image_that_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    damaged, closed = Image.open(path), Image.fromarray(PIXELS)
    closed.close()
    for image in (damaged, closed, Image.new("La", (5, 4))):
        with pytest.raises(InputError, match="a Pillow image that cannot be read"):
            as_image(image)
    damaged.close()
    with pytest.raises(InputError, match="has no pixels"):
        as_image(Image.new("RGB", (0, 5)))


def test_an_array_that_must_not_be_written_to_is_taken_without_a_warning():
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1)
    read_only = np.asarray(Image.fromarray(PIXELS))
    assert not read_only.flags.writeable
    for array in (read_only, np.rot90(np.rot90(PIXELS), -1)):
        assert torch.equal(as_image(array), expected)
    assert as_image(PIXELS).is_contiguous()


def test_the_pixels_of_an_array_are_a_copy():
    array = np.zeros((1, 1, 3), dtype=np.uint8)
    image = as_image(array)
    array += 1
    assert not image.any()


def test_a_tensor_on_a_gpu_is_fetched(monkeypatch):
    fetched = torch.ones(3, 4, 5, dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: fetched)  # in place of a GPU
    assert as_image(torch.zeros(3, 4, 5, dtype=torch.uint8)) is fetched
