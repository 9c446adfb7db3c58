"""Detections as the user asks for them: by score, by name, as a table; and what is no question is refused."""

import jaxtyping
import numpy as np
import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.errors import InputError
from lucidetr.structures import Detections

FOUND = Detections(
    boxes_xyxy=torch.tensor([[2.0, 3, 12, 23], [-5, 10, 8, 100]]),
    scores=torch.tensor([1.0, 0.5]),
    labels=torch.tensor([1, 0]),
    categories=Categories(ids=(5, 9), names=("cat", "RBC")),
)


@pytest.fixture
def unchecked():
    """Shapes are not checked: mistakes come as far as they do for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("threshold", [0, 0.5, True, np.float32(0.5), np.int64(0), torch.tensor([0.5, 0.5])])
def test_thresholds_of_every_number_are_taken(unchecked, threshold):
    assert len(FOUND.above(threshold)) == (1 if threshold is True else 2)


@pytest.mark.parametrize("threshold", [50, -0.1, float("nan"), "0.5", None, {"cat": 0.5}, [0.5, 0.5]])
def test_a_threshold_that_is_none_is_refused(unchecked, threshold):
    with pytest.raises(InputError, match="give a number from 0 to 1, or a tensor with one for each of the 2 categ"):
        FOUND.above(threshold)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_a_threshold_of_another_shape_is_refused(unchecked, shape):
    with pytest.raises(InputError, match="threshold tensor of shape"):
        FOUND.above(torch.zeros(shape))


def test_one_name_is_one_name():
    assert FOUND.of_classes("RBC").names == ["RBC"]
    with pytest.raises(InputError, match="unknown category 'RBX': did you mean RBC"):
        FOUND.of_classes("RBX")


def test_a_table_of_nothing_has_the_columns_of_any_other():
    some, nothing = FOUND.to_dataframe(), FOUND.of_classes([]).to_dataframe()
    assert nothing.dtypes.to_dict() == some.dtypes.to_dict()
    assert some["category_id"].dtype == np.int64
