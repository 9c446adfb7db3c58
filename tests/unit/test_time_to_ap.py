"""The benchmark of AP against time: its bookkeeping, its peers' start, and a run of seconds."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lucidetr.errors import InputError
from lucidetr.recipes import recipe
from run_tools import TINY

ROOT = Path(__file__).parents[2]
TWO_CURVES = {"lucid-xs": [0.2, 0.4, 0.5, 0.6, 0.7], "transformers-detr": [0.0, 0.0, 0.1, 0.1, 0.2]}


@pytest.fixture
def bench(monkeypatch):
    """The module; benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.time_to_ap

    return benchmarks.time_to_ap


@pytest.fixture
def curves(monkeypatch):
    """The module of the curves."""
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.ap_curves

    return benchmarks.ap_curves


@pytest.fixture
def peers(monkeypatch):
    """The module of the peers."""
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.peers

    return benchmarks.peers


def line(contender, aps, seed=0, lr=1e-3):
    points = [(60.0 * k, ap, ap + 0.1) for k, ap in enumerate(aps, start=1)]
    settings = {"contender": contender, "minutes": 5.0, "lr": lr, "batch": 8, "seed": seed, "role": "run"}
    settings |= {"data": "generated:digits", "side": 128, "threads": 1, "evaluations": 5}
    rest = {"AP": aps[-1], "images_per_second": 30.0, "parameters": 4e6, "machine": "two", "other_split": None}
    return {"settings": settings, "points": points} | rest


def test_a_table_says_when_ours_reached_the_peer(curves):
    both = curves.average([line(name, aps) for name, aps in TWO_CURVES.items()])
    text = curves.table(both)
    assert "| lucid-xs | 4.0 M | 30 | – | 0.200 | 0.400 | 0.500 | 0.600 | 0.700 | 0.800 | – |" in text
    assert "lucid-xs reached transformers-detr's AP at the end, 0.200, after 60 s, 5.0× sooner." in text
    assert "did not reach" in curves.sooner(both[1], both[0])


def test_a_contender_has_its_colour_in_every_chart(curves):
    lines = [line(name, [0.1, 0.2]) for name in ("transformers-detr", "lucid-m", "lucid-xs", "lucid-xs")]
    lines[3]["settings"]["minutes"] = 1.0
    for some in (lines, lines[::-1], lines[2:]):
        looks = dict(
            zip([each["settings"]["contender"] for each in some], curves.looks(curves.average(some)), strict=True)
        )
        assert {name: colour for name, (colour, _) in looks.items()}.items() <= {
            "transformers-detr": "tab:gray",
            "lucid-m": "tab:purple",
            "lucid-xs": "tab:blue",
        }.items()
    assert {marker for _, marker in curves.looks(curves.average(lines))[2:]} == {"o", "s"}


def test_seeds_are_averaged_and_the_better_rate_is_shown(curves):
    lines = [line("detr-xs", [0.1, 0.2], seed=0), line("detr-xs", [0.3, 0.4], seed=1), line("detr-xs", [0.1], lr=1e-4)]
    (curve,) = curves.average(lines)
    assert [ap for _, ap, _ in curve.points] == pytest.approx([0.2, 0.3])
    assert curves.spread([each["AP"] for each in curve.lines]) == "0.300 ± 0.141"


def test_what_is_another_experiment_is_another_curve(curves):
    lines = [line("transformers-detr", [0.1 * number], seed=number) for number in range(1, 6)]
    changes = ({}, {"augmentation": "detr-xs"}, {"split": "test"}, {"precision": "bf16"}, {"channels_last": True})
    base = {"augmentation": "lucid-xs", "split": "", "precision": "fp32", "channels_last": False}
    for each, change in zip(lines, changes, strict=True):
        each["settings"] |= base | change
    found = curves.average(lines)
    assert [curve.lines for curve in found] == [[each] for each in lines]
    assert found[2].name == "transformers-detr, augmentation lucid-xs, split test, fp32, channels last: False"
    assert [curve.name for curve in curves.average(lines[:3:2])] == [
        "transformers-detr, split none",
        "transformers-detr, split test",
    ]


def test_of_equal_settings_the_newest_run_counts(curves):
    lines = [line("detr-xs", [0.1]), line("detr-xs", [0.3], seed=1), line("detr-xs", [0.5])]
    (curve,) = curves.average(lines)
    assert [ap for _, ap, _ in curve.points] == pytest.approx([0.4])


def test_of_a_recipe_that_changed_only_its_last_state_counts(curves):
    was, now = line("detr-xs", [0.9]), [line("detr-xs", [ap], seed=seed) for seed, ap in enumerate((0.3, 0.5))]
    for each in now:
        each["settings"]["config"] = "of today"
    (curve,) = curves.average([was, *now])
    assert [ap for _, ap, _ in curve.points] == pytest.approx([0.4])


