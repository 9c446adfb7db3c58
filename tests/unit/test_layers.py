"""Attention, positions and norms: padding never shows, widths are free."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lucidetr.config import ModelConfig
from lucidetr.errors import InputError
from lucidetr.layers.attention import MultiHeadAttention
from lucidetr.layers.dropout import Dropout, dropout, factors
from lucidetr.layers.norms import FrozenBatchNorm2d, group_norm
from lucidetr.layers.positions import AtAttention, AtInput, LearnedPosition, NoPosition, SinePosition
from lucidetr.layers.residual import NoNorm, NoPart, NoResidual, PostNorm, PreNorm, SamePath


def test_padded_keys_are_not_seen():
    torch.manual_seed(0)
    attention = MultiHeadAttention(d_model=16, num_heads=2, head_dim=8, dropout=0.0)
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    before = attention(query, key, value, key_padding=padding)
    key[0, 3:], value[0, 3:] = 1e3, -1e3
    torch.testing.assert_close(attention(query, key, value, key_padding=padding), before)
    torch.testing.assert_close(before[:1], attention(query[:1], key[:1, :3], value[:1, :3]))


def test_head_width_is_free_of_the_model_width():
    attention = MultiHeadAttention(d_model=12, num_heads=11, head_dim=5, dropout=0.0)
    assert attention.query.weight.shape == (55, 12)
    assert attention(*(torch.randn(1, 4, 12),) * 3).shape == (1, 4, 12)


def test_attention_starts_at_the_scale_of_one_packed_matrix():
    torch.manual_seed(0)
    d_model = 256
    attention = MultiHeadAttention(d_model, num_heads=8, head_dim=32, dropout=0.0)
    packed = torch.empty(3 * d_model, d_model)
    nn.init.xavier_uniform_(packed)
    for part in (attention.query, attention.key, attention.value):
        assert part.weight.std().item() == pytest.approx(packed.std().item(), rel=0.02)
        assert not part.bias.any()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 6))
def test_sine_positions_do_not_feel_the_padding(height, width, below, right):
    position = SinePosition(ModelConfig(d_model=16))
    alone = torch.zeros(1, height, width, dtype=torch.bool)
    padded = torch.ones(1, height + below, width + right, dtype=torch.bool)
    padded[:, :height, :width] = False
    inside = position(padded, torch.float64)[:, :, :height, :width]
    torch.testing.assert_close(inside, position(alone, torch.float64))


def test_sine_positions_are_the_papers_waves():
    encoding = SinePosition(ModelConfig(d_model=8))(torch.zeros(1, 3, 5, dtype=torch.bool), torch.float64)[0]
    row, column = 2, 4  # counted from 1 they are 3 of 3 and 5 of 5: the whole circle
    angle_y, angle_x = 3 / (3 + 1e-6) * 2 * math.pi, 5 / (5 + 1e-6) * 2 * math.pi
    expected = [f(a / 10000 ** (2 * i / 4)) for a in (angle_y, angle_x) for i in range(2) for f in (math.sin, math.cos)]
    torch.testing.assert_close(encoding[:, row, column], torch.tensor(expected, dtype=torch.float64))


def test_learned_positions_are_one_vector_a_row_and_one_a_column():
    position = LearnedPosition(ModelConfig(d_model=8, position_table=6))
    padding = torch.zeros(2, 4, 6, dtype=torch.bool)
    padding[1, 2:] = True
    encoding = position(padding, torch.float32)
    assert encoding.shape == (2, 8, 4, 6)
    assert torch.equal(encoding[0, 4:, 2, 5], position.row[2])
    assert torch.equal(encoding[0, :4, 2, 5], position.column[5])
    assert torch.equal(encoding[0], encoding[1])
    with pytest.raises(InputError, match=r"4 × 7 is larger .* of 6: set model.position_table to at least 7"):
        position(torch.zeros(1, 4, 7, dtype=torch.bool), torch.float32)


def test_frozen_batch_norm_equals_batch_norm_in_evaluation_and_has_no_parameters():
    torch.manual_seed(0)
    batch_norm = nn.BatchNorm2d(6).eval()
    for values in (batch_norm.weight.data, batch_norm.bias.data, batch_norm.running_mean):
        values.normal_()
    batch_norm.running_var.uniform_(0.5, 2)
    frozen = FrozenBatchNorm2d(6)
    state = {name: value for name, value in batch_norm.state_dict().items() if name != "num_batches_tracked"}
    frozen.load_state_dict(state)
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(frozen.train()(x), batch_norm(x), rtol=1e-5, atol=1e-5)
    assert not list(frozen.parameters())


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (32, 16), (64, 32), (2048, 32)])
def test_no_group_has_one_channel(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_residual_paths():
    x = torch.randn(1, 3, 4)
    for path, expected in (
        (PostNorm(4, 0.0), lambda p: p.norm(x + 2 * x)),
        (PreNorm(4, 0.0), lambda p: x + 2 * p.norm(x)),
        (NoNorm(4, 0.0), lambda p: 3 * x),
        (NoResidual(4, 0.0), lambda p: p.norm(2 * x)),
        (NoPart(), lambda p: x),
    ):
        torch.testing.assert_close(path(x, lambda y: 2 * y), expected(path))


def test_a_path_taken_twice_keeps_its_norm_under_one_name():
    block = nn.ModuleDict({"first": PostNorm(4, 0.0)})
    block["second"] = SamePath(block["first"])
    nn.init.normal_(block["first"].norm.weight)
    x = torch.randn(1, 3, 4)
    assert torch.equal(block["second"](x, lambda y: 2 * y), block["first"].norm(3 * x))
    assert set(block.state_dict()) == {"first.norm.weight", "first.norm.bias"}
    twin = copy.deepcopy(block)  # as the moving average of the weights is made
    nn.init.zeros_(twin["first"].norm.weight)
    assert torch.equal(twin["second"](x, lambda y: 2 * y), torch.zeros_like(x))
    assert block["second"](x, lambda y: 2 * y).any()


def test_no_position_is_zero_and_nothing_to_learn():
    position = NoPosition(ModelConfig(d_model=8))
    encoding = position(torch.zeros(2, 3, 5, dtype=torch.bool), torch.float64)
    assert encoding.shape == (2, 8, 3, 5) and encoding.dtype == torch.float64 and not encoding.any()
    assert not position.state_dict()


def test_positions_are_added_at_every_attention_or_once():
    tokens, position = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    entered, added = AtAttention().enter(tokens, position)
    assert torch.equal(entered, tokens) and torch.equal(added, position)
    assert torch.equal(AtAttention().keys(tokens, position), tokens + position)
    entered, added = AtInput().enter(tokens, position)
    assert torch.equal(entered, tokens + position) and not added.any()
    assert torch.equal(AtInput().keys(tokens, position), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_leaves_its_share_and_the_mean(dtype, rate):
    torch.manual_seed(0)
    x = torch.ones(100, 1000, dtype=dtype)
    left = dropout(x, rate)
    assert left.dtype == dtype
    enlarged = torch.tensor(1 / (1 - rate), dtype=dtype)
    assert left.unique().tolist() == [0.0, enlarged.item()]
    deviation = (rate * (1 - rate)) ** 0.5
    for lane in range(4):  # four coins share a draw
        values = left.flatten()[lane::4]
        allowed = 5 * deviation * len(values) ** -0.5 + 1e-5
        assert float((values == 0).double().mean()) == pytest.approx(1 - 1 / enlarged.item(), abs=allowed)
        assert float(values.double().mean()) == pytest.approx(1, abs=allowed / (1 - rate))
    kept = ((left != 0).double() - (1 - rate)) / deviation
    for apart in (1, 2, 3, 4):  # neighbours know nothing of each other
        assert abs(float((kept[:, apart:] * kept[:, :-apart]).mean())) < 5 * x.numel() ** -0.5


def test_dropout_is_the_librarys_where_a_compiler_looks_on(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("lucidetr.layers.dropout.factors", lambda x, rate: pytest.fail("coins of ours"))
    torch.manual_seed(0)
    left = dropout(torch.ones(100, 1000), 0.3)
    assert float((left == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(left.mean()) == pytest.approx(1, abs=0.02)


def test_dropout_passes_gradients_where_it_passes_values():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7).transpose(0, 2).requires_grad_()
    left = dropout(x, 0.4)
    left.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), left.detach())
    assert 0 < int((left == 0).sum()) < left.numel()
    assert factors(x, 0.4).stride() == x.stride()


def test_dropout_repeats_from_its_seed_and_stands_still_in_evaluation():
    layer, x = Dropout(0.3), torch.randn(10, 3)
    left = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        left.append(layer(x))
    assert torch.equal(left[0], left[1])
    assert not torch.equal(left[0], left[2])
    assert layer.eval()(x) is x
    assert dropout(x, 0.0) is x
    assert dropout(x[:0], 0.5).shape == (0, 3)
