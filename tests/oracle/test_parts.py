"""Each fast layer alone against its page of the reference: values and gradients, float64 and float32."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lucidetr.config import BackboneConfig, ModelConfig
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.box_bias import GaussianBias, Grid, SidesBias
from lucidetr.layers.feed_forward import FeedForward
from lucidetr.layers.norms import NORMS, FrozenBatchNorm2d
from lucidetr.layers.positions import BoxPosition, LearnedPosition, OctavePosition, SinePosition, cell_centres, octaves
from lucidetr.models.backbones import ResNet
from lucidetr.models.heads import move as fast_move
from lucidetr.models.memory import shrink_padding as fast_shrink_padding
from lucidetr.reference import backbone, box_bias, elementary, norms, positions, refinement, transformer
from lucidetr.reference.boxes import move
from lucidetr.reference.convolution import convolution, max_pool
from lucidetr.reference.memory import enlarge
from lucidetr.reference.positions import learned_position, octave_position, shrink_padding, sine_position
from lucidetr.reference.scope import Scope
from lucidetr.reference.trace import Trace

from .drawn import agree, examples

DTYPES = st.sampled_from([torch.float64, torch.float32])
SEEDS = st.integers(0, 2**16)


def random(*shape, seed: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * values).to(dtype).requires_grad_()


def moved(module: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Return the module with every value off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.to(dtype)


def same_gradients(fast: torch.Tensor, slow: torch.Tensor, leaves: dict[str, torch.Tensor], seed: int) -> None:
    """Assert that both outputs pull equally at every leaf, when each is pushed by the same random gradient."""
    push = torch.randn(fast.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(
        fast.dtype
    )
    at_fast = torch.autograd.grad(fast, list(leaves.values()), push)
    at_slow = torch.autograd.grad(slow, list(leaves.values()), push)
    for name, one, other in zip(leaves, at_fast, at_slow, strict=True):
        agree(one, other, f"gradient of {name}")


def check(fast: torch.Tensor, slow: torch.Tensor, leaves: dict[str, torch.Tensor], seed: int, what: str) -> None:
    agree(fast, slow, what)
    same_gradients(fast, slow, leaves, seed)


def scope(module: nn.Module, config: ModelConfig | None = None, training: bool = False) -> Scope:
    """Return the reference's view of a module alone: parameters themselves, so that both pull at the same leaves."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    return Scope(state, config or ModelConfig(dropout=0.0), Trace(), training)


@examples(30)
@given(
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    queries=st.integers(1, 7),
    keys=st.integers(1, 9),
    padded=st.booleans(),
    biased=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_attention(heads, head_dim, queries, keys, padded, biased, scale, dtype, seed):
    config = ModelConfig(d_model=12, num_heads=heads, head_dim=head_dim, dropout=0.0)
    module = moved(MultiHeadAttention(12, heads, head_dim, 0.0), seed, dtype)
    if biased and dtype == torch.float32:
        scale = min(scale, 1.0)  # a large bias on large scores is known to 1e-5 only
    query = random(2, queries, 12, seed=seed, dtype=dtype, scale=scale)
    key = random(2, keys, 12, seed=seed + 1, dtype=dtype, scale=scale)
    value = random(2, keys, 12, seed=seed + 2, dtype=dtype)
    padding = None
    if padded:
        padding = torch.arange(keys) >= torch.tensor([[1], [max(1, keys - 2)]])  # one key seen; all but two
    bias = random(2, heads, queries, keys, seed=seed + 3, dtype=dtype, scale=scale) if biased else None
    leaves = {"query": query, "key": key, "value": value} | dict(module.named_parameters())
    leaves |= {"bias": bias} if biased else {}
    fast = module(query, key, value, padding, bias)
    slow = transformer.attention(scope(module, config), query, key, value, padding, bias)
    check(fast, slow, leaves, seed, "attention")


@examples(10)
@given(hidden=st.integers(1, 20), dtype=DTYPES, seed=SEEDS)
def test_feed_forward(hidden, dtype, seed):
    module = moved(FeedForward(8, hidden, 0.0), seed, dtype)
    x = random(2, 5, 8, seed=seed, dtype=dtype)
    leaves = {"x": x} | dict(module.named_parameters())
    check(module(x), transformer.feed_forward(scope(module), x), leaves, seed, "feed-forward")


@examples(12)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    training=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_frozen_batch_norm(batch, channels, h, w, training, dtype, seed):
    module = moved(FrozenBatchNorm2d(channels), seed, dtype).train(training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = random(batch, channels, h, w, seed=seed, dtype=dtype, scale=3.0)
    config = ModelConfig(backbone=BackboneConfig(norm="frozen_batch"))
    slow = backbone.norm(scope(module, config, training), x)
    check(module(x), slow, {"x": x}, seed, "frozen batch norm")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} moved"


@examples(20)
@given(kind=st.sampled_from(["batch", "group"]), training=st.booleans(), dtype=DTYPES, seed=SEEDS)
def test_learned_norms(kind, training, dtype, seed):
    module = moved(NORMS[kind](12), seed, dtype).train(training)
    twin = moved(NORMS[kind](12), seed, dtype)
    x = random(3, 12, 4, 5, seed=seed, dtype=dtype, scale=3.0)
    state = dict(module.named_parameters()) | dict(twin.named_buffers())  # statistics of its own
    slow = backbone.norm(Scope(state, ModelConfig(backbone=BackboneConfig(norm=kind)), Trace(), training), x)
    check(module(x), slow, {"x": x} | dict(module.named_parameters()), seed, f"{kind} norm")
    for (name, one), other in zip(module.named_buffers(), twin.buffers(), strict=True):
        agree(one, other, name)


def test_batch_norm_of_a_single_value_is_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="at least 2 values"):
        norms.measured_batch_norm(torch.ones(1, 1, 1, 1), one, one, one.clone(), one.clone())


