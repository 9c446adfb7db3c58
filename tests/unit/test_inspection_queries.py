"""Attention, matching and queries on planted numbers: what is wrong is found, what is right is left alone."""

import io
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch

from lucid_tools import TINY, off_start
from lucidetr.boxes import cxcywh_to_xyxy
from lucidetr.config import BackboneConfig, ImageConfig, LossConfig, ModelCard, ModelConfig, TrainConfig
from lucidetr.data.batching import evaluation_batches
from lucidetr.data.dataset import open_dataset
from lucidetr.data.preprocessing import prepare
from lucidetr.inspection import attention, matching, queries
from lucidetr.inspection.material import Material
from lucidetr.inspection.microscope import NOBODY, look, look_at
from lucidetr.inspection.page import STYLE

IMAGES = ImageConfig(size=64, max_size=96)
DATA = open_dataset("generated:digits?size=64&digit=14-24&objects=1-3&train=2&val=6", "val")
CATEGORIES = DATA.annotations.categories
PAPER = ModelConfig(
    backbone=BackboneConfig(name="convnet", width=4, norm="group"),
    num_classes=len(CATEGORIES),
    d_model=16,
    num_heads=2,
    head_dim=8,
    feed_forward=32,
    encoder_layers=2,
    decoder_layers=3,
    num_queries=6,
)
ANCHORS = replace(TINY, num_classes=len(CATEGORIES))
SELECTED = replace(ANCHORS, queries="selected", boxes="refined_twice")
FOCAL = LossConfig(classification="focal", cost_class=2.0)


def material(config, images=IMAGES):
    """Return a run that has just begun, off its start, with pictures 0 and 2 to be looked at."""
    model = off_start(config)
    card = ModelCard(model=config, images=images, categories=CATEGORIES, recipe="planted")
    loss = LossConfig() if config.classification == "softmax" else FOCAL
    run = TrainConfig(model=config, images=images, loss=loss)
    return Material(Path("planted"), run, model, card, DATA.annotations, DATA, (0, 2), [], [])


def svg_of(figure):
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.chart.savefig(text, format="svg")
    return text.getvalue()


def view_of(made):
    return look(made.model, made.card, made.dataset, made.pictures[0], made.config.loss)


def asked(made, **changes):
    return queries.query_statistics(made.model, made.dataset, made.card.images, made.config.loss, **changes)


@pytest.fixture(scope="module")
def paper_view():
    """Return a view whose numbers may be replaced by planted ones."""
    return view_of(material(PAPER))


# where the model looks


def test_a_point_s_attention_is_that_of_the_token_it_lies_in(paper_view):
    tokens = np.zeros((2, 2, 6, 6), np.float32)
    tokens[1, :, 4] = [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]  # row 1, column 1 of 2 × 3
    view = replace(paper_view, encoder_attention=tokens, encoder_grid=(2, 3))
    assert attention.attention_of_point(view, 1, 0.5, 0.75).tolist() == [[0, 0, 0.5], [0, 0, 0.5]]
    assert not attention.attention_of_point(view, 1, 0.5, 0.25).any()
    assert attention.attention_of_point(view, 1, 0.4, 1.0).sum() == 1  # the border is the last row's
    assert not attention.attention_of_point(view, 1, 1.0, 1.0).any()


def test_a_query_s_attention_is_one_head_s_or_the_mean(paper_view):
    cells = np.zeros((3, 2, 6, 6), np.float32)
    cells[2, 0, 5, 1], cells[2, 1, 5, 3] = 1.0, 1.0
    view = replace(paper_view, cross_attention=cells, memory_grid=(3, 2))
    assert attention.attention_of_query(view, 2, 5).tolist() == [[0, 0.5], [0, 0.5], [0, 0]]
    assert attention.attention_of_query(view, 2, 5, head=1).tolist() == [[0, 0], [0, 1], [0, 0]]


def test_planted_uniform_attention_is_found_and_only_there():
    made = material(PAPER)
    with torch.no_grad():
        for query in (made.model.encoder.layers[1].attention.query, made.model.decoder.layers[2].cross_attention.query):
            query.weight.zero_()
            query.bias.zero_()
        for layer in (made.model.encoder.layers[0].attention, made.model.decoder.layers[0].cross_attention):
            layer.query.weight.mul_(30)
        made.model.decoder.layers[1].cross_attention.query.weight.mul_(30)
    spreads = attention.spreads(view_of(made))
    np.testing.assert_allclose(spreads["encoder layer 2"], [1.0, 1.0], atol=1e-5)
    np.testing.assert_allclose(spreads["decoder layer 3"], [1.0, 1.0], atol=1e-5)
    said = attention.common([spreads], [{}]).warnings
    assert [each.split(":")[0] for each in said] == ["encoder layer 2", "decoder layer 3"]


