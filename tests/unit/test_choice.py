"""Which recipe fits a data set: small objects ask for pixels, crowds for queries, both for a larger member."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucidetr.categories import Categories
from lucidetr.cli.train import read_config
from lucidetr.data.annotations import Annotations
from lucidetr.fields import to_dict
from lucidetr.recipes import recipe
from lucidetr.training import choice
from lucidetr.training.choice import MEMBERS, choose, object_shares
from run_tools import TINY

RANGE = {member.name: (member.low, member.high) for member in MEMBERS}
RANGE["lucid-l"] = RANGE["lucid-m"]


def annotations(objects, size=(800, 1000), names=("cat", "dog"), images=20):
    """Return images that all hold the same objects: each a label and the side as a share of the picture's."""
    height, width = size
    count = len(objects)
    boxes = np.array([(0, 0, share * width, share * height) for _, share in objects], dtype=np.float64).reshape(-1, 4)
    return Annotations(
        categories=Categories(ids=tuple(range(len(names))), names=names),
        folder=Path(),
        image_ids=np.arange(images),
        file_names=np.array([f"{i}.png" for i in range(images)]),
        sizes=np.array([size] * images),
        starts=np.arange(images + 1) * count,
        annotation_ids=np.arange(images * count),
        boxes_xywh=np.tile(boxes, (images, 1)),
        labels=np.tile(np.array([label for label, _ in objects], dtype=np.int64), images),
        areas=np.tile(boxes[:, 2:].prod(1), images),
        crowd=np.zeros(images * count, dtype=bool),
    )


def chosen(*objects, gpu=True, **given):
    config, reasons = choose(annotations(objects, **given), gpu)
    return config.recipe, config.images.size, reasons


def test_the_smaller_the_objects_the_larger_the_side():
    """An object shall have 20 pixels: a fifth of a side needs 100, a twentieth 400, a fiftieth 1000."""
    assert chosen((0, 0.2))[:2] == ("lucid-xs", 128)
    assert chosen((0, 0.05))[:2] == ("lucid-s", 416)
    assert chosen((0, 0.02))[:2] == ("lucid-m", 640)
    assert chosen((0, 0.9))[:2] == ("lucid-xs", 96)


def test_the_side_is_rounded_up_never_down():
    assert chosen((0, 20 / 129))[1] == 160
    assert chosen((0, 20 / 127))[1] == 128


def test_a_rare_kind_of_small_objects_counts_as_much_as_many_large_ones():
    large = [(0, 0.5)] * 30
    assert chosen(*large)[0] == "lucid-xs"
    assert chosen(*large, (1, 0.05))[:2] == ("lucid-s", 416)
    # within one category it is the tenth smallest of a hundred
    assert chosen(*[(0, 0.5)] * 19, (0, 0.05))[0] == "lucid-xs"
    assert chosen(*[(0, 0.5)] * 16, *[(0, 0.05)] * 4)[0] == "lucid-s"


def test_more_pixels_than_the_pictures_have_are_not_asked_for():
    assert chosen((0, 0.02), size=(300, 240))[:2] == ("lucid-s", 320)
    assert chosen((0, 0.02), size=(90, 90))[:2] == ("lucid-xs", 96)


def test_a_processor_of_float32_alone_gets_the_smallest_member_unless_it_is_crowded():
    config, reasons = choose(annotations([(0, 0.05)] * 28), gpu=False, slow=True)
    assert (config.recipe, config.images.size) == ("lucid-xs", 224)
    assert "with neither a GPU nor bfloat16 lucid-xs at 224 is the largest" in " ".join(reasons)
    assert choose(annotations([(0, 0.2)]), gpu=False, slow=True)[0].images.size == 128
    assert choose(annotations([(0, 0.05)] * 100), gpu=False, slow=True)[0].recipe == "lucid-s"


def test_crowds_get_more_queries_and_a_larger_member():
    config, reasons = choose(annotations([(0, 0.2)] * 400), gpu=True)
    assert config.recipe != "lucid-xs"
    assert config.model.num_queries == 500  # a quarter more than there are objects, in tens
    assert "500 queries (up to 400 objects" in " ".join(reasons)
    few, _ = choose(annotations([(0, 0.2)]), gpu=True)
    assert few.recipe == "lucid-xs"
    assert few.model.num_queries == recipe("lucid-xs").model.num_queries