@examples(10)
@given(width=st.integers(2, 9), dtype=DTYPES, seed=SEEDS)
def test_layer_norm(width, dtype, seed):
    module = moved(nn.LayerNorm(width), seed, dtype)
    x = random(2, 3, width, seed=seed, dtype=dtype, scale=3.0)
    slow = norms.layer_norm(x, module.weight, module.bias)
    if dtype == torch.float64:  # two values nearly equal divide by almost nothing: see ILL_CONDITIONED
        check(module(x), slow, {"x": x} | dict(module.named_parameters()), seed, "layer norm")
    else:
        agree(module(x), slow, "layer norm")


@examples(30)
@given(
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    h=st.integers(1, 11),
    w=st.integers(1, 11),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_convolution(kernel, stride, dilation, h, w, dtype, seed):
    x = random(2, 3, h, w, seed=seed, dtype=dtype)
    weight = random(4, 3, kernel, kernel, seed=seed + 1, dtype=dtype)
    fast = F.conv2d(x, weight, None, stride, dilation * (kernel // 2), dilation)
    check(fast, convolution(x, weight, stride, dilation), {"x": x, "weight": weight}, seed, "convolution")


@examples(20)
@given(h=st.integers(1, 9), w=st.integers(1, 9), ties=st.booleans(), dtype=DTYPES, seed=SEEDS)
def test_max_pool(h, w, ties, dtype, seed):
    x = random(2, 3, h, w, seed=seed, dtype=dtype)
    if ties:
        x = x.detach().round().requires_grad_()
    check(F.max_pool2d(x, 3, 2, 1), max_pool(x), {"x": x}, seed, "max pool")


@pytest.mark.parametrize("ours", ["relu", "sigmoid", "softmax", "log_softmax", "log_sigmoid"])
def test_elementary_functions(ours):
    x = torch.tensor([[-800.0, -3.0, 0.0], [0.5, 20.0, 900.0]], dtype=torch.float64, requires_grad=True)
    library = {
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "softmax": lambda v: v.softmax(-1),
        "log_softmax": lambda v: v.log_softmax(-1),
        "log_sigmoid": F.logsigmoid,
    }
    check(library[ours](x), getattr(elementary, ours)(x), {"x": x}, 0, ours)


@st.composite
def paddings(draw):
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    padding = torch.ones(2, h, w, dtype=torch.bool)
    for image in padding:
        image[: draw(st.integers(1, h)), : draw(st.integers(1, w))] = False
    return padding


@examples(20)
@given(padding=paddings(), d_model=st.sampled_from([4, 8, 20]), dtype=DTYPES)
def test_sine_positions(padding, d_model, dtype):
    fast = SinePosition(ModelConfig(d_model=d_model))(padding, dtype)
    agree(fast, sine_position(padding, d_model, dtype), "sine position")


@examples(20)
@given(padding=paddings(), d_model=st.sampled_from([4, 8, 20]), dtype=DTYPES)
def test_octave_positions(padding, d_model, dtype):
    # 32 waves to the picture: rounding a centre by 1e-7 turns the fastest by 2e-5
    centres = zip(cell_centres(padding, dtype), positions.cell_centres(padding, dtype), strict=True)
    for fast, slow in centres:
        agree(fast, slow, "centres")
    if dtype == torch.float64:
        fast = OctavePosition(ModelConfig(d_model=d_model))(padding, dtype)
        agree(fast, octave_position(padding, d_model, dtype), "octave position")


@examples(15)
@given(d_model=st.sampled_from([4, 8, 20, 36]), scale=st.sampled_from([0.3, 3.0]), seed=SEEDS)
def test_position_of_a_box(d_model, scale, seed):
    module = moved(BoxPosition(d_model), seed, torch.float64)
    boxes = random(2, 3, 4, seed=seed, dtype=torch.float64, scale=scale)
    agree(octaves(boxes, 3), positions.octave_waves(boxes, 3), "waves")
    slow = refinement.box_position(scope(module, ModelConfig(d_model=d_model)), boxes)
    check(module(boxes), slow, {"boxes": boxes} | dict(module.named_parameters()), seed, "position of a box")


@examples(40)
@given(
    kind=st.sampled_from(["gaussian", "rpb"]),
    heads=st.integers(1, 4),
    queries=st.integers(1, 5),
    padding=paddings(),
    far=st.sampled_from([0.5, 10.0]),
    seed=SEEDS,
)
def test_box_bias(kind, heads, queries, padding, far, seed):
    """Boxes inside the picture and around it, bells asked to be wider than they may."""
    module = moved({"gaussian": GaussianBias, "rpb": SidesBias}[kind](8, heads), seed, torch.float64)
    content = random(2, queries, 8, seed=seed, dtype=torch.float64, scale=far)
    boxes = torch.rand(2, queries, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    boxes = (boxes * 2 * far).requires_grad_()
    fast = module(content, boxes, Grid(*cell_centres(padding, torch.float64)))
    config = ModelConfig(d_model=8, num_heads=heads, queries="anchors", boxes="refined", box_bias=kind)
    state = {f"box_bias.{name}": parameter for name, parameter in module.named_parameters()}
    tokens = torch.zeros(2, padding[0].numel(), 8, dtype=torch.float64)
    memory = transformer.Memory(tokens=tokens, position=tokens, padding=padding)
    slow = box_bias.box_bias(Scope(state, config, Trace()), boxes, memory, content)
    leaves = {"boxes": boxes} | dict(module.named_parameters()) | ({"x": content} if kind == "gaussian" else {})
    check(fast, slow, leaves, seed, f"{kind} bias")


@examples(30)
@given(scale=st.sampled_from([0.1, 1.0, 8.0]), dtype=DTYPES, seed=SEEDS)
def test_moving_a_box(scale, dtype, seed):
    """A step of 8 is more than a side may grow."""
    reference = random(2, 5, 4, seed=seed, dtype=dtype)
    delta = random(2, 5, 4, seed=seed + 1, dtype=dtype, scale=scale)
    check(fast_move(reference, delta), move(reference, delta), {"box": reference, "delta": delta}, seed, "move")


@examples(30)
@given(h2=st.integers(1, 90), w2=st.integers(1, 90), halvings=st.integers(1, 3), seed=SEEDS)
def test_enlarging(h2, w2, halvings, seed):
    h, w = (-(-side // 2**halvings) for side in (h2, w2))
    x = random(1, 2, h, w, seed=seed, dtype=torch.float64)
    fast = F.interpolate(x, size=(h2, w2), mode="nearest")
    check(fast, enlarge(x, h2, w2), {"x": x}, seed, "enlarging")


@examples(10)
@given(padding=paddings(), seed=SEEDS)
def test_learned_positions(padding, seed):
    module = moved(LearnedPosition(ModelConfig(d_model=8, position_table=9)), seed, torch.float64)
    slow = learned_position(module.row, module.column, *padding.shape)
    check(module(padding, torch.float64), slow, dict(module.named_parameters()), seed, "learned position")


def test_a_grid_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="grid of 3 × 2"):
        learned_position(torch.zeros(2, 4), torch.zeros(2, 4), 1, 3, 2)


@examples(20)
@given(padding=paddings(), grid_h=st.integers(1, 5), grid_w=st.integers(1, 5))
def test_padding_of_the_grid(padding, grid_h, grid_w):
    agree(fast_shrink_padding(padding, grid_h, grid_w), shrink_padding(padding, grid_h, grid_w), "padding")


@pytest.mark.parametrize("dilation", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_strides_and_dilations_are_those_of_the_fast_blocks(name, dilation):

    config = BackboneConfig(name=name, width=4, norm="group", dilation=dilation)
    for stage, blocks in enumerate(ResNet(config).stages):
        for index, block in enumerate(blocks):
            conv = block.conv2 if name in backbone.BOTTLENECKS else block.conv1
            assert (conv.stride[0], conv.dilation[0]) == backbone.stride_and_dilation(stage, index, dilation)


def test_residual_kinds():
    config = replace(ModelConfig(), d_model=4, dropout=0.0)
    module = moved(nn.LayerNorm(4), 1, torch.float64)
    here = Scope({f"norm.{n}": p for n, p in module.named_parameters()}, config, Trace(keep=()))
    x = random(1, 2, 4, seed=1, dtype=torch.float64)

    def part(v):
        return v**2

    agree(module(x + x**2), transformer.residual(here, "post_norm", x, part), "post_norm")
    agree(x + module(x) ** 2, transformer.residual(here, "pre_norm", x, part), "pre_norm")
    agree(x + x**2, transformer.residual(here, "no_norm", x, part), "no_norm")
    agree(module(x**2), transformer.residual(here, "no_residual", x, part), "no_residual")
    agree(module(x + x**2), transformer.residual(here.inside("b"), "post_norm", x, part, here), "another path's norm")