def test_attention_in_a_query_s_own_box_is_counted_against_chance(paper_view):
    layers, heads, queries, _ = paper_view.cross_attention.shape
    boxes = np.full_like(paper_view.boxes_cxcywh, 0.5)
    boxes[-1] = [0.5, 0.5, 0.45, 0.2]  # of 4 × 4 cells the middle four, whose middles it holds, none beside them
    cells = np.zeros((layers, heads, queries, 16), np.float32)
    cells[0] = 1 / 16
    cells[1, :, :, [5, 10]] = 0.5
    cells[2, :, :, [0, 5, 6]] = 1 / 3
    view = replace(paper_view, boxes_cxcywh=boxes, cross_attention=cells, memory_grid=(4, 4))
    shares = attention.in_own_boxes(view)
    np.testing.assert_allclose(shares, [0.25, 1.0, 2 / 3, 0.25], atol=1e-6)
    figure = attention.own_boxes([shares, shares])
    assert figure.warnings == (
        "decoder layer 1: 25.0% of the queries' attention lies in their boxes, as do 25.0% of the cells: they do not "
        "look at what they found.",
    )
    assert all(f"layer {number}" in svg_of(figure) for number in (1, 2, 3))


def test_units_that_no_picture_wakes_are_counted():
    first, second = np.arange(20) < 19, np.arange(20) > 0
    figure = attention.common([{}, {}], [{"a": first, "b": first}, {"a": second, "b": first}])
    assert figure.warnings == (
        "b: 95% of the feed-forward's hidden units are 0 at every place of every picture shown.",
    )


def test_the_course_of_a_class_ends_with_its_score(paper_view):
    for view in (paper_view, view_of(material(SELECTED))):
        course = attention.course_of_scores(view, [4, 1])
        assert course.shape == (len(view.logits), 2)
        np.testing.assert_allclose(course[-1], view.scores[-1, [4, 1]], atol=1e-6)


def with_objects(view, boxes):
    """Return the view with these objects and no costs."""
    number, (layers, queries) = len(boxes), view.scores.shape
    return replace(
        view,
        objects_cxcywh=np.array(boxes, np.float32).reshape(number, 4),
        object_labels=np.arange(number),
        cost_parts=np.zeros((layers, queries, number, 3), np.float32),
        assignment=np.full((layers, number), NOBODY),
    )


def test_points_lie_on_the_largest_objects_and_else_on_kept_boxes(paper_view):
    view = with_objects(paper_view, [[0.2, 0.3, 0.1, 0.1], [0.7, 0.6, 0.4, 0.4]])
    assert attention.points_of(view, most=1) == [(pytest.approx(0.7), pytest.approx(0.6))]
    assert len(attention.points_of(with_objects(paper_view, []))) == 3


def test_the_section_draws_every_picture():
    made = attention.section(replace(material(SELECTED), pictures=(0,)))
    names = [figure.name for figure in made.figures]
    kinds = ("found", "layers", "encoder-attention", "cross-attention", "heads", "matching")
    assert names == [
        "pictures-spread",
        "pictures-own-boxes",
        *(f"picture-{DATA.annotations.image_ids[0]}-{kind}" for kind in kinds),
    ]
    drawn = [svg_of(figure) for figure in made.figures if figure.name != "pictures-own-boxes"]
    assert all(word in drawn[1] for word in ("found", "true", "<image"))
    assert drawn[4].count("<image") == 2 * 3 * TINY.decoder_layers  # picture and heat of the best three queries
    assert sum(map(len, drawn)) < 1e6


@pytest.mark.parametrize("config", [ANCHORS, replace(PAPER, encoder_layers=0)], ids=["anchors", "no encoder"])
def test_a_picture_without_objects_or_encoder_is_drawn(config):
    made = material(config)
    view = look_at(made.model, made.card, prepare(DATA.image(0), IMAGES, 4), made.config.loss)
    names = {figure.name.removeprefix("picture-4-") for figure in attention.figures_of(view)}
    expected = {"found", "layers", "cross-attention", "heads"}
    assert names == expected | ({"encoder-attention"} if config.encoder_layers else set())


