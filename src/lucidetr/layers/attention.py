"""Multi-head attention with key padding (DETR, A.1; Vaswani et al. 2017, section 3.2)."""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHeadAttention(nn.Module):
    """Let every query take a weighted mean of the values whose keys resemble it, in several heads side by side.

    `num_heads × head_dim` is free of `d_model`: queries, keys and values are projected to it, the output back.
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
        2^-½ of a separate matrix's; the gain keeps our separate ones at the paper's scale.
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
    ) -> Float[Tensor, "batch query d_model"]:
        """Return the attended values; keys where `key_padding` is True are not seen."""
        visible = None if key_padding is None else ~key_padding[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            self.split_heads(self.query(query)),
            self.split_heads(self.key(key)),
            self.split_heads(self.value(value)),
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(attended.transpose(1, 2).flatten(2))

    def split_heads(self, x: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch head token head_dim"]:
        """Cut the last axis into heads and move them beside the batch."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
