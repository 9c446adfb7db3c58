"""The decoder: all queries at once attend to each other, then to the image (DETR, A.3 and figure 10)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.box_bias import GaussianBias, NoBias, SidesBias
from lucidetr.layers.feed_forward import FeedForward
from lucidetr.layers.positions import BoxPosition
from lucidetr.layers.residual import NoNorm, NoPart, NoResidual, PostNorm, PreNorm, SamePath
from lucidetr.models.heads import HeadsOfLayers, SharedHeads, move
from lucidetr.models.memory import Memory
from lucidetr.models.queries import Start
from lucidetr.structures import Predictions

# the residual paths around the attentions, and the one around the feed-forward
DECODER_BLOCKS = {
    "post_norm": (PostNorm, PostNorm),
    "pre_norm": (PreNorm, PreNorm),
    "no_residual": (NoResidual, NoResidual),
    "shared_norm": (PostNorm, NoNorm),
}
Boxes = Float[Tensor, "batch query 4"]
BOX_BIASES = {"none": NoBias, "gaussian": GaussianBias, "rpb": SidesBias}


class DecoderLayer(nn.Module):
    """Let the queries attend to each other, then to the image; then change each by itself."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        attention_path, feed_forward_path = DECODER_BLOCKS[config.decoder_block]
        attention = (config.d_model, config.num_heads, config.head_dim, config.dropout)
        path = (config.d_model, config.dropout)
        shared = config.decoder_block == "shared_norm"
        self.self_attention = MultiHeadAttention(*attention)
        self.self_attention_path = attention_path(*path)
        self.cross_attention = MultiHeadAttention(*attention)
        self.cross_attention_path = SamePath(self.self_attention_path) if shared else attention_path(*path)
        self.box_bias = BOX_BIASES[config.box_bias](config.d_model, config.num_heads)
        if config.feed_forward:
            self.feed_forward = FeedForward(config.d_model, config.feed_forward, config.dropout)
            self.feed_forward_path = feed_forward_path(*path)
        else:
            self.feed_forward, self.feed_forward_path = nn.Identity(), NoPart()

    def forward(
        self,
        content: Float[Tensor, "batch query d_model"],
        position: Float[Tensor, "batch query d_model"],
        boxes_cxcywh: Float[Tensor, "batch query 4"] | None,
        memory: Memory,
        groups: int,
    ) -> Float[Tensor, "batch query d_model"]:
        """Return the queries' changed content; positions are added to queries and keys, never to values."""

        def agree(x: Tensor) -> Tensor:
            asking = apart(x + position, groups)
            return together(self.self_attention(asking, asking, apart(x, groups)), groups)

        def look(x: Tensor) -> Tensor:
            bias = self.box_bias(x, boxes_cxcywh, memory.grid)
            return self.cross_attention(x + position, memory.keys, memory.tokens, key_padding=memory.padding, bias=bias)

        content = self.self_attention_path(content, agree)
        content = self.cross_attention_path(content, look)
        return self.feed_forward_path(content, self.feed_forward)


def apart(x: Float[Tensor, "batch query d_model"], groups: int) -> Float[Tensor, "_ _ d_model"]:
    """Move groups of queries to the batch axis, where they do not see each other."""
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def together(x: Float[Tensor, "_ _ d_model"], groups: int) -> Float[Tensor, "batch query d_model"]:
    """Undo `apart`."""
    return x.unflatten(0, (-1, groups)).flatten(1, 2)


class Decoder(nn.Module):
    """Pass the queries through every decoder layer; the heads read each layer's output, so that each is supervised.

    Every layer predicts whole boxes, and queries keep the position that they start with (the paper). One norm stands
    before the heads, except with `shared_norm` blocks.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.Identity() if config.decoder_block == "shared_norm" else nn.LayerNorm(config.d_model)

    def forward(self, start: Start, memory: Memory, heads: SharedHeads | HeadsOfLayers, groups: int) -> Predictions:
        """Return logits and boxes after each layer; one norm is shared by all."""
        content, logits, boxes = start.content, [], []
        for index, layer in enumerate(self.layers):
            content = layer(content, start.position, None, memory, groups)
            category, box = heads.of(index)(self.norm(content))
            logits.append(category)
            boxes.append(box.sigmoid())
        return Predictions(logits=torch.stack(logits), boxes_cxcywh=torch.stack(boxes))


class BoxDecoder(Decoder):
    """Give every query a box: its position encodes the box, and every layer moves the first box."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.position = BoxPosition(config.d_model)

    def forward(self, start: Start, memory: Memory, heads: SharedHeads | HeadsOfLayers, groups: int) -> Predictions:
        """Return logits and boxes after each layer."""
        logits, boxes = [], []
        assert start.boxes_cxcywh is not None
        content, seen, moved = start.content, start.boxes_cxcywh, start.boxes_cxcywh
        for index, layer in enumerate(self.layers):
            content = layer(content, self.position(seen), seen, memory, groups)
            category, delta = heads.of(index)(self.norm(content))
            box, seen, moved = self.advance(seen, moved, delta)
            logits.append(category)
            boxes.append(box)
        return Predictions(logits=torch.stack(logits), boxes_cxcywh=torch.stack(boxes))

    def advance(self, seen: Boxes, moved: Boxes, delta: Boxes) -> tuple[Boxes, Boxes, Boxes]:
        """Return a layer's box, the box that the next layer sees, and the box that the next layer moves."""
        return move(moved, delta), seen, moved


class RefiningDecoder(BoxDecoder):
    """Let every layer move the box of the layer before (Zhu et al. 2021, iterative refinement)."""

    def advance(self, seen: Boxes, moved: Boxes, delta: Boxes) -> tuple[Boxes, Boxes, Boxes]:
        """Return a layer's box; the next layer sees and moves it, but sends no gradient back through it."""
        box = move(moved, delta)
        return box, box.detach(), box.detach()


class TwiceRefiningDecoder(BoxDecoder):
    """Let a layer learn from the next one's box too (Zhang et al. 2023, look forward twice)."""

    def advance(self, seen: Boxes, moved: Boxes, delta: Boxes) -> tuple[Boxes, Boxes, Boxes]:
        """Return a layer's box; the next layer moves the same box, its gradient reaching this layer and no further."""
        own = move(seen, delta)
        return move(moved, delta), own.detach(), own


DECODERS = {
    "absolute": Decoder,
    "relative": BoxDecoder,
    "refined": RefiningDecoder,
    "refined_twice": TwiceRefiningDecoder,
}