# who has which object


def planted_costs(view, cost, assignment):
    """Return the view with these costs at its last row, [query object], all of them the class's part."""
    view = with_objects(view, [[0.5, 0.5, 0.2, 0.2]] * len(assignment))
    parts = view.cost_parts.copy()
    parts[-1, ..., 0] = cost
    rows = np.tile(np.array(assignment, np.int64), (len(view.logits), 1))
    return replace(view, cost_parts=parts, assignment=rows)


def test_rivals_are_the_cheapest_others_and_only_free_ones_come_close(paper_view):
    cost = [[1.0, 9.0], [1.001, 0.0], [5.0, 0.001], [2.0, 4.0], [3.0, 8.0], [11.0, 10.0]]
    first, second = matching.rivals(planted_costs(paper_view, cost, [0, 1]))
    assert first.queries.tolist() == [0, 1, 3, 4]
    assert first.taken.tolist() == [True, True, False, False]  # query 1 is nearly as cheap, but has the other object
    assert first.margin == pytest.approx(0.1)  # query 3: 1 of a range of 10
    assert not first.close
    np.testing.assert_allclose(first.parts.sum(1), [1.0, 1.001, 2.0, 3.0], rtol=1e-6)
    assert second.queries.tolist() == [1, 2, 3, 4]
    assert second.margin == pytest.approx(0.0001)
    assert second.close


def test_only_the_undecided_object_is_warned_of(paper_view):
    cost = [[1.0, 9.0], [1.001, 0.0], [5.0, 0.001], [2.0, 4.0], [3.0, 8.0], [11.0, 10.0]]
    (said,) = matching.figure(planted_costs(paper_view, cost, [0, 1])).warnings
    assert "object 1" in said
    assert "query 1" in said


def test_one_undecided_object_of_many_is_drawn_first_and_not_warned_of(paper_view):
    found = [matching.Rivals(i, np.array([i]), np.zeros((1, 3)), np.array([True]), 0.5) for i in range(11)]
    found[7] = replace(found[7], margin=0.001)
    view = with_objects(paper_view, [[0.5, 0.5, 0.2, 0.2]] * 11)
    assert matching.undecided(view, found) == []
    assert "object 7" in matching.undecided(view, found[:9])[0]


def test_an_object_that_nobody_has_has_no_rivals(paper_view):
    one = planted_costs(paper_view, np.eye(6, 2), [NOBODY, 4])
    (only,) = matching.rivals(one)
    assert (only.object, only.queries.tolist()) == (1, [4, 0, 2, 3])
    busy = planted_costs(paper_view, 1 - np.eye(6), range(6))
    assert all(each.margin == np.inf for each in matching.rivals(busy))
    assert matching.figure(planted_costs(paper_view, np.zeros((6, 0)), [])) is None


# what the queries are for


@pytest.mark.parametrize("config", [PAPER, ANCHORS, SELECTED])
@torch.no_grad()
def test_statistics_are_those_of_the_last_layer(config):
    made = material(config)
    statistics = asked(made)
    assert statistics.ranked == config.selects
    boxes, scores = [], []
    for part in evaluation_batches(DATA, IMAGES, 1):
        said = made.model(part.images, part.padding)
        boxes.append(said.boxes_cxcywh[-1, 0].numpy())
        real = said.logits[-1, 0].softmax(-1)[:, :-1] if config is PAPER else said.logits[-1, 0].sigmoid()
        scores.append(real.amax(-1).numpy())
    np.testing.assert_allclose(statistics.boxes_cxcywh, boxes, atol=1e-4)
    np.testing.assert_allclose(statistics.scores, scores, atol=1e-4)
    assert statistics.matched.sum(1).tolist() == DATA.annotations.objects_per_image().tolist()
    assert statistics.image_ids == tuple(DATA.annotations.image_ids.tolist())
    np.testing.assert_allclose(np.diag(statistics.similarity), 1, atol=1e-5)
    assert len(asked(made, most=2).image_ids) == 2


def test_fewer_tokens_than_queries_leave_gaps():
    statistics = asked(material(SELECTED, ImageConfig(resize="square", size=16)))  # 2 × 2 cells for 5 queries
    assert np.isnan(statistics.boxes_cxcywh[:, 4]).all()
    assert np.isfinite(statistics.boxes_cxcywh[:, :4]).all()
    assert not statistics.matched[:, 4].any()
    assert np.isfinite(statistics.similarity[:4, :4]).all()
    assert np.isnan(statistics.similarity[4]).all()  # a rank that was never there is like no other


