"""The studies: what they train differs only where they say, they go on where they stopped, and their pages add up."""

import importlib
import json
import shlex
from dataclasses import asdict, replace
from typing import get_args, get_type_hints

import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.cli import study as command_line
from lucidetr.config import ModelCard, TrainConfig
from lucidetr.criterion.set_loss import normalisers, set_loss
from lucidetr.data.preprocessing import resized_size
from lucidetr.errors import InputError
from lucidetr.fields import difference
from lucidetr.models.detr import DETR
from lucidetr.recipes import DETR_XS, LUCID_S_LITE0, LUCID_XS, recipe
from lucidetr.studies import ablations, experiment, initialisation, outset, residuals, start, three_ways
from lucidetr.studies.engines import choose_engine, listening
from lucidetr.studies.experiment import Plan, Result, fingerprint, read_results, run_grid, run_one
from lucidetr.studies.page import Page, write_page
from lucidetr.training.checkpoint import save_model
from lucidetr.training.engine import FAST, Engine
from lucidetr.training.precision import choose_device, choose_precision
from run_tools import TINY, tiny

PLAN = Plan(minutes=2.0, seeds=2)
HERE = choose_precision("auto", choose_device("auto"))


def result(kind, name, seed=0, **values):
    base = {"minutes": 2.0, "threads": torch.get_num_threads(), "data": experiment.DATA, "ap": 0.5, "ap50": 0.6}
    base |= {"steps": 10, "images_per_second": 20.0, "precision": HERE, "commit": "abc", "machine": "m"}
    base |= {"config": fingerprint(DETR_XS), "side": DETR_XS.images.size, "clock": "wall"}
    return Result(kind, name, seed, **(base | {"numbers": {"seconds": 8.0, "loss": 3.0}} | values))


def made_up(aps):
    """Return what runs a contender in no time: its AP is `aps[name]` (0.5 where it has none), 0.01 more in seed 1."""

    def run(kind, name, config, *rest):
        lengths = {"minutes": config.minutes, "steps": config.steps or 10, "data": config.data}
        lengths |= {"config": fingerprint(config), "side": config.images.size, "clock": config.clock}
        lengths |= {"precision": HERE if config.precision == "auto" else config.precision}
        return result(kind, name, config.seed, ap=aps.get(name, 0.5) + 0.01 * config.seed, **lengths)

    return run


def changed(config, base):
    return {name: now for name, (now, _) in difference(config, base).items()}


# the grids


def test_every_ablation_differs_from_the_base_in_its_own_fields_alone():
    rows = {row.name: row for row in ablations.ROWS}
    assert len(rows) == len(ablations.ROWS)
    for kind, name, config in ablations.contenders():
        assert kind == "lucid-xs"
        assert changed(config, LUCID_XS) == rows[name].changes
        assert rows[name].against in rows


def test_every_scheme_differs_from_the_base_in_how_it_starts_alone():
    for _, name, config in initialisation.contenders():
        assert changed(config, initialisation.BASE) == initialisation.SCHEMES[name]
    assert set(changed(initialisation.BASE, LUCID_XS)) == {"model.initialisation", "model.residual_start"}
    assert config == LUCID_XS  # the last scheme is the recipe's own
    drawn = {c.model.initialisation for _, _, c in initialisation.contenders()}
    assert drawn == {"default", "uniform", "uniform_scaled", "xavier", "he_in", "he_out", "t_fixup"}


def test_every_block_differs_from_the_base_in_its_blocks_alone():
    grid = list(residuals.contenders())
    assert len({(kind, name) for kind, name, _ in grid}) == len(grid) == 12
    for kind, name, config in grid:
        fields = {"model.encoder_block", "model.decoder_block", "model.residual_start"}
        assert set(changed(config, recipe(kind))) <= fields
        assert config.model.residual_start == "xavier"
        assert (config.model.encoder_block, config.model.decoder_block) == residuals.BLOCKS[name]


