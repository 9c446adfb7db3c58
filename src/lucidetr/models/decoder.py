"""The decoder: all queries at once, each looking at the others and then at the image (DETR, A.3 and figure 10)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.feed_forward import FeedForward
from lucidetr.layers.residual import PostNorm, PreNorm

DECODER_BLOCKS = {"post_norm": PostNorm, "pre_norm": PreNorm}


class DecoderLayer(nn.Module):
    """Let the queries agree among themselves, then look at the image, then change each by itself."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        path = DECODER_BLOCKS[config.decoder_block]
        attention = (config.d_model, config.num_heads, config.head_dim, config.dropout)
        self.self_attention = MultiHeadAttention(*attention)
        self.self_attention_path = path(config.d_model, config.dropout)
        self.cross_attention = MultiHeadAttention(*attention)
        self.cross_attention_path = path(config.d_model, config.dropout)
        self.feed_forward = FeedForward(config.d_model, config.feed_forward, config.dropout)
        self.feed_forward_path = path(config.d_model, config.dropout)

    def forward(
        self,
        content: Float[Tensor, "batch query d_model"],
        query_position: Float[Tensor, "batch query d_model"],
        memory: Float[Tensor, "batch token d_model"],
        position: Float[Tensor, "batch token d_model"],
        padding: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "batch query d_model"]:
        """Return the queries' changed content; positions are added to queries and keys, never to values."""
        content = self.self_attention_path(
            content, lambda x: self.self_attention(x + query_position, x + query_position, x)
        )
        content = self.cross_attention_path(
            content,
            lambda x: self.cross_attention(x + query_position, memory + position, memory, key_padding=padding),
        )
        return self.feed_forward_path(content, self.feed_forward)


class Decoder(nn.Module):
    """Pass the queries through every decoder layer and keep each layer's normed content, to supervise them all."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        content: Float[Tensor, "batch query d_model"],
        query_position: Float[Tensor, "batch query d_model"],
        memory: Float[Tensor, "batch token d_model"],
        position: Float[Tensor, "batch token d_model"],
        padding: Bool[Tensor, "batch token"],
    ) -> Float[Tensor, "layer batch query d_model"]:
        """Return the content after each layer; one norm is shared by all."""
        hidden = []
        for layer in self.layers:
            content = layer(content, query_position, memory, position, padding)
            hidden.append(self.norm(content))
        return torch.stack(hidden)