def plant_twin(made, one, other):
    """Let a query start from what another starts from, nearly."""
    with torch.no_grad():
        for parameter in made.model.queries.parameters():
            parameter[other] = parameter[one] * 1.01


@pytest.mark.parametrize("config", [PAPER, ANCHORS])
def test_a_planted_duplicate_query_is_found(config):
    made = material(config)
    assert queries.near_duplicates(asked(made).similarity) == []
    plant_twin(made, 1, 3)
    assert queries.near_duplicates(asked(made).similarity) == [(1, 3)]
    assert any("1 and 3" in said for said in queries.section(made).figures[1].warnings)


def planted(boxes_xyxy=(), scores=(), matched=(), labels=None, ranked=False):
    """Return statistics of one picture with those queries."""
    corners = np.array(boxes_xyxy, np.float32)
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    return queries.QueryStatistics(
        image_ids=(17,),
        boxes_cxcywh=boxes[None],
        scores=np.array(scores, np.float32)[None],
        labels=np.array(labels or [0] * len(scores))[None],
        matched=np.array(matched, bool)[None],
        similarity=np.eye(len(scores), dtype=np.float32),
        ranked=ranked,
    )


BOXES = [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), (0, 0, 0.5, 0.45), (0, 0, 0.5, 0.35)]  # IoU with the first: 0, 0.9, 0.7


def test_an_object_said_twice_is_found():
    np.testing.assert_allclose(
        cxcywh_to_xyxy(torch.tensor(planted(BOXES, [0.9] * 4, [True] * 4).boxes_cxcywh[0])).numpy(), BOXES, atol=1e-6
    )
    statistics = planted(BOXES, [0.9] * 4, [True, True, False, False])
    assert queries.said_twice(statistics) == [(0, 0, 2)]
    (said,) = queries.warn_of_use(statistics)
    assert "image 17: 0 and 2" in said


def test_a_few_said_twice_of_many_are_no_reason_to_warn():
    apart = [(0.03 * i, 0, 0.03 * i + 0.02, 0.1) for i in range(30)]
    statistics = planted([*apart, apart[0]], [0.9] * 31, [True] * 30 + [False])
    assert queries.said_twice(statistics) == [(0, 0, 30)]
    assert queries.warn_of_use(statistics) == []


@pytest.mark.parametrize(
    "right",
    [
        {"scores": [0.9, 0.9, 0.4, 0.9]},
        {"labels": [0, 0, 1, 0]},
        {"matched": [True, True, True, False]},
        {"matched": [False, True, False, False]},
    ],
    ids=["the second is not sure", "another class", "both have an object", "neither has one"],
)
def test_what_is_no_duplicate_is_left_alone(right):
    values = {"scores": [0.9] * 4, "matched": [True, True, False, False]} | right
    assert queries.said_twice(planted(BOXES, **values)) == []


def test_queries_that_are_never_used_are_counted_but_ranks_are_not_blamed():
    apart = [(0.1 * i, 0, 0.1 * i + 0.05, 0.1) for i in range(6)]
    busy = planted(apart, [0.1] * 6, [True, True] + [False] * 4)
    assert busy.used.tolist() == [True, True] + [False] * 4
    many = replace(
        busy,
        image_ids=tuple(range(6)),
        boxes_cxcywh=np.repeat(busy.boxes_cxcywh, 6, axis=0),
        scores=np.repeat(busy.scores, 6, axis=0),
        labels=np.repeat(busy.labels, 6, axis=0),
        matched=np.repeat(busy.matched, 6, axis=0),
    )
    assert queries.warn_of_use(busy) == []  # two matches say nothing about six queries
    (said,) = queries.warn_of_use(many)
    assert said.startswith("4 of 6 queries never have an object")
    assert queries.warn_of_use(replace(many, ranked=True)) == []
    assert queries.warn_of_use(replace(many, scores=np.tile([0.6] * 6, (6, 1)).astype(np.float32))) == []


@pytest.mark.parametrize("config", [PAPER, SELECTED])
def test_the_section_says_whether_queries_are_slots_or_ranks(config):
    made = queries.section(material(config))
    assert ("ranks, not slots" in made.says) == (config is SELECTED)
    assert [figure.name for figure in made.figures] == ["queries-places", "queries-use"]
    svg = svg_of(made.figures[0])
    assert svg.count("<image") == config.num_queries
    assert "6 pictures" in made.says