def test_the_three_ways_differ_in_engine_and_in_weights_alone():
    ways = three_ways.ways(PLAN)
    assert changed(ways[three_ways.REFERENCE], ways[three_ways.FAST]) == {"engine": "reference"}
    assert changed(ways[three_ways.RANDOM], ways[three_ways.TUNED]) == {"weights": ""}
    assert changed(ways[three_ways.FAST], LUCID_XS) == {"precision": "fp32"}  # as the reference computes
    assert ways[three_ways.TUNED].weights == "efficientnet-lite0"
    smaller = {"model.num_queries", "images.size", "augmentation.flip", "batch", "micro_batch"}
    assert set(changed(ways[three_ways.TUNED], LUCID_S_LITE0)) == smaller


def test_a_budget_of_images_is_the_same_number_of_images_for_each_way():
    plan = replace(PLAN, images=1600)
    grid = [(kind, plan.given(config, 0)) for kind, _, config in three_ways.contenders(plan)]
    assert {config.steps * config.batch for kind, config in grid if kind == "images"} == {1600}
    assert {(config.steps, config.minutes) for kind, config in grid if kind == "minutes"} == {(0, 2.0)}


def test_the_start_is_looked_at_in_two_models_or_one():
    names = [name for _, name, _ in start.contenders(start.USUAL)]
    assert names == ["detr-xs", "detr-222m"]
    assert [name for _, name, _ in start.contenders(start.QUICK)] == ["detr-xs"]
    for _, name, config in start.contenders(start.USUAL):
        assert {field.split(".")[0] for field in changed(config, recipe(name))} <= {
            "images",
            "augmentation",
            "batch",
            "micro_batch",
        }


def test_more_seeds_than_the_start_shows_are_refused(tmp_path):
    with pytest.raises(InputError, match="--seeds 2: start shows one run of each model"):
        start.study(tmp_path, replace(start.QUICK, seeds=2))


# the frame


def test_a_plan_gives_minutes_or_steps():
    assert (PLAN.given(DETR_XS, 3).minutes, PLAN.given(DETR_XS, 3).steps, PLAN.given(DETR_XS, 3).seed) == (2.0, 0, 3)
    own = PLAN.given(replace(DETR_XS, steps=7), 0)
    assert (own.minutes, own.steps) == (0.0, 7)
    all_alike = replace(PLAN, steps=4).given(replace(DETR_XS, steps=7), 0)
    assert (all_alike.minutes, all_alike.steps) == (0.0, 4)
    assert replace(PLAN, looks=5).given(DETR_XS, 0).statistics == 5


def test_a_side_is_what_the_model_sees_whatever_the_recipe_allows():
    small, large = (replace(PLAN, side=side).given(DETR_XS, 0) for side in (96, 320))
    assert (small.images.size, small.images.max_size) == (96, DETR_XS.images.max_size)
    assert (large.images.size, large.images.max_size) == (320, 320)
    assert resized_size(128, 128, large.images) == (320, 320)
    square = replace(PLAN, side=320).given(LUCID_XS, 0).images
    assert (square.resize, square.size) == ("square", 320)


def test_runs_of_other_threads_or_precision_are_other_runs():
    config, other = PLAN.given(DETR_XS, 0), "fp64"
    few = torch.get_num_threads() + 1
    assert experiment.is_of(result("k", "a"), "k", "a", config)
    assert not experiment.is_of(result("k", "a", threads=few), "k", "a", config)
    assert not experiment.is_of(result("k", "a", precision=other), "k", "a", config)
    assert experiment.is_of(result("k", "a", precision=other), "k", "a", replace(config, precision=other))
    counted = replace(PLAN, steps=10).given(DETR_XS, 0)  # as far whoever computes
    assert experiment.is_of(result("k", "a", threads=few, minutes=0.0), "k", "a", counted)


