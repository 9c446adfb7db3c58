"""Initial weights: one rule for every matrix, if the config names one, and the scale of the residual branches."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.box_bias import GaussianBias, SidesBias
from lucidetr.layers.feed_forward import FeedForward
from lucidetr.models.backbones import BasicBlock, Bottleneck
from lucidetr.models.efficientnet import InvertedBottleneck
from lucidetr.models.heads import Heads
from lucidetr.models.queries import AnchorQueries, ContentQueries, HintQueries, LearnedQueries, SelectedQueries

SMALL = 0.02  # the deviation of BERT's weights (Devlin et al. 2019); here the half width of a range

# uniform: as small for a wide layer as for a narrow one. xavier: inputs and outputs keep the scale alike on average
# (Glorot & Bengio 2010). he_in and he_out: activations, or the gradients that come back, keep their scale through a
# layer with a ReLU (He et al. 2015, "Delving Deep into Rectifiers", 2.2)
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": functools.partial(nn.init.uniform_, a=-SMALL, b=SMALL),
    "uniform_scaled": functools.partial(nn.init.uniform_, a=-SMALL, b=SMALL),
    "xavier": nn.init.xavier_uniform_,
    "he_in": functools.partial(nn.init.kaiming_normal_, mode="fan_in", nonlinearity="relu"),
    "he_out": functools.partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "t_fixup": nn.init.xavier_uniform_,
}


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Set the start values of a freshly made network as the config names them.

    The default leaves each part as it was made. `residual_start` has the last word on residual branches.
    """
    if config.initialisation != "default":
        redraw(model, config)
    if config.initialisation == "uniform_scaled":
        lower_attention(model, config.head_dim)
    elif config.initialisation == "t_fixup":
        fix_up(model, config)
    quieten(model, config)


def redraw(model: nn.Module, config: ModelConfig) -> None:
    """Draw every matrix and kernel by the config's rule, and set the biases of these layers to 0.

    Layers whose start has a meaning keep it: class biases that say how rare objects are, box heads that begin at no
    move, attention that looks into the box. Norms stay at 1 and 0, learned vectors as they are.
    """
    rule, (rare, settled) = RULES[config.initialisation], meant(model, config)
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)) and part not in settled:
            rule(part.weight)
            if part.bias is not None and part not in rare:
                nn.init.zeros_(part.bias)
    for part in model.modules():
        if isinstance(part, SidesBias):
            part.fence()


def meant(model: nn.Module, config: ModelConfig) -> tuple[set[nn.Module], set[nn.Module]]:
    """Return the layers whose biases say how rare classes are, and those that keep weights and biases."""
    rare, settled = set(), set()
    for part in model.modules():
        if isinstance(part, (Heads, SelectedQueries)):
            if config.classification == "sigmoid":
                rare.add(part.category)
            if isinstance(part, SelectedQueries) and part.taught_category is not None:
                rare.add(part.taught_category)
            if config.boxes != "absolute":
                settled.add(part.box.output)
        elif isinstance(part, GaussianBias):
            settled.add(part.shape)
    return rare, settled


def lower_attention(model: nn.Module, head_dim: int) -> None:
    """Multiply the query, key and value matrices of every attention by head_dim^-½.

    Scores are divided by √head_dim in any case; here query and key are each scaled down once more, so that attention
    starts nearly uniform over its keys.
    """
    for part in model.modules():
        if isinstance(part, MultiHeadAttention):
            for projection in (part.query, part.key, part.value):
                projection.weight.mul_(head_dim**-0.5)


def fix_up(model: nn.Module, config: ModelConfig) -> None:
    """Scale the transformer's branches down so that the first steps are stable (Huang et al. 2020, T-Fixup, section 3).

    Values, attention's outputs and both matrices of the feed-forward are multiplied by 0.67 · N^-¼ in an encoder of N
    layers, by (9 N)^-¼ in a decoder of N; the queries' learned vectors start normal, with deviation 1/√d_model. The
    paper also leaves out norms and warm-up and multiplies the embeddings by (9 N)^-¼; here norms stay where the block
    has them, warm-up is set by the optimiser's settings, and the queries are not multiplied.
    """
    scales = {
        "encoder.": 0.67 * max(config.encoder_layers, 1) ** -0.25,
        "decoder.": (9 * config.decoder_layers) ** -0.25,
    }
    for name, part in model.named_modules():
        scale = next((scale for prefix, scale in scales.items() if name.startswith(prefix)), 1.0)
        if isinstance(part, MultiHeadAttention):
            part.value.weight.mul_(scale)
            part.output.weight.mul_(scale)
        elif isinstance(part, FeedForward):
            part.expand.weight.mul_(scale)
            part.contract.weight.mul_(scale)
        elif (vectors := learned_vectors(part)) is not None:
            nn.init.normal_(vectors, std=config.d_model**-0.5)


def learned_vectors(part: nn.Module) -> Tensor | None:
    """Return the learned vectors of queries, one each; None for any other part."""
    if isinstance(part, LearnedQueries):
        return part.position
    if isinstance(part, (ContentQueries, AnchorQueries)):
        return part.content
    return part.label.weight if isinstance(part, HintQueries) else None


def quieten(model: nn.Module, config: ModelConfig) -> None:
    """Rescale the last layer of each residual branch.

    A transformer's branch ends in a linear layer, a backbone block's in a norm (Goyal et al. 2017, section 5.1).
    """
    layers = max(config.encoder_layers + config.decoder_layers, 1)
    scale = {"xavier": 1.0, "zero": 0.0, "scaled": (2 * layers) ** -0.5}[config.residual_start]
    for part in model.modules():
        if isinstance(part, (MultiHeadAttention, FeedForward)):
            last = part.output if isinstance(part, MultiHeadAttention) else part.contract
            for parameter in last.parameters():
                parameter.mul_(scale)
        elif config.backbone.zero_residual and (scale_of_norm := last_scale(part)) is not None:
            scale_of_norm.zero_()


def last_scale(block: nn.Module) -> Tensor | None:
    """Return the scale of the norm that ends a backbone block's residual branch; None for any other part."""
    if isinstance(block, BasicBlock):
        norm = block.norm2
    elif isinstance(block, Bottleneck):
        norm = block.norm3
    elif isinstance(block, InvertedBottleneck) and block.keeps_shape:
        norm = block.project.norm
    else:
        return None
    return norm.state_dict()["weight"]  # a parameter, or in frozen batch norm a buffer
