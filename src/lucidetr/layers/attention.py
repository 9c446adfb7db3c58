"""Multi-head attention with key padding (DETR, A.1; Vaswani et al. 2017, section 3.2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lucidetr.layers.dropout import dropout as drop


class MultiHeadAttention(nn.Module):
    """Give every query a mean of the values, weighted by how well their keys fit it, in several heads side by side.

    `num_heads × head_dim` need not equal `d_model`: queries, keys and values are projected to it, the output back.
    """

    def __init__(self, d_model: int, num_heads: int, head_dim: int, dropout: float):
        super().__init__()
        width = num_heads * head_dim
        self.query = nn.Linear(d_model, width)
        self.key = nn.Linear(d_model, width)
        self.value = nn.Linear(d_model, width)
        self.output = nn.Linear(width, d_model)
        self.num_heads = num_heads
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Xavier-uniform weights, zero biases.

        The paper's code keeps the three input projections in one matrix of 3d rows, whose Xavier bound is
        2^-½ of a separate matrix's; the gain keeps our separate ones at the paper's scale
        (exactly so where all heads together are as wide as d_model).
        """
        for projection in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.output.weight)
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Float[Tensor, "batch query d_model"],
        key: Float[Tensor, "batch key d_model"],
        value: Float[Tensor, "batch key d_model"],
        key_padding: Bool[Tensor, "batch key"] | None = None,
        bias: Float[Tensor, "batch head query key"] | None = None,
    ) -> Float[Tensor, "batch query d_model"]:
        """Return the attended values; `bias` is added to the scores, keys where `key_padding` is True are not seen."""
        attended = attend(
            self.split_heads(self.query(query)),
            self.split_heads(self.key(key)),
            self.split_heads(self.value(value)),
            mask=attention_mask(key_padding, bias),
            dropout=self.dropout if self.training else 0.0,
        )
        return self.output(attended.transpose(1, 2).flatten(2))

    def split_heads(self, x: Float[Tensor, "batch token inner"]) -> Float[Tensor, "batch head token head_dim"]:
        """Cut the last axis into heads and move them beside the batch."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def attention_mask(
    key_padding: Bool[Tensor, "batch key"] | None, bias: Float[Tensor, "batch head query key"] | None
) -> Tensor | None:
    """Return what to add to the scores: the bias and −∞ for padding; where there is no bias, which keys are seen."""
    if key_padding is None:
        return bias
    hidden = key_padding[:, None, None, :]
    return ~hidden if bias is None else bias.masked_fill(hidden, -torch.inf)


def attend(
    query: Float[Tensor, "batch head query head_dim"],
    key: Float[Tensor, "batch head key head_dim"],
    value: Float[Tensor, "batch head key head_dim"],
    *,
    mask: Tensor | None,
    dropout: float,
) -> Float[Tensor, "batch head query head_dim"]:
    """Return softmax(query · keyᵀ / √head_dim + mask) · value; a mask of booleans says which keys are seen.

    This is the fused kernel, but on a CPU separate steps for bfloat16, which it computes in two to five times their
    time, and for dropout, which it does not fuse.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if query.device.type != "cpu" or (query.dtype != torch.bfloat16 and not dropout):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return drop(scores.softmax(-1).to(value.dtype), dropout) @ value