def test_a_grid_goes_on_where_it_stopped(tmp_path):
    file, asked = tmp_path / "deep" / "study.jsonl", []

    def run(kind, name, config):
        asked.append((name, config.seed, config.minutes, config.steps))
        return made_up({})(kind, name, config)

    grid = [("k", "a", DETR_XS), ("k", "b", replace(DETR_XS, steps=5))]
    run_grid(file, grid[:1], PLAN, run)
    assert asked == [("a", 0, 2.0, 0), ("a", 1, 2.0, 0)]
    asked.clear()
    run_grid(file, grid, PLAN, run)
    assert asked == [("b", 0, 0.0, 5), ("b", 1, 0.0, 5)]
    asked.clear()
    run_grid(file, grid, PLAN, run)
    assert asked == []
    run_grid(file, grid, replace(PLAN, steps=9), run)  # another length is another run
    assert len(asked) == 4
    results = read_results(file)
    assert [r.steps for r in experiment.chosen(results, grid[1], PLAN)] == [5, 5]
    assert [r.steps for r in experiment.chosen(results, grid[1], replace(PLAN, steps=9, seeds=1))] == [9]


def test_half_a_last_line_is_no_run_and_in_nobodys_way(tmp_path):
    """As a full disk or a killed process leaves it."""
    file = tmp_path / "study.jsonl"
    experiment.append(file, result("k", "a", 0))
    file.write_bytes(file.read_bytes() + file.read_bytes()[:40])
    assert [r.name for r in read_results(file)] == ["a"]
    experiment.append(file, result("k", "b", 0))
    assert [r.name for r in read_results(file)] == ["a", "b"]


def test_of_runs_of_one_seed_the_last_counts():
    twice = [result("k", "a", 0, ap=0.1), result("k", "a", 1, ap=0.3), result("k", "a", 0, ap=0.2)]
    found = experiment.chosen(twice, ("k", "a", DETR_XS), PLAN)
    assert [(r.seed, r.ap) for r in found] == [(0, 0.2), (1, 0.3)]
    backwards = [result("k", "a", seed) for seed in (1, 0)]
    assert [r.seed for r in experiment.chosen(backwards, ("k", "a", DETR_XS), PLAN)] == [0, 1]


def test_a_run_is_measured_heard_and_read(tmp_path):
    losses = []
    config = PLAN.given(tiny("", steps=3, micro_batch=4), 0)
    config = replace(config, data=TINY, statistics=3)
    found = run_one("k", "n", config, residuals.read_gradients, listening(FAST, losses))
    assert found.steps == 3
    assert found.minutes == 0
    assert len(losses) == 3
    assert found.series["step"] == (1, 2, 3)
    assert found.numbers["backbone at first"] == found.series["backbone"][0] > 0
    assert found.numbers["queries at first"] > 0
    assert found.numbers["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert found.images_per_second == pytest.approx(3 * 4 / found.numbers["seconds"])
    assert experiment.from_dict(Result, json.loads(json.dumps(asdict(found)))) == found


def test_a_run_that_meets_a_number_that_is_none_counts_as_nothing(tmp_path):
    def loss(predictions, *rest):
        made = set_loss(predictions, *rest)
        return replace(made, total=made.total * torch.nan)

    config = replace(PLAN.given(tiny("", steps=12), 0), data=TINY)
    found = run_one("k", "n", config, engine=Engine(forward=FAST.forward, loss=loss))
    assert (found.ap, found.steps, found.numbers["diverged"]) == (0.0, 10, 1.0)
    assert experiment.is_of(found, "k", "n", config)
    page = write_page(tmp_path, "x", Page("T", "Q?", (), (), ()), PLAN, [found]).read_text()
    assert "1 of them met numbers that are not finite" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compile": True}, "leave --compile out"),
        ({"recompute": True}, "leave --recompute out"),
        ({"freeze": ("fusion",)}, "batch norm would move though it is frozen"),
        ({"freeze": ("backbone.stem",)}, "batch norm would move though it is frozen"),
        ({"freeze": ("encoder",), "recipe": "detr-xs"}, "dropout would move though it is frozen"),
    ],
)
def test_what_the_reference_engine_cannot_do_is_refused(changes, said):
    config = DETR_XS if changes.get("recipe") else LUCID_XS
    with pytest.raises(InputError, match=said):
        choose_engine(replace(config, engine="reference", **changes))


def test_old_lines_without_numbers_and_series_are_read(tmp_path):
    line = {k: v for k, v in asdict(result("rung", "detr-xs")).items() if k not in ("numbers", "series")}
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    assert read_results(tmp_path / "old.jsonl")[0].numbers == {}


