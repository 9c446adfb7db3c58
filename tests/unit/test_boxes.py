"""Box formats and overlaps: properties that hold for every box, and counting on a grid of pixels."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lucidetr.boxes import area, cxcywh_to_xyxy, giou, iou, xyxy_to_cxcywh, xyxy_to_xywh

coordinate = st.floats(-100, 100, width=32)
side = st.floats(2**-6, 100, width=32)


@st.composite
def boxes_xyxy(draw):
    left, top, width, height = draw(coordinate), draw(coordinate), draw(side), draw(side)
    return torch.tensor([left, top, left + width, top + height], dtype=torch.float64)


@st.composite
def pixel_boxes(draw):
    left, top = draw(st.integers(0, 10)), draw(st.integers(0, 10))
    return torch.tensor([left, top, left + draw(st.integers(1, 6)), top + draw(st.integers(1, 6))])


@given(boxes_xyxy())
def test_formats_round_trip(box):
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(box)), box, rtol=0, atol=1e-12)
    left, top, width, height = xyxy_to_xywh(box).tolist()
    assert width * height == area(box).item()
    assert [left, top] == box[:2].tolist()


@given(boxes_xyxy(), boxes_xyxy())
def test_overlaps_are_symmetric_and_in_range(a, b):
    assert 0 <= iou(a, b) <= 1
    assert -1 <= giou(a, b) <= iou(a, b) + 1e-12
    torch.testing.assert_close(iou(a, b), iou(b, a), rtol=0, atol=1e-12)
    torch.testing.assert_close(giou(a, b), giou(b, a), rtol=0, atol=1e-12)
    torch.testing.assert_close(giou(a, a), torch.ones((), dtype=a.dtype), rtol=0, atol=1e-9)


@given(boxes_xyxy(), boxes_xyxy(), st.floats(-50, 50), st.floats(0.1, 10))
def test_overlaps_do_not_depend_on_place_and_unit(a, b, shift, scale):
    for overlap in (iou, giou):
        moved = overlap((a + shift) * scale, (b + shift) * scale)
        torch.testing.assert_close(moved, overlap(a, b), rtol=0, atol=1e-6)


@given(pixel_boxes(), pixel_boxes())
def test_overlaps_equal_counted_pixels(a, b):
    def mask(box):
        grid = torch.zeros(20, 20, dtype=torch.bool)
        left, top, right, bottom = box.tolist()
        grid[top:bottom, left:right] = True
        return grid

    low, high = torch.minimum(a[:2], b[:2]), torch.maximum(a[2:], b[2:])
    shared, joint = (mask(a) & mask(b)).sum().item(), (mask(a) | mask(b)).sum().item()
    enclosing = mask(torch.cat([low, high])).sum().item()
    assert abs(iou(a.double(), b.double()).item() - shared / joint) < 1e-12
    assert abs(giou(a.double(), b.double()).item() - (shared / joint - (enclosing - joint) / enclosing)) < 1e-12


@settings(max_examples=20)
@given(st.lists(boxes_xyxy(), min_size=1, max_size=4), st.lists(boxes_xyxy(), min_size=1, max_size=4))
def test_pairs_by_broadcasting(many_a, many_b):
    a, b = torch.stack(many_a), torch.stack(many_b)
    pairs = giou(a[:, None], b[None])
    assert pairs.shape == (len(a), len(b))
    assert all(pairs[i, j] == giou(a[i], b[j]) for i in range(len(a)) for j in range(len(b)))


def test_boxes_without_area_give_numbers_and_finite_gradients():
    point = torch.tensor([1.0, 1.0, 1.0, 1.0], requires_grad=True)
    value = giou(point, torch.tensor([1.0, 1.0, 1.0, 1.0]))
    value.backward()
    assert value.isfinite()
    assert point.grad.isfinite().all()
