"""Encoder and decoder: tokens mix, queries ask (DETR, A.3 and figure 10)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lucidetr.reference.attention import attend, attention_weights, join_heads, split_heads
from lucidetr.reference.elementary import linear, relu
from lucidetr.reference.norms import layer_norm
from lucidetr.reference.scope import Scope

# the residual path around the attention, and the one around the feed-forward
ENCODER_PATHS = {
    "post_norm": ("post_norm", "post_norm"),
    "pre_norm": ("pre_norm", "pre_norm"),
    "end_norm": ("no_norm", "post_norm"),
    "no_residual": ("no_residual", "no_residual"),
}
# the residual paths around self-attention, cross-attention and feed-forward
DECODER_PATHS = {
    "post_norm": ("post_norm", "post_norm", "post_norm"),
    "pre_norm": ("pre_norm", "pre_norm", "pre_norm"),
    "shared_norm": ("post_norm", "post_norm", "no_norm"),
    "no_residual": ("no_residual", "no_residual", "no_residual"),
}


@dataclass(frozen=True, eq=False)
class Memory:
    """Hold what the decoder reads: tokens, what is added to their keys, and which cells of their grid are padding."""

    tokens: Float[Tensor, "batch token d_model"]
    position: Float[Tensor, "batch token d_model"]
    padding: Bool[Tensor, "batch grid_h grid_w"]


def attention(
    here: Scope,
    query: Float[Tensor, "batch query d_model"],
    key: Float[Tensor, "batch key d_model"],
    value: Float[Tensor, "batch key d_model"],
    key_padding: Bool[Tensor, "batch key"] | None = None,
    bias: Float[Tensor, "#batch #head query key"] | None = None,
) -> Float[Tensor, "batch query d_model"]:
    """Return what every query takes home: project, weigh, average, join the heads, project back."""
    heads = here.config.num_heads
    q = here.record("query", split_heads(linear(query, here["query.weight"], here["query.bias"]), heads))
    k = here.record("key", split_heads(linear(key, here["key.weight"], here["key.bias"]), heads))
    v = here.record("value", split_heads(linear(value, here["value.weight"], here["value.bias"]), heads))
    weights = here.record("weights", attention_weights(q, k, key_padding, bias))
    attended = here.record("attended", attend(here.drop(weights), v))
    return linear(join_heads(attended), here["output.weight"], here["output.bias"])


def feed_forward(here: Scope, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
    """Return W₂ relu(W₁ x + b₁) + b₂: each token thinks for itself."""
    hidden = here.record("hidden", relu(linear(x, here["expand.weight"], here["expand.bias"])))
    return linear(here.drop(hidden), here["contract.weight"], here["contract.bias"])


def residual(
    here: Scope,
    kind: str,
    x: Float[Tensor, "batch token d_model"],
    part: Callable[[Tensor], Tensor],
    normed_by: Scope | None = None,
) -> Float[Tensor, "batch token d_model"]:
    """Return the stream after a part has added to it; `kind` says where the norm stands.

    post_norm: norm(x + part(x)).    pre_norm: x + part(norm(x)).    no_norm: x + part(x).
    no_residual: norm(part(x)), the stream cut off: what the part does not pass on is lost.
    The norm is this path's own, or that of the path `normed_by`.
    """
    here.record("before", x)
    own = (normed_by or here).inside("norm")
    added = here.record("added", here.drop(part(norm(own, x) if kind == "pre_norm" else x)))
    total = added if kind == "no_residual" else x + added
    return here.record("after", norm(own, total) if kind in ("post_norm", "no_residual") else total)


def norm(here: Scope, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token d_model"]:
    """Return the layer norm whose weights lie here."""
    return layer_norm(x, here["weight"], here["bias"])


def encoder_layer(
    here: Scope,
    tokens: Float[Tensor, "batch token d_model"],
    position: Float[Tensor, "batch token d_model"],
    padding: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token d_model"]:
    """Return the tokens after they looked at each other; positions go to queries and keys, never to values."""
    around_attention, around_feed_forward = ENCODER_PATHS[here.config.encoder_block]

    def mix(x: Tensor) -> Tensor:
        return attention(here.inside("attention"), x + position, x + position, x, padding)

    def think(x: Tensor) -> Tensor:
        return feed_forward(here.inside("feed_forward"), x)

    tokens = residual(here.inside("attention_path"), around_attention, tokens, mix)
    if here.config.feed_forward == 0:  # there is no such part, and no norm of it
        return tokens
    return residual(here.inside("feed_forward_path"), around_feed_forward, tokens, think)


def encoder(
    here: Scope,
    tokens: Float[Tensor, "batch token d_model"],
    position: Float[Tensor, "batch token d_model"],
    padding: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch token d_model"]:
    """Return the memory: the tokens after every layer, normed once more where the layers left the stream raw."""
    for index in range(here.config.encoder_layers):
        tokens = encoder_layer(here.inside("layers").inside(index), tokens, position, padding)
    raw = here.config.encoder_block == "pre_norm" and here.config.encoder_layers > 0
    return norm(here.inside("norm"), tokens) if raw else tokens


def decoder_layer(
    here: Scope,
    content: Float[Tensor, "batch query d_model"],
    query_position: Float[Tensor, "batch query d_model"],
    memory: Memory,
    groups: int = 1,
    box_bias: Callable[[Tensor], Tensor | None] = lambda _: None,
) -> Float[Tensor, "batch query d_model"]:
    """Return the queries after they agreed among themselves, looked at the image, and thought.

    Each of the `groups`, as many queries in every one, agrees by itself. The two attentions may share one norm.
    `box_bias` makes of the queries, as they are when they look, what is added to their scores for every token.
    """
    around_self, around_cross, around_feed_forward = DECODER_PATHS[here.config.decoder_block]
    first = here.inside("self_attention_path")
    shared = first if here.config.decoder_block == "shared_norm" else None

    def agree(x: Tensor) -> Tensor:
        q = x + query_position
        return attention(here.inside("self_attention"), q, q, x, bias=among_groups(x, groups))

    def look(x: Tensor) -> Tensor:
        q, k, padding = x + query_position, memory.tokens + memory.position, memory.padding.flatten(1)
        return attention(here.inside("cross_attention"), q, k, memory.tokens, padding, box_bias(x))

    def think(x: Tensor) -> Tensor:
        return feed_forward(here.inside("feed_forward"), x)

    content = residual(first, around_self, content, agree)
    content = residual(here.inside("cross_attention_path"), around_cross, content, look, shared)
    if here.config.feed_forward == 0:
        return content
    return residual(here.inside("feed_forward_path"), around_feed_forward, content, think)


def among_groups(content: Float[Tensor, "batch query d_model"], groups: int) -> Float[Tensor, "1 1 query query"] | None:
    """Return 0 between queries of one group and −∞ between those of two, or None where there is but one group.

    >>> among_groups(torch.zeros(1, 4, 8), groups=2)[0, 0, 1].tolist()
    [0.0, 0.0, -inf, -inf]
    """
    if groups == 1:
        return None
    queries = content.shape[1]
    group = torch.arange(queries, device=content.device) // (queries // groups)
    return torch.where(group[:, None] == group[None, :], 0.0, -torch.inf)[None, None]


def decoder(
    here: Scope,
    content: Float[Tensor, "batch query d_model"],
    query_position: Float[Tensor, "batch query d_model"],
    memory: Memory,
    groups: int,
) -> Float[Tensor, "layer batch query d_model"]:
    """Return the content after each layer, as the heads read it: they read them all."""
    hidden = []
    for index in range(here.config.decoder_layers):
        place = here.inside("layers").inside(index)
        content = decoder_layer(place, content, query_position, memory, groups)
        hidden.append(place.record("hidden", for_heads(here, content)))
    return torch.stack(hidden)


def for_heads(here: Scope, content: Float[Tensor, "batch query d_model"]) -> Float[Tensor, "batch query d_model"]:
    """Return the content through the one norm of all layers; where a layer ends in a plain sum, that sum."""
    return content if here.config.decoder_block == "shared_norm" else norm(here.inside("norm"), content)