def test_gains_are_between_runs_of_the_same_seed():
    ours = [result("k", "a", 0, ap=0.5), result("k", "a", 1, ap=0.7), result("k", "a", 2, ap=0.9)]
    base = [result("k", "b", 1, ap=0.6), result("k", "b", 0, ap=0.1)]
    assert experiment.gains(ours, base) == pytest.approx([0.4, 0.1])


def test_a_page_names_command_machine_and_commit(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    page = Page("Title", "Why?", ((tmp_path / "a.png", "A figure."),), ("| t |",), ("Because.",))
    text = write_page(tmp_path, "ablations", page, replace(PLAN, quick=True), [result("k", "n")]).read_text()
    for words in ("# Title", "Why?", "![A figure.](a.png)", "| t |", "- Because.", "commit abc", "thread(s) of m"):
        assert words in text
    assert "`lucidetr study ablations --out DIR --quick --minutes 2 --seeds 2`" in text
    asked = replace(PLAN, steps=9, images=160, clock="processor", data="my own", weights="a'b", side=96)
    text = write_page(tmp_path, "three-ways", page, asked, []).read_text()
    words = shlex.split(text.split("`")[1])
    assert words[:3] == ["lucidetr", "study", "three-ways"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    kept = {"--data": "my own", "--weights": "a'b", "--side": "96", "--clock": "processor", "--threads": "1"}
    assert given == {"--out": "DIR", "--steps": "9", "--seeds": "2"} | kept


def test_a_page_has_its_parts_in_order(tmp_path):
    page = Page("Title", "Why?", ((tmp_path / "a.png", "A figure."),), ("| t |",), ("Because.",))
    text = write_page(tmp_path, "ablations", page, PLAN, [result("k", "n")]).read_text()
    assert text.index("Why?") < text.index("a.png") < text.index("Because.") < text.index("commit abc")


# before the first step


def test_the_outset_has_the_fast_models_loss_and_what_the_paper_says_of_the_first_self_attention():
    config = replace(tiny(""), batch=2, micro_batch=2)
    seen = outset.look(config)
    fitted, model, batch = outset.fresh(config)
    norm = normalisers(batch.counts.tolist(), fitted.model.num_queries, fitted.loss)
    loss = set_loss(model(batch.images, batch.padding), batch, norm, fitted.loss).total
    assert seen.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            there = 0.0 if parameter.grad is None else float(parameter.grad.std())
            assert seen.gradients[name] == pytest.approx(there, rel=1e-2, abs=1e-6), name
    # the queries' content is zero at first, so all their values are alike (DETR, section 3.2)
    assert seen.gradients["decoder.layers.0.self_attention.value.weight"] == 0
    assert 0 < min(seen.entropies.values()) <= max(seen.entropies.values()) <= 1 + 1e-6
    assert len(seen.entropies) == 3 + 3 + 3
    names = list(seen.variances)
    assert names[0] == "backbone.stem.output"
    assert names[-1] == "decoder.layers.2.feed_forward_path.after"
    assert seen.variances["encoder.layers.0.attention_path.after"] == pytest.approx(1, rel=0.02)  # it was just normed


def test_a_histogram_of_two_tensors_counts_both():
    limit, counts, deviation = start.bars([torch.tensor([-2.0, 0.1]), torch.tensor([1.0, 1.0, 0.2])])
    assert limit == 2.0
    assert counts.sum() == 5
    assert counts[0] == 1  # −2 alone lies in the first bar
    values = torch.tensor([-2.0, 0.1, 1.0, 1.0, 0.2])
    assert deviation == pytest.approx(float(values.std(correction=0)))


# the pages


def test_the_start_draws_what_was_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "contenders", lambda plan: iter([("start", "small", tiny("", steps=0))]))
    page = start.study(tmp_path, replace(start.QUICK, steps=3, data=TINY)).read_text()
    (found,) = read_results(tmp_path / "start.jsonl")
    assert page.startswith("# The first 3 batches")
    assert {len(values) for values in found.series.values()} == {3}
    assert sum(name.startswith("std ") for name in found.series) == 4
    assert (tmp_path / "start-small.png").stat().st_size > 10_000
    assert f"from {found.series['loss'][0]:.1f} to {found.series['loss'][-1]:.1f}" in page
    assert "| small | uniform | 0.0115 | 0.01" in page  # 0.02 / √3
    assert "no gradient at all reaches decoder.layers.0.self_attention.value.weight" in page


def test_a_start_that_comes_apart_in_its_first_step_is_drawn(tmp_path):
    series = start.read_series(tmp_path) | {"loss": (float("nan"),) * 10}  # no look was written down
    histograms = {"default": (start.bars([torch.tensor([-1.0, 1.0])]),) * 2}
    picture = start.save(tmp_path / "start.png", (11, 12), lambda f: start.draw_start(f, histograms, series))
    assert picture.is_file()
    assert start.sentences("small", series) == [
        "small: the loss does not fall over 10 batches, from nan to nan.",
    ]


def test_initialisation_compares_with_the_default(tmp_path, monkeypatch):
    seen = outset.Outset({"backbone.a": 1.0, "encoder.b": 2.0}, {"backbone.a": 1e-3, "heads.b": 1.0}, {"x": 0.5}, 9.0)
    monkeypatch.setattr(initialisation, "look", lambda config: seen)
    monkeypatch.setattr(initialisation, "run_one", made_up({"xavier": 0.8, "uniform": 0.3}))
    page = initialisation.study(tmp_path, replace(PLAN, quick=True)).read_text()
    assert "lucid-xs, xavier against default: +30.0 ± 0.0 points of AP." in page
    assert "as better: xavier." in page
    assert "| xavier | 1 | 2 | – | 1.0e-03 | 0.500 | 9.0 | 3.00 ± 0.00 | 0.805 ± 0.007 |" in page
    assert "3.0 powers of ten" in page
    for picture in ("initialisation-lucid-xs.png", "initialisation-outcome.png"):
        assert (tmp_path / picture).is_file()


def test_residuals_compare_with_post_norm(tmp_path, monkeypatch):
    def run(kind, name, config, read):
        strength = 0.25 if name == "encoder cut" else 1.0
        series = {"step": (1.0, 2.0), "backbone": (strength, 0.5), "queries": (1.0, 0.0)}
        numbers = {
            "loss": 6.0 if name == "encoder cut" else 3.0,
            "backbone at first": strength,
            "queries at first": 1.0,
        }
        made = made_up({"pre-norm": 0.7})(kind, name, config)
        return replace(made, series=series, numbers=made.numbers | numbers)

    monkeypatch.setattr(residuals, "run_one", run)
    page = residuals.study(tmp_path, PLAN).read_text()
    assert (
        "detr-xs, encoder cut against post-norm: the first gradient at the backbone's last kernels is 0.25 times as "
        "strong, the first gradient at the queries' first matrix is 1 times as strong, the loss at the end 2.00 times "
        "as high." in page
    )
    assert "lucid-xs, pre-norm against post-norm" in page
    assert "+20.0 ± 0.0 points of AP" in page
    assert "| detr-xs | encoder cut | 2.5e-01 | 3.8e-01 |" in page  # median of 0.25 and 0.5


def test_ablations_say_where_the_sign_agrees(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "run_one", made_up({"encoder-0": 0.4, "encoder-3": 0.45, "no-position": 0.6}))
    page = ablations.study(tmp_path, PLAN).read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("|")]
    cells = {change: rest for _, change, *rest in rows}
    assert cells["no encoder layer"][2:] == ["-3.9", "Table 2, 0 for 6", "-10.0 ± 0.0", "yes"]
    assert cells["three, for none"][4:] == ["+5.0 ± 0.0", "yes"]
    assert cells["two encoder layers, for none"][2:] == ["–", "not in the paper", "+10.0 ± 0.0", ""]
    assert cells["no position of cells"][4:] == ["+10.0 ± 0.0", "no"]
    assert cells["no L1 in loss and cost"][4:] == ["+0.0 ± 0.0", "not told apart"]
    assert "The sign is the other: 1 of 10 rows (no-position)." in page


