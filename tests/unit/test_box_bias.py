"""What attention knows of places and boxes: octaves, cell centres, bells, distances to four sides."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lucidetr.config import ModelConfig
from lucidetr.layers.attention import MultiHeadAttention, attend, attention_mask
from lucidetr.layers.box_bias import GaussianBias, Grid, SidesBias
from lucidetr.layers.positions import BoxPosition, OctavePosition, cell_centres, octaves


def waves(fraction, number):
    """Return the octaves of one number as a list."""
    frequencies = [32 ** (k / (number - 1)) if number > 1 else 1.0 for k in range(number)]
    return [f(2 * math.pi * frequency * fraction) for frequency in frequencies for f in (math.sin, math.cos)]


def even_grid(height, width, batch=1):
    """Return the centres of a grid without padding, in float64."""
    return Grid(*cell_centres(torch.zeros(batch, height, width, dtype=torch.bool), torch.float64))


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_octaves_are_one_to_32_waves_sine_and_cosine_in_turn(number):
    places = [0.0, 0.1, 0.37, 1.25]
    expected = torch.tensor([waves(place, number) for place in places], dtype=torch.float64)
    torch.testing.assert_close(octaves(torch.tensor(places, dtype=torch.float64), number), expected)


def test_cells_are_counted_in_the_unpadded_picture():
    padding = torch.zeros(2, 4, 5, dtype=torch.bool)
    padding[1, 2:], padding[1, :, 4:] = True, True
    rows, columns = cell_centres(padding, torch.float64)
    torch.testing.assert_close(rows[0], torch.tensor([0.125, 0.375, 0.625, 0.875]).double())
    torch.testing.assert_close(rows[1], torch.tensor([0.25, 0.75, 1.25, 1.75]).double())
    torch.testing.assert_close(columns[0], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double())
    torch.testing.assert_close(columns[1], torch.tensor([0.125, 0.375, 0.625, 0.875, 1.125]).double())


def test_the_centres_of_a_grid_are_x_and_y_row_by_row():
    centres = even_grid(2, 4).centres()[0]
    assert centres.tolist() == [[(c + 0.5) / 4, (r + 0.5) / 2] for r in range(2) for c in range(4)]


def test_octave_positions_say_the_row_first_and_do_not_feel_the_padding():
    padding = torch.ones(1, 4, 7, dtype=torch.bool)
    padding[:, :3, :5] = False
    encoding = OctavePosition(ModelConfig(d_model=12))(padding, torch.float64)
    assert encoding.shape == (1, 12, 4, 7)
    for row, column in ((0, 0), (2, 1), (1, 4), (3, 6)):  # the last one is padding: it lies beyond 1
        expected = waves((row + 0.5) / 3, 3) + waves((column + 0.5) / 5, 3)
        torch.testing.assert_close(encoding[0, :, row, column], torch.tensor(expected, dtype=torch.float64))


def test_a_box_position_sees_the_octaves_of_x_y_width_and_height_in_that_order():
    position = BoxPosition(d_model=8).double()  # one wave for each number: eight in, eight out
    with torch.no_grad():
        for layer, shift in ((position.hidden, 1.0), (position.output, -1.0)):  # nothing lies below zero, no cut
            layer.weight.copy_(torch.eye(8))
            layer.bias.fill_(shift)
    box = [0.3, 0.6, 0.15, 0.45]
    expected = torch.tensor([number for value in box for number in waves(value, 1)], dtype=torch.float64)
    torch.testing.assert_close(position(torch.tensor([[box]], dtype=torch.float64))[0, 0], expected)
    assert BoxPosition(d_model=4).hidden.in_features == 8  # at least one wave
    assert BoxPosition(d_model=24).hidden.in_features == 8 * 3


def test_the_heads_look_right_down_left_and_up_at_the_start():
    bias, grid = GaussianBias(d_model=8, num_heads=4).double(), even_grid(50, 50)
    box, content = torch.tensor([[[0.5, 0.4, 0.4, 0.24]]], dtype=torch.float64), torch.randn(1, 1, 8).double()
    best = bias(content, box, grid)[0, :, 0].argmax(-1)
    found = grid.centres()[0][best]
    expected = torch.tensor([[0.6, 0.4], [0.5, 0.46], [0.4, 0.4], [0.5, 0.34]], dtype=torch.float64)
    assert (found - expected).abs().max() <= 0.5 / 50 + 1e-9


def test_a_bell_is_as_wide_as_its_box_and_never_narrower_than_a_cell():
    bias, grid = GaussianBias(d_model=8, num_heads=1).double(), even_grid(1, 40)
    nn.init.zeros_(bias.shape.bias)  # the middle of the box, its own width
    content = torch.zeros(1, 1, 8, dtype=torch.float64)
    for width in (0.0, 0.1, 0.5):
        box = torch.tensor([[[0.5, 0.5, width, 0.3]]], dtype=torch.float64)  # in the middle of the only row
        expected = -0.5 * ((grid.columns[0] - 0.5) / (width + 0.02)) ** 2
        torch.testing.assert_close(bias(content, box, grid)[0, 0, 0], expected)
    for said, taken in ((9.0, 3.0), (-9.0, -3.0)):  # a width is changed by e³ at most
        bias.shape.bias.data[2:] = said
        clamped = bias(content, box, grid)
        bias.shape.bias.data[2:] = taken
        torch.testing.assert_close(clamped, bias(content, box, grid))


def test_bells_are_their_definition_cell_by_cell():
    torch.manual_seed(0)
    heads, d_model = 3, 6
    bias, grid = GaussianBias(d_model, heads).double(), uneven_grid()
    nn.init.normal_(bias.shape.weight, std=0.7)
    content, boxes = torch.randn(2, 2, d_model).double(), random_boxes(2, 2)
    found = bias(content, boxes, grid)
    for b, h, q, r, c in every(2, heads, 2, 3, 4):
        ox, oy, sx, sy = bias.shape(content[b, q]).view(heads, 4)[h].tolist()
        cx, cy, w, height = boxes[b, q].tolist()
        width_x = math.exp(min(max(sx, -3), 3)) * w + 0.02
        width_y = math.exp(min(max(sy, -3), 3)) * height + 0.02
        x = (grid.columns[b, c].item() - cx - ox * w) / width_x
        y = (grid.rows[b, r].item() - cy - oy * height) / width_y
        assert found[b, h, q, r * 4 + c].item() == pytest.approx(-0.5 * (x * x + y * y), rel=1e-9), (b, h, q, r, c)


def test_side_biases_are_their_definition_cell_by_cell():
    torch.manual_seed(1)
    heads = 2
    bias, grid = SidesBias(d_model=6, num_heads=heads).double(), uneven_grid()
    boxes = random_boxes(2, 2)
    found = bias(torch.randn(2, 2, 6).double(), boxes, grid)

    def stretch(t):
        return math.copysign(math.log2(1 + 8 * abs(t)) / 3, t)

    def along(axis, place, centre, size):
        sides = torch.tensor([stretch(place - (centre - size / 2)), stretch(place - (centre + size / 2))]).double()
        return axis.output(F.relu(axis.hidden(sides)))

    for b, q, r, c in every(2, 2, 3, 4):
        cx, cy, w, height = boxes[b, q].tolist()
        expected = along(bias.x, grid.columns[b, c].item(), cx, w) + along(bias.y, grid.rows[b, r].item(), cy, height)
        torch.testing.assert_close(found[b, :, q, r * 4 + c], expected, rtol=1e-6, atol=1e-6)


def test_before_anything_is_learned_every_head_looks_into_the_box():
    torch.manual_seed(1)
    bias, grid = SidesBias(d_model=8, num_heads=4).double(), even_grid(20, 20)
    boxes = torch.tensor([[[0.3, 0.6, 0.2, 0.3], [0.75, 0.2, 0.1, 0.2]]], dtype=torch.float64)
    look = bias(torch.zeros(1, 2, 8, dtype=torch.float64), boxes, grid)[0].softmax(-1)
    offset = (grid.centres()[0] - boxes[0, :, None, :2]).abs() / boxes[0, :, None, 2:]
    inside = (offset < 0.5).all(-1)
    assert inside.double().mean(-1).tolist() == pytest.approx([0.06, 0.02])
    assert (look * inside).sum(-1).min() > 0.7


def test_equal_distances_from_the_sides_are_an_equal_bias():
    torch.manual_seed(2)
    bias, grid = SidesBias(d_model=8, num_heads=3).double(), even_grid(8, 10)
    content = torch.zeros(1, 2, 8, dtype=torch.float64)
    boxes = torch.tensor([[[0.3, 0.25, 0.2, 0.3], [0.5, 0.375, 0.2, 0.3]]], dtype=torch.float64)
    first, moved = bias(content, boxes, grid)[0].unflatten(-1, (8, 10)).unbind(1)  # two columns right, one row down
    torch.testing.assert_close(moved[:, 1:, 2:], first[:, :-1, :-2])
    assert not torch.allclose(moved, first)


@pytest.mark.parametrize("kind", [GaussianBias, SidesBias])
def test_boxes_learn_from_where_they_look(kind):
    torch.manual_seed(3)
    bias = kind(8, 2).double()
    boxes = random_boxes(1, 3).requires_grad_()
    bias(torch.randn(1, 3, 8).double(), boxes, even_grid(4, 5)).square().sum().backward()
    assert (boxes.grad.abs() > 0).all()


def uneven_grid():
    """Return the centres of two images' grids of 3 × 4 cells, the second one padded."""
    padding = torch.zeros(2, 3, 4, dtype=torch.bool)
    padding[1, 2:], padding[1, :, 3:] = True, True
    return Grid(*cell_centres(padding, torch.float64))


