"""The encoder: every image position attends to every other (DETR, A.3 and figure 10)."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.feed_forward import FeedForward
from lucidetr.layers.residual import NoNorm, NoPart, NoResidual, PostNorm, PreNorm

# the residual path around the attention, and the one around the feed-forward
ENCODER_BLOCKS = {
    "post_norm": (PostNorm, PostNorm),
    "pre_norm": (PreNorm, PreNorm),
    "end_norm": (NoNorm, PostNorm),
    "no_residual": (NoResidual, NoResidual),
}


class EncoderLayer(nn.Module):
    """Mix the tokens by self-attention, then change each by itself."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        attention_path, feed_forward_path = ENCODER_BLOCKS[config.encoder_block]
        self.attention = MultiHeadAttention(config.d_model, config.num_heads, config.head_dim, config.dropout)
        self.attention_path = attention_path(config.d_model, config.dropout)
        if config.feed_forward:
            self.feed_forward = FeedForward(config.d_model, config.feed_forward, config.dropout)
            self.feed_forward_path = feed_forward_path(config.d_model, config.dropout)
        else:
            self.feed_forward, self.feed_forward_path = nn.Identity(), NoPart()

    def forward(
        self,
        tokens: Float[Tensor, "batch token d_model"],
        position: Float[Tensor, "batch token d_model"],
        padding: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token d_model"]:
        """Return the changed tokens; positions are added to queries and keys, never to values."""
        tokens = self.attention_path(
            tokens, lambda x: self.attention(x + position, x + position, x, key_padding=padding)
        )
        return self.feed_forward_path(tokens, self.feed_forward)


class Encoder(nn.Module):
    """Pass the tokens through every encoder layer; pre-norm blocks leave the last norm to the end."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        pre_norm = config.encoder_block == "pre_norm" and config.encoder_layers > 0
        self.norm = nn.LayerNorm(config.d_model) if pre_norm else nn.Identity()

    def forward(
        self,
        tokens: Float[Tensor, "batch token d_model"],
        position: Float[Tensor, "batch token d_model"],
        padding: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch token d_model"]:
        """Return the memory that the decoder reads."""
        for layer in self.layers:
            tokens = layer(tokens, position, padding)
        return self.norm(tokens)