def test_three_ways_have_a_table_for_each_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(three_ways, "run_one", made_up({three_ways.TUNED: 0.9}))
    page = three_ways.study(tmp_path, replace(PLAN, images=160)).read_text()
    assert "| AP after 160 images |" in page
    assert "| AP after 2 minutes |" in page
    assert "Equal images: the fast engine sees 1.0 times as many images a second as the reference" in page
    assert "Equal minutes: from ImageNet against random weights: +40.0 ± 0.0 points of AP." in page


def test_three_ways_with_steps_are_trained_once_and_called_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(three_ways, "run_one", made_up({}))
    page = three_ways.study(tmp_path, replace(PLAN, images=160, steps=7)).read_text()
    assert {(r.kind, r.steps) for r in read_results(tmp_path / "three-ways.jsonl")} == {("steps", 7)}
    assert len(read_results(tmp_path / "three-ways.jsonl")) == 4 * PLAN.seeds
    assert "| AP after 7 steps |" in page
    assert "Equal steps: the fast engine" in page
    assert "Equal images" not in page
    assert "Equal minutes" not in page


def test_a_detector_of_ones_own_is_one_more_way(tmp_path):
    config = replace(LUCID_XS, model=replace(LUCID_XS.model, d_model=32, num_queries=7, num_classes=2))
    card = three_ways.load_start(trained_as(tmp_path, config)).card
    plan = replace(PLAN, weights=str(tmp_path / "mine.safetensors"))
    tuned, random = list(three_ways.ways(plan).values())[-2:]
    assert list(three_ways.ways(plan))[-2:] == [f"{plan.weights} tuned", f"{plan.weights}, random weights"]
    assert tuned.model == random.model == card.model
    assert (tuned.weights, random.weights) == (plan.weights, "")
    assert tuned.optimiser == random.optimiser  # slower rates follow from the weights, when the run starts