def random_boxes(batch, queries):
    return torch.rand(batch, queries, 4, dtype=torch.float64) * 0.5 + 0.2


def every(*counts):
    return torch.cartesian_prod(*(torch.arange(count) for count in counts)).tolist()


def by_hand(query, key, value, padding, bias):
    """Return attention written as the textbook has it, query by query, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    found = torch.zeros_like(query)
    for b, h, q in every(*query.shape[:3]):
        seen = [k for k in range(key.shape[2]) if not padding[b, k]]
        scores = [
            (query[b, h, q] @ key[b, h, k]).item() / math.sqrt(query.shape[3]) + bias[b, h, q, k].item() for k in seen
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        for k, weight in zip(seen, weights, strict=True):
            found[b, h, q] += weight / sum(weights) * value[b, h, k]
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_bias_and_padding_go_into_the_softmax(dtype, tolerance, monkeypatch):
    torch.manual_seed(4)
    query = torch.randn(2, 2, 3, 4).to(dtype)
    key, value = torch.randn(2, 2, 5, 4).to(dtype), torch.randn(2, 2, 5, 4).to(dtype)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    value[0, :, 3:] = 1e4  # what is padded must not show
    bias = 2 * torch.randn(2, 2, 3, 5)
    if dtype == torch.bfloat16:  # written out on a CPU, where the fused kernel is slow
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    found = attend(query, key, value, mask=attention_mask(padding, bias), dropout=0.0)
    assert found.dtype == dtype
    expected = by_hand(query, key, value, padding, bias.to(dtype))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    unbiased = attend(query, key, value, mask=attention_mask(padding, None), dropout=0.0)
    expected = by_hand(query, key, value, padding, 0 * bias)
    torch.testing.assert_close(unbiased.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_layer_hands_bias_and_padding_on():
    torch.manual_seed(5)
    attention = MultiHeadAttention(d_model=6, num_heads=2, head_dim=3, dropout=0.0).double()
    query, key, value = (torch.randn(1, n, 6).double() for n in (3, 4, 4))
    padding, bias = torch.tensor([[False, False, True, False]]), torch.randn(1, 2, 3, 4).double()
    heads = [
        attention.split_heads(layer(x))
        for layer, x in zip((attention.query, attention.key, attention.value), (query, key, value), strict=True)
    ]
    expected = attention.output(by_hand(*heads, padding, bias).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(query, key, value, key_padding=padding, bias=bias), expected)
    far = torch.zeros(1, 2, 3, 4).double()
    far[..., 1] = 1e3  # a bias that leaves one key alone
    alone = attention.output(attention.value(value[:, 1:2])).expand(-1, 3, -1)
    torch.testing.assert_close(attention(query, key, value, bias=far), alone)
