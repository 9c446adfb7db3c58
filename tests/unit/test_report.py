"""The report as a page: well-formed, alone in the world, every anchor there; and what is said of a run's course."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from lucid_tools import TINY
from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard, TrainConfig
from lucidetr.data.dataset import open_dataset
from lucidetr.data.export import open_splits, write_splits
from lucidetr.errors import InputError
from lucidetr.inspection import card, course, gradients, report, weights
from lucidetr.inspection.material import Material, open_run
from lucidetr.inspection.page import INK, Figure, Section, as_svg, chart, written
from lucidetr.models.detr import DETR
from lucidetr.models.size import measure
from lucidetr.recipes import RECIPES
from lucidetr.training.loop import train
from run_tools import tiny

DIGITS = "generated:digits?size=64&digit=14-24&objects=1-3&train=6&val=3"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Read a page and notice what is wrong with it."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.links, self.labels = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.note(tag, dict(attributes))

    def handle_startendtag(self, tag, attributes):
        self.note(tag, dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def note(self, tag, attributes):
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name, value in attributes.items():
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")
            if name in ("href", "xlink:href", "src") and not value.startswith("data:"):
                self.links.append(value)
        if tag == "svg":
            self.labels.append(attributes.get("aria-label"))


def check_page(text):
    """Fail unless the page is balanced, its ids are unique, its anchors exist and it asks the network for nothing."""
    page = Page(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert {link[0] for link in page.links} <= {"#"}
    assert {link[1:] for link in page.links} | set(page.references) <= set(page.ids)
    assert all(page.labels)
    outside_pictures = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    assert re.search(r"https?:|//\w|@import|<script", outside_pictures) is None
    return page


def line_chart(seed=0):
    def draw(made):
        left, right = made.subplots(1, 2)
        left.plot(np.arange(4), np.random.default_rng(seed).random(4), label="a < b & c", clip_on=True)
        left.legend()
        right.imshow(np.eye(3))

    return chart(4, 2, draw)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Return the material of a run that has learned nothing and written nothing down."""
    torch.manual_seed(0)
    config = TrainConfig(
        recipe="lucid-xs",
        model=replace(TINY, num_classes=10),
        loss=replace(TrainConfig().loss, classification="focal"),
        images=ImageConfig(resize="square", size=64),
        data=DIGITS,
    )
    dataset = open_dataset(DIGITS, "val")
    about = ModelCard(config.model, config.images, dataset.annotations.categories, "lucid-xs", step=3)
    run = tmp_path_factory.mktemp("report") / "a-run"
    return Material(run, config, DETR(config.model).eval(), about, dataset.annotations, dataset, (0,), [], [])


def test_ids_of_two_charts_do_not_meet():
    first, second = as_svg(line_chart(), "one", "first"), as_svg(line_chart(), "two", "second")
    page = check_page(f"<div>{first}{second}</div>")
    assert page.labels == ["first", "second"]
    assert page.ids
    assert all(each.startswith(("one-", "two-")) for each in page.ids)


def test_a_chart_takes_its_ink_and_its_width_from_the_page():
    svg = as_svg(line_chart(), "one", 'a "title"')
    assert INK not in svg
    assert "currentColor" in svg
    assert re.match(r'<svg viewBox="0 0 288 144" role="img" aria-label="a &quot;title&quot;">', svg)
    assert "a &lt; b &amp; c" in svg
    assert "DejaVu" not in svg
    assert "<style" not in svg


def test_the_page_is_whole(material):
    strange = "An object <b> & another"
    figures = tuple(
        Figure(f"chart-{i}", f"Chart {i}", line_chart(i), "It rises.", (strange,) if i else ()) for i in range(3)
    )
    table = ("Numbers", [["class", "AP"], ["<cat>", "0.5"]])
    headless = ("Facts", [["", ""], ["batch", "16"]])
    sections = {
        "course": Section("The course", "What happened.", figures, (table, headless), ("All is late.",)),
        "card": Section("Card", "Nothing to see."),
    }
    text = report.render(material, sections)
    page = check_page(text)
    assert {"#summary", "#course", "#card", "#course-warning-1", "#figure-chart-1-warning-1"} <= set(page.links)
    assert len(page.labels) == 3
    assert "3 things are not as in a healthy run" in text
    assert text.count("An object &lt;b&gt; &amp; another") == 4  # twice in the summary, twice below its figure
    assert "&lt;cat&gt;" in text
    assert text.count("<thead>") == 1
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_a_run_without_warnings_is_said_to_be_healthy(material):
    text = report.render(material, {"card": Section("Card", "Nothing to see.")})
    assert "Nothing in this run looks unhealthy" in text
    check_page(text)