def trained_as(folder, config):
    """Save a fresh detector and return the config that starts from it."""
    card = ModelCard(config.model, config.images, Categories((0, 1), ("a", "b")), config.recipe)
    save_model(folder / "mine.safetensors", DETR(config.model).state_dict(), card)
    return TrainConfig(weights=str(folder / "mine.safetensors"))


# the command line


@pytest.fixture
def planned(monkeypatch):
    """Let studies do nothing but say what they were asked for."""
    asked = []
    monkeypatch.setattr(ablations, "study", lambda folder, plan: asked.append(plan) or folder)
    monkeypatch.setattr(three_ways, "study", lambda folder, plan: asked.append(plan) or folder)
    return asked


def test_options_change_the_usual_plan_or_the_quick_one(planned, capsys):
    command_line.run(["ablations", "--out", "here"])
    command_line.run(["ablations", "--out", "here", "--quick", "--seeds", "2", "--part", "2/3"])
    command_line.run(
        ["three-ways", "--out", "here", "--minutes", "3", "--images", "99", "--data", "d", "--weights", "w"]
    )
    usual, quick, mine = planned
    assert usual == ablations.USUAL
    assert quick == replace(ablations.QUICK, seeds=2, part=(2, 3))
    assert mine == replace(three_ways.USUAL, minutes=3.0, images=99, data="d", weights="w")
    assert "table: here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["start", "--minutes", "1"], "start counts batches, give --steps"),
        (["ablations", "--images", "9"], "--images belongs to the study three-ways"),
        (["three-ways", "--images", "9", "--steps", "3"], "--images 9 --steps 3: with --steps every run is that long"),
        (["ladder", "--weights", "x"], "--weights belongs to the study three-ways"),
        (["ablations", "--seeds", "0"], "--seeds 0: choose a number above 0"),
        (["ablations", "--steps", "2", "--minutes", "1"], "give one of them"),
        (["ablations", "--threads", "-1"], "--threads -1: choose 0"),
    ],
)
def test_options_that_ask_for_nothing_are_refused(options, said, tmp_path):
    with pytest.raises(InputError, match=said):
        command_line.run([*options, "--out", str(tmp_path)])


@pytest.mark.parametrize("name", get_args(get_type_hints(command_line.Options)["name"]))
def test_every_study_that_the_command_line_knows_is_there(name):
    study = importlib.import_module(f"lucidetr.studies.{name.replace('-', '_')}")
    assert callable(study.study)
    assert isinstance(study.USUAL, Plan)
