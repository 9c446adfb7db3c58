"""The matching over a run: a matching that never settles is found, one of ranks is not blamed."""

import numpy as np
import pytest

from lucidetr.config import ModelConfig
from lucidetr.inspection.churn import course_of_matching, draw_matching, warn_of_churn
from lucidetr.inspection.page import as_svg, chart

TWO = ModelConfig(decoder_layers=2)


def lines(*churn):
    queries = [{"churn": [None, each], "used": [0.5, 0.25], "duplicates": [0.0, None]} for each in churn]
    return [{"step": 10 * i + 1, "queries": each} for i, each in enumerate(queries)]


@pytest.mark.parametrize(("last", "ranked", "warned"), [(0.8, False, True), (0.8, True, False), (0.1, False, False)])
def test_a_matching_that_never_settles_is_warned_of(last, ranked, warned):
    matching = course_of_matching(lines(None, 0.9, last), TWO)
    warnings = warn_of_churn(matching, ranked)
    assert len(warnings) == warned
    assert all("80% of the objects" in text for text in warnings)
    assert not any("--" in text for text in warnings), "queries that are not ranked take no hints"


def test_a_second_group_of_queries_is_not_blamed_for_it_is_gone_after_training():
    looks = [{"step": i, "queries": {"churn": [0.1, 0.9], "used": [1, 1], "duplicates": [0, 0]}} for i in range(3)]
    matching = course_of_matching(looks, ModelConfig(decoder_layers=1, query_groups=2))
    assert matching.rows == ("layer 1", "layer 1 group 2")
    assert warn_of_churn(matching, ranked=False) == ()


def test_what_is_unknown_is_no_number():
    matching = course_of_matching(lines(None, 0.9), TWO)
    assert np.isnan(matching.churn[0]).all()
    assert matching.churn[1, 1] == 0.9
    assert matching.steps.tolist() == [1, 11]
    assert warn_of_churn(course_of_matching(lines(None), TWO), ranked=False) == ()
    assert course_of_matching([{"step": 1, "queries": {}}], TWO) is None


def test_it_is_drawn():
    matching = course_of_matching(lines(None, 0.9, 0.4), TWO)
    svg = as_svg(chart(10, 3, lambda drawn: draw_matching(drawn, matching)), "one", "title")
    assert "objects whose query has changed" in svg
    assert "layer 2" in svg
