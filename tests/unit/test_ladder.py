"""The ladder from one family to the other, and the study that measures it."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from matplotlib.figure import Figure

from lucidetr.fields import difference, from_dict, to_dict
from lucidetr.models.size import measure
from lucidetr.recipes import BESIDES, DETR_XS, LADDER, LUCID_XS, beyond, climb, without
from lucidetr.studies import experiment, ladder
from lucidetr.studies.experiment import Plan, Result, fingerprint, read_results
from lucidetr.studies.ladder import contenders, ladder_page
from lucidetr.training.precision import choose_device, choose_precision
from run_tools import tiny


def test_each_rung_differs_from_the_one_below_in_its_own_fields_alone():
    rungs = list(climb())
    assert [rung for rung, _ in rungs] == list(LADDER)
    below = DETR_XS
    for rung, config in rungs:
        assert set(difference(config, below)) == set(rung.changes), rung.name
        assert rung.says.strip()
        below = config
    assert rungs[0][1] == DETR_XS


def test_the_last_rung_is_lucid_xs_but_for_its_name():
    *_, (_, last) = climb()
    assert difference(last, LUCID_XS) == {"recipe": (DETR_XS.recipe, LUCID_XS.recipe)}


def test_rungs_have_names_of_their_own_and_carry_only_later_ones():
    names = [rung.name for rung in LADDER]
    assert len(set(names)) == len(names)
    for place, rung in enumerate(LADDER):
        assert set(rung.carries) <= set(names[place + 1 :]), rung.name


@pytest.mark.parametrize("rung", LADDER[1:], ids=lambda r: r.name)
def test_without_a_rung_only_its_fields_and_those_it_carries_are_as_they_were(rung):
    config = without(rung)
    assert config.recipe == f"{LUCID_XS.recipe} without {rung.name}"
    taken = {field for r in LADDER if r.name in (rung.name, *rung.carries) for field in r.changes}
    changed = difference(config, LUCID_XS)
    assert set(changed) - {"recipe"} <= taken
    assert set(changed) & set(rung.changes), "it makes no difference"
    before = next(c for r, c in zip(LADDER, below(), strict=True) if r.name == rung.name)
    for field in rung.changes:
        assert value(config, field) == value(before, field), field
    assert from_dict(type(config), to_dict(config)) == config  # it is one that can be


def below():
    """Return the config under each rung."""
    return [DETR_XS, *(config for _, config in climb())][:-1]


def value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_every_rung_and_every_absence_is_measured():
    kinds = [(kind, name) for kind, name, _ in contenders()]
    rungs = [rung.name for rung in LADDER]
    more = [("with", rung.name) for rung in BESIDES]
    assert kinds == [("rung", name) for name in rungs] + [("without", name) for name in rungs[1:]] + more


@pytest.mark.parametrize("rung", BESIDES, ids=lambda r: r.name)
def test_what_is_off_differs_from_lucid_xs_in_its_own_fields_alone(rung):
    assert set(difference(beyond(rung), LUCID_XS)) == {"recipe", *rung.changes}
    assert rung.name not in {each.name for each in LADDER}


SECOND = 1 / 60


@pytest.fixture
def two(monkeypatch, tmp_path):
    """Let the study have two contenders that learn in no time."""
    quick = replace(tiny(""), steps=0)
    slow = replace(quick, optimiser=replace(quick.optimiser, lr=1e-6))
    monkeypatch.setattr(ladder, "contenders", lambda: iter([("rung", "detr-xs", quick), ("without", "rate", slow)]))
    return tmp_path / "study" / "ladder.jsonl", quick.data


def test_a_study_writes_a_line_for_each_run_and_does_nothing_twice(two, monkeypatch, capsys):
    file, data = two
    ladder.study(file.parent, Plan(SECOND, seeds=1, data=data))
    results = read_results(file)
    assert [(r.kind, r.name, r.seed) for r in results] == [("rung", "detr-xs", 0), ("without", "rate", 0)]
    for result in results:
        assert result.steps > 0
        assert result.images_per_second > 0
        assert 0 <= result.ap <= result.ap50 <= 1
        assert (result.minutes, result.data) == (SECOND, data)
    assert "without rate, seed 0: AP" in capsys.readouterr().out
    before = file.read_bytes()
    monkeypatch.setattr(experiment, "train", None)  # whoever trains now fails
    ladder.study(file.parent, Plan(SECOND, seeds=1, data=data))
    assert file.read_bytes() == before
    assert {path.name for path in file.parent.iterdir()} == {"ladder.jsonl", "ladder.md", "ladder.png"}


@pytest.fixture
def counted(two, monkeypatch):
    """Let runs take no time at all, and say which were asked for."""
    asked = []

    def run_one(kind, name, config):
        asked.append((kind, name, config.seed))
        lengths = {"minutes": config.minutes, "data": config.data, "side": config.images.size, "clock": config.clock}
        here = {"threads": torch.get_num_threads(), "precision": choose_precision("auto", choose_device("auto"))}
        return result(kind=kind, name=name, seed=config.seed, **lengths, **here, config=fingerprint(config))

    monkeypatch.setattr(ladder, "run_one", run_one)
    return *two, asked


TRAINED = {(kind, name): fingerprint(config) for kind, name, config in contenders()}


def result(**values):
    base = {"kind": "rung", "name": "detr-xs", "seed": 0, "minutes": SECOND, "threads": 1, "data": "x", "ap": 0.25}
    base |= {"ap50": 0.5, "steps": 10, "images_per_second": 20.0, "precision": "fp32", "commit": "", "machine": "m"}
    whole = base | values
    return Result(**({"config": TRAINED[whole["kind"], whole["name"]]} | whole))


@pytest.mark.slow
def test_two_parts_share_the_work_without_doing_any_twice(counted):
    file, data, asked = counted
    ladder.study(file.parent, Plan(SECOND, seeds=3, part=(1, 2), data=data))
    first, asked[:] = list(asked), []
    ladder.study(file.parent, Plan(SECOND, seeds=3, part=(2, 2), data=data))
    assert first
    assert asked
    assert set(first).isdisjoint(asked)
    everything = {(kind, name, seed) for kind, name, _ in ladder.contenders() for seed in range(3)}
    assert {*first, *asked} == everything
    assert len(first) + len(asked) == len(everything)
    asked.clear()
    ladder.study(file.parent, Plan(SECOND, seeds=4, data=data))  # one seed more: only that is new
    assert {seed for _, _, seed in asked} == {3}


@pytest.mark.slow
def test_runs_of_another_length_or_data_do_not_count(counted):
    file, data, asked = counted
    ladder.study(file.parent, Plan(SECOND, seeds=1, data=data))
    for minutes, other in ((2 * SECOND, data), (SECOND, data + "&seed=1")):
        asked.clear()
        ladder.study(file.parent, Plan(minutes, seeds=1, data=other))
        assert len(asked) == 2


def test_the_page_shows_mean_and_deviation_over_the_seeds(tmp_path, monkeypatch):
    file = tmp_path / "ladder.jsonl"
    first, second = LADDER[0].name, LADDER[1].name
    monkeypatch.setattr(ladder, "climb", lambda: list(climb())[:2])
    runs = [result(name=first, seed=seed, ap=ap) for seed, ap in enumerate((0.1, 0.2, 0.3))]
    runs += [result(name=second, ap=0.4, images_per_second=33.4), result(kind="without", name=second, ap=0.6)]
    runs += [result(kind="with", name=BESIDES[0].name, ap=0.7)]
    file.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    up, note, gone, gone_note, more, more_note = ladder_page(file).split("\n\n")
    assert ", 1 or 3 seed(s), " in note
    assert note.replace("1 or 3", "1") == gone_note == more_note
    head, _, *rows = up.splitlines()
    assert head.count("|") == rows[0].count("|") == rows[1].count("|")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [first, second]
    assert cells[0][-2:] == ["20", "0.200 ± 0.100"]
    assert cells[1][-2:] == ["33", "0.400"]
    without_each, with_each = ([line.split("|")[1].strip() for line in t.splitlines()[2:]] for t in (gone, more))
    assert without_each == ["–", *(rung.name for rung in LADDER[1:])]
    assert with_each == ["–", *(rung.name for rung in BESIDES)]
    assert gone.splitlines()[3].endswith("| 20 | 0.600 |")
    assert more.splitlines()[3].endswith("| 20 | 0.700 |")
    assert more.splitlines()[4].endswith("| – | – |")


def test_a_table_compares_runs_of_one_precision_and_length(tmp_path, monkeypatch):
    file, last = tmp_path / "ladder.jsonl", LADDER[-1].name
    monkeypatch.setattr(ladder, "climb", lambda: list(climb())[-2:])
    before = LADDER[-2].name
    runs = [result(name=last, ap=0.5), result(name=before, ap=0.45), result(kind="without", name=last, ap=0.4)]
    runs += [result(name=last, ap=0.6, precision="bf16"), result(kind="with", name="groups", ap=0.7, precision="bf16")]
    runs += [result(kind="without", name=last, ap=0.3, minutes=3.0, seed=seed) for seed in (0, 1)]
    file.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    up, its_note, gone, gone_note, more, note = ladder_page(file).split("\n\n")
    assert [row.rsplit("|", 2)[1].strip() for row in up.splitlines()[2:]] == ["0.450", "0.500"]
    assert "fp32" in its_note
    assert [row.rsplit("|", 2)[1].strip() for row in gone.splitlines()[2:] if "0." in row.rsplit("|", 2)[1]] == [
        "0.300 ± 0.000"
    ]
    assert gone_note.startswith("3 minutes")
    assert "| 0.600 |\n" in more
    assert "| 0.700 |" in more
    assert "bf16" in note


def test_operations_are_those_of_the_side_that_was_trained_at(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "climb", lambda: list(climb())[:1])
    monkeypatch.setattr(ladder, "LADDER", LADDER[:2])
    monkeypatch.setattr(ladder, "BESIDES", BESIDES[:1])
    file, name = tmp_path / "ladder.jsonl", LADDER[1].name
    sides = {"rung": 96, "without": 320}
    runs = [result(side=96), result(kind="without", name=name, side=320, ap=0.75)]
    file.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs))
    up, _, gone, _, more, _ = ladder_page(file).split("\n\n")
    shown = {"rung": up.splitlines()[2], "without": gone.splitlines()[2]}
    for kind, config in {"rung": DETR_XS, "without": LUCID_XS}.items():
        gflops = measure(ladder.squares(config, sides[kind])).gflops
        assert shown[kind].split("|")[4].strip() == f"{gflops:.2f}"
    assert more.splitlines()[2].split("|")[4].strip() == f"{measure(ladder.squares(LUCID_XS, 96)).gflops:.2f}"
    assert "0.750" in gone  # a side above what the recipe allows makes no other contender of it


def test_runs_of_other_threads_are_not_averaged_where_minutes_are_the_budget():
    both = [result(), result(seed=1, threads=2), result(seed=2)]
    assert [r.seed for r in ladder.alike(both, "rung")] == [0, 2]
    assert len(ladder.alike([replace(r, minutes=0.0) for r in both], "rung")) == 3


def test_runs_of_what_a_rung_once_was_do_not_count(counted, tmp_path):
    file, data, asked = counted
    name = LADDER[1].name
    before = [result(kind="without", name=name, ap=0.6, data=data, config="of another"), result(data=data, config="")]
    file.parent.mkdir()
    file.write_text("".join(json.dumps(asdict(run)) + "\n" for run in before))
    ladder.study(file.parent, Plan(SECOND, seeds=1, data=data))
    assert asked == [("rung", "detr-xs", 0), ("without", name, 0)]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(asdict(run)) + "\n" for run in before))
    assert "0.600" not in ladder_page(other)


def test_a_fingerprint_is_of_what_decides_what_is_learned_alone():
    known = fingerprint(LUCID_XS)
    same = {"seed": 3, "data": "x", "minutes": 7.0, "out": "y", "device": "cuda", "micro_batch": 4, "workers": 2}
    assert fingerprint(replace(LUCID_XS, **same, images=replace(LUCID_XS.images, size=96))) == known
    others = [beyond(rung) for rung in BESIDES] + [without(rung) for rung in LADDER[1:]]
    assert len({known, *map(fingerprint, others)}) == 1 + len(others)


def test_the_answer_orders_what_each_change_takes_or_brings_and_says_what_the_seeds_tell():
    last = LADDER[-1].name
    runs = [result(name="selected", ap=0.3), result(name="detr-xs", ap=0.001)]
    runs += [result(name=last, seed=seed, ap=0.6) for seed in (0, 1)]
    for name, all_aps in {"rate": (0.5, 0.52), "tail": (0.7, 0.5), "sigmoid": (0.1, 0.1)}.items():
        runs += [result(kind="without", name=name, seed=seed, ap=ap) for seed, ap in enumerate(all_aps)]
    runs += [result(kind="with", name="bell", ap=0.65)]
    climbed, without_each, apart, with_each, few = ladder.sentences(runs)
    assert climbed == "Going up, the first rung with an AP above 0.01 is selected; lucid-xs has 0.600 ± 0.000."
    assert without_each == "lucid-xs without each, in points of AP: sigmoid -50.0, rate -9.0, tail +0.0."
    assert apart == "Told apart from lucid-xs: sigmoid, rate."
    assert with_each == "lucid-xs with each, in points of AP: bell +5.0."
    assert few == "One seed, which tells nothing of a few points."


def test_the_figure_has_a_bar_for_every_run_and_a_line_for_lucid_xs():
    last = LADDER[-1].name
    runs = [result(name=last, ap=0.6), result(kind="without", name="rate", ap=0.5), result(kind="with", name="bell")]
    figure = Figure()
    ladder.draw_ladder(figure, runs)
    for axes, width, rows in zip(figure.axes, (0.6, 0.5, 0.25), (LADDER, LADDER[1:], BESIDES), strict=True):
        (bar,) = axes.patches
        assert bar.get_width() == width
        assert [each.get_text() for each in axes.get_yticklabels()] == [rung.name for rung in rows]
        assert axes.lines[-1].get_xdata()[0] == 0.6


def test_a_page_without_a_measurement_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "climb", lambda: list(climb())[:1])
    page = ladder_page(tmp_path / "nothing.jsonl")
    assert "| – | – |" in page
    assert page.endswith("Nothing measured yet: lucidetr study ladder --out DIR")