def test_curves_are_drawn(curves, tmp_path):
    curves.draw(curves.average([line(name, aps) for name, aps in TWO_CURVES.items()]), tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_runs_that_are_named_are_drawn_alone(bench, tmp_path, monkeypatch):
    out, drawn = tmp_path / "lines.jsonl", []
    monkeypatch.setattr(bench, "draw", lambda curves, file: drawn.extend(curves))
    lines = [line("lucid-xs", [0.1], seed=seed) for seed in (0, 1)] + [line("detr-xs", [0.2])]
    lines[1]["settings"]["minutes"], lines[2]["settings"]["split"] = 10.0, "test"
    for each in lines:
        each["settings"]["clock"] = "wall"
    out.write_text("\n".join(map(json.dumps, lines)))
    whole = ["--out", str(out), "--draw", str(tmp_path / "curves.svg")]
    for more, expected in (
        ([], lines),
        (["--contenders", "detr-xs"], lines[2:]),
        (["--seeds", "1"], lines[1:2]),
        (["--minutes", "10"], lines[1:2]),
        (["--split", "test"], lines[2:]),
    ):
        drawn.clear()
        bench.main([*whole, *more])
        assert [each["settings"] for curve in drawn for each in curve.lines] == [each["settings"] for each in expected]
    with pytest.raises(InputError, match=r"no run with .* that --contenders, --seeds, --minutes and --split name"):
        bench.main([*whole, "--seeds", "7"])


def test_what_cannot_be_run_is_refused(bench, tmp_path):
    with pytest.raises(InputError, match="unknown contender transformers-det: did you mean transformers-detr"):
        bench.main(["--contenders", "transformers-det"])
    with pytest.raises(InputError, match="--side 100: choose a multiple of 32"):
        bench.main(["--side", "100"])
    with pytest.raises(InputError, match="no run with"):
        bench.main(["--out", str(tmp_path / "none.jsonl"), "--draw", str(tmp_path / "curves.svg")])


@pytest.mark.parametrize("name", ["transformers-detr", "transformers-rtdetrv2", "transformers-dfine"])
def test_all_of_a_peer_learns(peers, name):
    torch.manual_seed(0)
    peer = peers.build(name, 10).train()
    norms = [module for module in peer.modules() if "BatchNorm" in type(module).__name__]
    assert all(isinstance(norm, nn.BatchNorm2d) and bool((norm.weight == 1).all()) for norm in norms)
    objects = {"class_labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) / 4 + 0.3}
    none = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = peer(pixel_values=torch.randn(2, 3, 64, 64), labels=[objects, none]).loss
    assert loss.dtype == torch.float32
    loss.backward()
    idle = {name for name, parameter in peer.named_parameters() if parameter.grad is None}
    assert idle <= {"model.decoder.up", "model.decoder.reg_scale"}  # D-FINE's constants


def run_of_seconds(out, **changes):
    options = {"data": TINY, "side": 64, "minutes": 0.01, "trial_minutes": 0.002, "evaluations": 2, "out": out}
    options |= {"contenders": "transformers-detr", "rates": "1e-4,1e-3", "batches": "2", "augmentation": "detr-xs"}
    return [f"--{name.replace('_', '-')}={value}" for name, value in (options | changes).items()]


def lines_of(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_peer_is_tried_and_trained_once(bench, tmp_path, monkeypatch, capsys):
    arguments = run_of_seconds(tmp_path / "results.jsonl", precision="fp32", split="val")
    bench.main(arguments)
    *trials, run = lines_of(tmp_path / "results.jsonl")
    assert [trial["settings"]["lr"] for trial in trials] == [1e-4, 1e-3]
    assert run["settings"]["lr"] in (1e-4, 1e-3)
    assert run["points"][-1][1] == run["AP"] == run["other_split"]["AP"]
    assert run["points"][-1][0] >= 0.6
    again, train_peer = [], bench.train_peer
    monkeypatch.setattr(bench, "train_peer", lambda *_: pytest.fail("trained twice"))
    capsys.readouterr()
    bench.main(arguments)
    assert capsys.readouterr().out.count("known: transformers-detr: ") == 3
    assert len(lines_of(tmp_path / "results.jsonl")) == 3
    monkeypatch.setattr(bench, "train_peer", lambda *given: again.append(given) or train_peer(*given))
    bench.main(run_of_seconds(tmp_path / "results.jsonl", precision="bf16", split="val", rates="1e-3"))
    assert [way for _, _, way, _ in again] == [bench.Way("bf16", channels_last=True)]
    again.clear()
    dropping = {"precision": "fp32", "split": "val", "rates": "1e-3", "bad_boxes": "drop"}
    bench.main(run_of_seconds(tmp_path / "results.jsonl", **dropping))
    assert len(again) == 1
    assert lines_of(tmp_path / "results.jsonl")[-1]["settings"]["bad_boxes"] == "drop"
    again.clear()
    monkeypatch.setattr(bench, "processor", lambda: "another machine")
    bench.main(run_of_seconds(tmp_path / "results.jsonl", precision="fp32", split="val", rates="1e-3"))
    assert len(again) == 1


@pytest.mark.slow
def test_our_own_run_and_the_fastest_way_of_a_peer(bench, tmp_path):
    contenders = "detr-xs,transformers-rtdetrv2"
    bench.main(run_of_seconds(tmp_path / "results.jsonl", contenders=contenders, split="val", rates="1e-3"))
    ours, speed, theirs = lines_of(tmp_path / "results.jsonl")
    assert ours["settings"]["lr"] == recipe("detr-xs").optimiser.lr
    assert ours["points"][-1][1] == pytest.approx(ours["other_split"]["AP"])
    best = max(speed["ways"], key=lambda way: way["images_per_second"])
    assert {name: theirs["settings"][name] for name in ("precision", "channels_last")}.items() <= best.items()


def test_all_contenders_share_their_images(bench):
    options = bench.Options(side=64, augmentation="detr-xs")
    ours, peer = (
        bench.Bench(options, bench.Journal(Path("none"))).config(name, seed=1, batch=4, lr=1e-3)
        for name in ("detr-xs", "transformers-detr")
    )
    assert (ours.images, ours.augmentation, ours.seed) == (peer.images, peer.augmentation, peer.seed)
    assert (ours.images.resize, ours.images.size) == ("square", 64)
    assert ours.model == recipe("detr-xs").model
    assert (ours.batch, peer.batch, peer.optimiser.lr) == (16, 4, 1e-3)


@pytest.mark.parametrize("name", ["transformers-detr", "transformers-rtdetrv2", "transformers-dfine"])
def test_a_gpu_fuses_a_peers_attention(peers, name):
    peer = peers.Way("bf16", channels_last=True).prepare(peers.build(name, 10), torch.device("meta"))
    assert peer.config._attn_implementation == "sdpa"
    assert {parameter.device.type for parameter in peer.parameters()} == {"meta"}


def test_all_contenders_get_the_queries_and_turns_that_are_asked_for(bench, peers):
    plain, asked = (
        bench.Bench(options, bench.Journal(Path("none")))
        for options in (bench.Options(), bench.Options(turns=True, queries=60))
    )
    names = ("lucid-xs", "transformers-rtdetrv2")
    assert [plain.config(name, 0, 8, 1e-3).model.num_queries for name in names] == [25, 30]
    for config in (asked.config(name, 0, 8, 1e-3) for name in names):
        assert config.model.num_queries == 60
        assert (config.augmentation.flip, config.augmentation.flip_vertical, config.augmentation.turn) == (0.5,) * 3
    assert peers.build(names[1], 10, 60).config.num_queries == 60
    assert plain.settings(names[0], 16).keys() == asked.settings(names[0], 16).keys() - {"turns", "queries"}


def test_a_peer_steps_by_muon_only_where_its_name_says_so(bench):
    one = bench.Bench(bench.Options(), bench.Journal(Path("none")))
    names = ("transformers-detr", "transformers-detr+muon")
    published, other = (one.config(name, seed=0, batch=8, lr=1e-3).optimiser for name in names)
    assert (published.matrices, other.matrices) == ("adamw", "muon")
    assert names[1] not in bench.CONTENDERS


def test_runs_with_other_queries_turns_or_readers_do_not_count(bench, tmp_path):
    journal = bench.Journal(tmp_path / "lines.jsonl")
    usual, turned = line("lucid-xs", [0.1]), line("lucid-xs", [0.2])
    turned["settings"] |= {"turns": True, "queries": 60}
    journal.lines = [usual, turned]
    assert journal.lines_with({"contender": "lucid-xs"}) == [usual]
    assert journal.lines_with({"contender": "lucid-xs"} | bench.Options(turns=True, queries=60).asked) == [turned]
    assert journal.lines_with({"contender": "lucid-xs"} | bench.Options(turns=True).asked) == []


def test_runs_with_other_evaluations_are_not_averaged(curves):
    few, many = line("lucid-xs", [0.1, 0.3]), line("lucid-xs", [0.1, 0.2, 0.3, 0.4], seed=1)
    many["settings"]["evaluations"] = 10
    (curve,) = curves.average([few, many])
    assert curve.lines == [many]


def test_runs_of_other_hardware_do_not_count(bench, curves, tmp_path, monkeypatch):
    journal = bench.Journal(tmp_path / "lines.jsonl")
    slow, fast = line("lucid-xs", [0.1]), line("lucid-xs", [0.2])
    fast["settings"]["device"] = "cpu, bf16"
    journal.lines = [slow, fast]
    for precision, expected in (("fp32", slow), ("bf16", fast)):
        monkeypatch.setattr(bench, "choose_precision", lambda name, device, here=precision: here)
        place = bench.Options().place
        assert journal.lines_with({"contender": "lucid-xs"} | place) == [expected]
        assert curves.machine(curves.average([expected])) == ", ".join(["two", *place.values()])
    assert bench.Options(device="NVIDIA H200", draw="a.svg").place == {"device": "NVIDIA H200"}