def test_what_was_not_written_down_is_said(material):
    for module in (weights, gradients):
        made = module.section(material)
        assert "no statistics.jsonl" in made.says
        assert made.figures == made.warnings == ()
    assert "no metrics.jsonl" in course.section(material).says


def test_a_run_whose_data_have_other_categories_now_is_refused(tmp_path):
    write_splits(open_splits(DIGITS), tmp_path / "set", "voc")
    run = train(replace(tiny(tmp_path / "run"), data=str(tmp_path / "set")))
    open_run(run)
    for file in (tmp_path / "set").rglob("*.xml"):
        file.write_text(re.sub(r"<name>\d</name>", "<name>ant</name>", file.read_text(), count=1))
    with pytest.raises(InputError, match="inspect needs the data that the run was trained on"):
        open_run(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not a run's folder: there is no run.json in it"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"run\.json: expected a JSON list, got dict"):
        open_run(tmp_path)


# ------------------------------------------------------------------------------------------------ the course of a run


def training(losses, norms=(1.0,), layers=4):
    terms = {name: [0.5] * layers for name in ("classification", "l1", "giou")}
    return [
        {"step": 10 * (i + 1), "loss": loss, **terms, "gradient_norm": norms[i % len(norms)], "lr": 1e-3}
        | {"images_per_second": 5.0, "seconds": 2.0 * i, "epoch": 0.1 * i}
        for i, loss in enumerate(losses)
    ]


def looks(values):
    return [{"step": i + 1, "val/AP": value, "seconds": 10.0 * i} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([9, 7, 5, 4, 3, 2.5, 2.2, 2.1, 2, 2], None),
        ([3, 3, 4, 4, 5, 5, 6, 6, 7, 7], "rose over the run, from 3 to 7"),
        ([9, 7, 5, 4, 2, 2, 5, 5, 6, 6], "ends at 6, far above the 2"),
        ([9, 7, float("nan"), 4], "not finite at step 30"),
        ([9], None),
    ],
)
def test_a_loss_that_goes_wrong_is_named(losses, said):
    warnings = course.loss_warnings(training(losses))
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.1, 0.3, 0.5, 0.6, 0.65, 0.66], None),
        ([0.0, 0.0, 0.0], "AP is 0 at the end"),
        ([0.2, 0.5, 0.6, 0.6, 0.55, 0.5], "falls over the last third of the run, from 0.600 to 0.500"),
        ([0.6, 0.3, 0.4, 0.5, 0.51, 0.52], None),
        ([0.1, 0.3, 0.5, 0.60, 0.595, 0.59], None),
        ([], None),
    ],
)
def test_precision_that_goes_wrong_is_named(values, said):
    warnings = course.precision_warnings(looks(values))
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_a_gradient_norm_far_above_the_clip_throughout_is_named():
    assert course.gradient_warnings(training([1.0] * 10, norms=(5.0,)), 0.1) == ()
    assert course.gradient_warnings(training([1.0] * 10, norms=(5000.0, 1.0)), 0.1) == ()
    (said,) = course.gradient_warnings(training([1.0] * 10, norms=(5000.0,)), 0.1)
    assert "50,000 times the clip" in said
    assert course.gradient_warnings(training([1.0] * 10, norms=(5000.0,)), 0.0) == ()


def test_a_run_that_stopped_early_is_named():
    lines = training([3.0, 2.0])
    assert course.length_warnings(lines, replace(TrainConfig(), steps=20)) == ()
    assert "step 20 of 30" in course.length_warnings(lines, replace(TrainConfig(), steps=30))[0]
    assert "of 1 minutes" in course.length_warnings(lines, replace(TrainConfig(), minutes=1.0))[0]
    assert "epoch 0.1 of 2" in course.length_warnings(lines, replace(TrainConfig(), epochs=2.0))[0]


