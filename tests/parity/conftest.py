"""What the parity tests share: random weights that leave no tensor at its default, and pictures of odd sizes."""

import os
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach for the network

import pytest
import torch
from torch import Tensor, nn

QUERIES = ("query_embed.weight", "query_position_embeddings.weight", "queries.position")
SHARP = ("in_proj", "q_proj", "k_proj", ".query.", ".key.")
MIXERS = (".o_proj.weight", ".out_proj.weight", ".attention.output.weight")


def linear_gain(name: str) -> float:
    """Return how large a linear map's weights are drawn, for queries that say different things in the end.

    Attention is sharp, and the encoder mixes the tokens little: after six layers they would all be the same.
    """
    if "encoder.layers." in name and name.endswith(MIXERS):
        return 0.1
    return 2.5 if any(part in name for part in SHARP) else 1.4


def randomise(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a network and fill every tensor, batch-norm statistics too, with values that keep activations in range.

    It is built without memory first: the usual initial values would be drawn for nothing.
    """
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                tensor.zero_()  # counts of batches
                continue
            normal = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.ndim == 1:
                tensor.copy_(normal * 0.1)
            elif tensor.ndim == 4:
                tensor.copy_(normal * tensor[0].numel() ** -0.5)
            elif name.endswith(QUERIES):
                tensor.copy_(normal)
            else:
                tensor.copy_(normal * linear_gain(name) * tensor.shape[-1] ** -0.5)
    return module.eval()


@pytest.fixture(scope="session")
def randomised():
    return randomise


def picture(height: int, width: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return one image and its padding, of which there is none."""
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return images, torch.zeros(1, height, width, dtype=torch.bool)


def padded_batch(height: int, width: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return three images, of which two are smaller and padded to the right, below, or both."""
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(seed))
    padding = torch.zeros(3, height, width, dtype=torch.bool)
    padding[1, height * 2 // 3 :] = True
    padding[2, height - 7 :] = True
    padding[2, :, width // 2 + 3 :] = True
    return images.masked_fill(padding[:, None], 0.0), padding


@pytest.fixture(scope="session")
def pictures() -> list[tuple[Tensor, Tensor]]:
    """Images and padding in each of the ways that matter: one, one of odd sides, several of unequal size."""
    return [picture(64, 96), picture(75, 101), padded_batch(85, 115)]


@pytest.fixture(scope="session")
def larger_pictures() -> list[tuple[Tensor, Tensor]]:
    return [picture(320, 416), picture(333, 427), padded_batch(331, 427)]
