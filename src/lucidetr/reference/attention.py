"""Attention written out: who looks at whom, and what they take home (DETR, A.1; Vaswani et al. 2017, section 3.2)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lucidetr.reference.elementary import softmax


def split_heads(x: Float[Tensor, "batch token inner"], num_heads: int) -> Float[Tensor, "batch head token head_dim"]:
    """Cut every token into `num_heads` pieces; each head works with its own piece.

    >>> split_heads(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), 2).tolist()
    [[[[1.0, 2.0]], [[3.0, 4.0]]]]
    """
    batch, tokens, inner = x.shape
    return x.reshape(batch, tokens, num_heads, inner // num_heads).permute(0, 2, 1, 3)


def join_heads(x: Float[Tensor, "batch head token head_dim"]) -> Float[Tensor, "batch token inner"]:
    """Lay the heads' pieces side by side again.

    >>> x = torch.arange(24.0).view(1, 3, 8)
    >>> bool((join_heads(split_heads(x, 4)) == x).all())
    True
    """
    batch, heads, tokens, head_dim = x.shape
    return x.permute(0, 2, 1, 3).reshape(batch, tokens, heads * head_dim)


def attention_scores(
    query: Float[Tensor, "batch head query head_dim"], key: Float[Tensor, "batch head key head_dim"]
) -> Float[Tensor, "batch head query key"]:
    """Return query · key / √head_dim for every pair: how much a key resembles what a query asks for.

    Without the root the scores grow with head_dim and softmax hardens: see lessons.product_variance.

    >>> attention_scores(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4)).item()  # 4 / √4
    2.0
    """
    return query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5


def hide_padding(
    scores: Float[Tensor, "batch head query key"], key_padding: Bool[Tensor, "batch key"]
) -> Float[Tensor, "batch head query key"]:
    """Return the scores with −∞ for padded keys, so that softmax gives them exactly nothing.

    >>> hide_padding(torch.zeros(1, 1, 1, 2), torch.tensor([[False, True]])).tolist()
    [[[[0.0, -inf]]]]
    """
    return torch.where(key_padding[:, None, None, :], -torch.inf, scores)


def attention_weights(
    query: Float[Tensor, "batch head query head_dim"],
    key: Float[Tensor, "batch head key head_dim"],
    key_padding: Bool[Tensor, "batch key"] | None = None,
    bias: Float[Tensor, "#batch #head query key"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Return softmax over the keys of the scores: what share of its attention a query gives to each key.

    A bias is added to the scores: what is known beforehand of who concerns whom.

    >>> question, keys = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.0], [1.0], [1.0]]]])
    >>> attention_weights(question, keys, torch.tensor([[False, False, True]])).tolist()
    [[[[0.5, 0.5, 0.0]]]]
    >>> bias = torch.tensor([[[[0.0, 1000.0, 0.0]]]])
    >>> attention_weights(question, keys, bias=bias).tolist()
    [[[[0.0, 1.0, 0.0]]]]
    """
    scores = attention_scores(query, key)
    scores = scores if bias is None else scores + bias
    return softmax(scores if key_padding is None else hide_padding(scores, key_padding))


def attend(
    weights: Float[Tensor, "batch head query key"], value: Float[Tensor, "batch head key head_dim"]
) -> Float[Tensor, "batch head query head_dim"]:
    """Return Σ weight · value: every query takes home the mean of the values, weighted by its attention.

    >>> attend(torch.tensor([[[[0.25, 0.75]]]]), torch.tensor([[[[0.0], [4.0]]]])).item()
    3.0
    """
    return weights @ value