@pytest.mark.parametrize("length", [{"steps": 30}, {"minutes": 1.0}, {"epochs": 0.15}])
def test_a_run_whose_last_step_was_skipped_has_come_to_its_end(material, length):
    lines = [*training([3.0, 2.0], layers=3), {"step": 30, "skipped": {"loss": "nan"}, "seconds": 60.0}]
    config = replace(material.config, **length)
    assert len(course.length_warnings(lines[:-1], config)) == 1
    made = course.section(replace(material, metrics=lines, config=config))
    assert made.warnings == ()
    assert made.says == "30 optimiser steps in 1.0 minutes of training."


def test_rows_of_hints_and_groups_are_named():
    model = replace(RECIPES["lucid-xs"].model, denoising=0.4, decoder_layers=1, query_groups=2)
    assert course.row_names(model) == [
        "proposals",
        "proposals group 2",
        "layer 1 hints",
        "layer 1",
        "layer 1 group 2",
    ]


def test_the_course_is_drawn(material):
    lines = looks([0.1, 0.2]) + training([5.0, 4.0, 3.0], layers=3)
    made = course.section(replace(material, metrics=lines, config=replace(material.config, steps=30)))
    assert [figure.name for figure in made.figures] == ["course-loss", "course-precision", "course-pace"]
    assert made.warnings == ()
    svg = as_svg(made.figures[0].chart, "loss", "Loss")
    assert [name for name in ("layer 1", "layer 2", "layer 3") if name not in svg] == []


# -------------------------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize("name", ["lucid-xs", "detr-xs"])
def test_operations_by_part_add_up_to_the_whole(name):
    parts = card.operations_by_part(RECIPES[name])
    assert sum(parts.values()) == pytest.approx(measure(RECIPES[name]).gflops, rel=1e-6)
    assert parts["decoder, cross-attention"] > 0


def test_the_recipe_is_a_diff():
    rows = card.recipe_table(replace(RECIPES["detr-r50"], out="somewhere", steps=3, recipe="mine"))
    assert rows == [["setting", "detr-r50 (the paper)", "mine"]]
    named = {row[0]: row[1:] for row in card.recipe_table(RECIPES["lucid-xs"])}
    assert named["model.queries"] == ["learned", "scored"]


def test_data_are_counted(material):
    annotations = material.dataset.annotations
    made = card.summarise_data(annotations)
    assert made.images == 3
    assert made.class_counts.sum() == made.objects_per_image.sum() == len(made.sides) == len(annotations.labels)
    assert 14 / 64 * 0.3 < made.sides.mean() < 24 / 64
    fullest = int(made.objects_per_image.max())
    full = replace(made, class_counts=np.ones_like(made.class_counts))
    assert card.data_warnings(full, fullest) == ()
    assert f"has {fullest} objects" in card.data_warnings(full, fullest - 1)[0]
    full.class_counts[4] = 0
    assert "Classes without any object in the training split (1): 4." in card.data_warnings(full, 100)


@pytest.mark.parametrize("fullest", [0, 1, 59, 60, 61, 119, 1000])
def test_the_charts_of_the_data_leave_nothing_out(fullest):
    sides = np.array([0.1, 0.5, 1.0, 1.02])  # the last lies over its picture's edge
    made = card.DataSummary(5, ("a",), np.array([4]), np.array([0, 0, 0, 0, fullest]), sides)
    _, number, size = chart(10, 3, lambda figure: card.draw_data(figure, made, made)).axes
    for axes in (number, size):
        drawn = [patch.get_data() for patch in axes.patches]
        assert [each.values.sum() for each in drawn] == pytest.approx([100, 100])
    assert drawn[0].values[-1] == pytest.approx(50)


def test_categories_speak_their_own_names():
    names = Categories(ids=(7, 9), names=("cat", "dog"))
    assert card.show(names.names) == "cat, dog"


def test_a_power_of_ten_is_drawn_as_one_and_a_dollar_as_a_dollar():
    def draw(figure):
        figure.subplots().set(yscale="log", ylim=(1e-3, 1), title=written("coin_$1_to_$5"))

    svg = as_svg(chart(3, 2, draw), "one", "title")
    assert "mathdefault" not in svg
    assert "coin_$1_to_$5" in svg