def test_regions_to_ignore_are_neither_objects_nor_a_crowd():
    data = annotations([(0, 0.2)] + [(1, 0.01)] * 99)
    ignored = replace(data, crowd=data.labels == 1)
    config, _ = choose(ignored, gpu=True)
    assert (config.recipe, config.images.size) == ("lucid-xs", 128)
    assert len(object_shares(ignored)) == 20
    assert choose(data, gpu=True)[0].recipe != "lucid-xs"


def test_without_a_gpu_the_largest_that_learns_in_reasonable_time_is_said_to_be_so():
    name, side, reasons = chosen((0, 0.02), gpu=False)
    assert (name, side) == ("lucid-s", RANGE["lucid-s"][1])
    assert any(reason.startswith("without a GPU lucid-s at 416 is the largest") for reason in reasons)
    assert not any("without a GPU" in reason for reason in chosen((0, 0.05), gpu=False)[2])


def test_many_images_are_worth_the_largest_member(monkeypatch):
    monkeypatch.setattr(choice, "MANY_IMAGES", 50)
    assert chosen((0, 0.02), images=49)[0] == "lucid-m"
    name, side, reasons = chosen((0, 0.02), images=50)
    assert (name, side) == ("lucid-l", 640)
    assert "50 images are enough for the largest member" in reasons
    assert chosen((0, 0.02), images=50, gpu=False)[0] == "lucid-s"
    assert chosen((0, 0.5), images=50)[0] == "lucid-xs"  # nothing asks for a large one


@pytest.mark.parametrize("gpu", [True, False])
def test_no_objects_at_all_are_no_reason_for_anything_large(gpu):
    config, reasons = choose(annotations([]), gpu)
    assert (config.recipe, config.images.size) == ("lucid-xs", 96)
    assert config.model.num_queries == recipe("lucid-xs").model.num_queries
    assert reasons


def test_pictures_are_mirrored_unless_their_names_have_hands():
    for names, flip in ((("cat", "dog"), 0.5), (("left hand", "cup"), 0.0), (("3", "8"), 0.0), (("bright", "d"), 0.5)):
        config, reasons = choose(annotations([(0, 0.2)], names=names), gpu=False)
        assert config.augmentation.flip == flip, names
        assert ("are not mirrored" in reasons[-1]) == (not flip)


def test_the_reasons_name_what_was_chosen():
    name, side, reasons = chosen((0, 0.05))
    assert "20 images of about 1000 pixels" in reasons[0]
    assert "5.0% of a side" in reasons[0]
    assert any(f"chosen: {name} at {side} × {side}" in reason for reason in reasons)


def test_a_run_goes_on_with_its_recipe_whatever_this_machine_would_choose(tmp_path):
    """Here these scenes would get lucid-xs; the run began where something else was chosen."""
    command = ["--data", TINY, "--out", str(tmp_path), "--steps", "3"]
    began = replace(recipe("lucid-m"), data=TINY, out=str(tmp_path), steps=3)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(began)))
    assert read_config([*command, "--resume"], "train") == replace(began, resume=True)
    assert read_config(command, "train").recipe != "lucid-m"
    assert read_config(["lucid-s", *command, "--resume"], "train").recipe == "lucid-s"
    (tmp_path / "config.json").unlink()
    assert read_config([*command, "--resume"], "train").recipe != "lucid-m", "nothing began here"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.floats(0.004, 1.0)), max_size=60),
    st.tuples(st.integers(20, 4000), st.integers(20, 4000)),
    st.booleans(),
)
def test_whatever_the_data_the_member_can_do_what_it_is_asked_for(objects, size, gpu):
    config, _ = choose(annotations(objects, size=size, images=3), gpu)
    low, high = RANGE[config.recipe]
    assert low <= config.images.size <= high
    assert config.images.size % 32 == 0
    assert config.images.resize == "square"
    assert config.model.num_queries >= max(1.25 * len(objects), recipe(config.recipe).model.num_queries)
    assert gpu or config.recipe in ("lucid-xs", "lucid-s")
    assert config.model.fused == recipe(config.recipe).model.fused
