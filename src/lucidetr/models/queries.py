"""The object queries: what the decoder starts from (DETR, section 3.2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig


class LearnedQueries(nn.Module):
    """Start every query with empty content and its own learned position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.position = nn.Parameter(torch.randn(config.num_queries, config.d_model))

    def forward(self, batch: int) -> tuple[Float[Tensor, "batch query d_model"], Float[Tensor, "batch query d_model"]]:
        """Return content and position of the queries, the same for every image."""
        position = self.position.expand(batch, -1, -1)
        return torch.zeros_like(position), position
