"""Every benchmark of speed runs, on models and data too small to say anything, and writes a line that makes a table."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jaxtyping
import pytest
import torch

from lucidetr.categories import Categories
from lucidetr.errors import InputError
from lucidetr.recipes import recipe
from lucidetr.structures import Detections

ROOT = Path(__file__).parents[2]
CATEGORIES = Categories(ids=(1, 2, 3, 4, 5), names=tuple("abcde"))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A function that runs a benchmark and returns the lines it wrote; benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(ROOT)
    measure = import_module("benchmarks.measure")
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results.jsonl")

    def run(name, *options):
        import_module(f"benchmarks.{name}").main(options)
        return [json.loads(text) for text in measure.RESULTS.read_text().splitlines()]

    return run


def table(lines, name):
    return import_module("benchmarks.table").TABLES[name](lines)


QUICK = ("--quick", "--runs", "1", "--device", "cpu")  # a GPU convolves in TF32, too coarse to compare


def test_inference(bench, capsys):
    contenders = "lucidetr bf16,transformers fp32,transformers bf16"
    options = ("--sides", "64x64", "64x85", "--batches", "2", "--contenders", contenders)
    lines = bench("inference", *QUICK, *options)
    assert [line["settings"]["side"] for line in lines] == ["64x64", "64x85"]
    for line in lines:
        assert list(line["seconds"]) == ["lucidetr fp32", *contenders.split(",")]
        assert max(line["differences"]["transformers fp32"]) < 1e-4
        assert 1e-4 < max(line["differences"]["transformers bf16"]) < 0.5
    assert "| transformers fp32 |" in table(lines, "inference")


def test_inference_refuses_an_unknown_contender(bench):
    with pytest.raises(InputError, match="unknown contender transformers fp3: did you mean transformers fp32"):
        bench("inference", "--contenders", "transformers fp3")


def test_both_sides_lie_channels_last(bench, monkeypatch):
    inference, pair = import_module("benchmarks.inference"), import_module("benchmarks.pair")
    config = pair.tiny(recipe("detr-r50"))
    model, card = pair.untrained(config).eval(), pair.card_of(config, inference.images_of("64x64"))
    seen = {}

    def watched(model, card):
        peer, processor = pair.as_transformers(model, card)
        peer.register_forward_pre_hook(lambda peer, given, named: seen.update({name: (peer, named)}), with_kwargs=True)
        return peer, processor

    monkeypatch.setattr(inference, "as_transformers", watched)
    eager = {name: way for name, way in inference.THEIRS.items() if not way.compiled}
    assert len(eager) == 3
    for name, way in eager.items():
        inference.theirs(way, model, card, torch.device("cpu"))(inference.random_pictures(2))
        peer, named = seen[name]
        kernels = [p for p in peer.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (*kernels, named["pixel_values"]))


def test_exported_files_stay_on_the_cpu(bench, capsys):
    choose = import_module("benchmarks.inference").choose
    assert "lucidetr onnx fp32" in choose("all", torch.device("cpu"))
    there = choose("lucidetr onnx fp32,transformers fp32", torch.device("cuda"))
    assert there == ["lucidetr fp32", "transformers fp32"]
    assert "are run on the CPU, not on cuda: lucidetr onnx fp32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("inference", ["--sides", "abc"], "--sides abc: give height x width"),
        ("inference", ["--sides", "640"], "--sides 640: give height x width"),
        ("inference", ["--batches", "0"], "--batches 0: choose numbers above 0"),
        ("training", ["--runs", "0"], "--runs 0: choose a number above 0"),
        ("parts", ["--threads", "-1"], "--threads -1: choose 0"),
        ("training", ["--precisions", "bf61", "--losses", "0"], "unknown precision bf61: did you mean bf16"),
        ("peaks", ["--precisions", "fp16"], "unknown precision fp16: did you mean"),
        ("busy", ["--recipes", "lucid-xs:abc"], "--recipes lucid-xs:abc: behind the colon stands a batch"),
        ("busy", ["--steps", "3"], "--steps 3: choose at least 0 and 4"),
        ("table", ["a.md", "b.md"], "a.md b.md: give one page"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, name, options, said):
    quick = () if name == "table" else ("--quick", "--device", "cpu")
    with pytest.raises(InputError, match=said):
        bench(name, *quick, *options)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("busy", "--runs"),
        ("service", "--runs"),
        ("exports", "--runs"),
        ("exports", "--device"),
        ("large_data", "--device"),
        ("large_data", "--threads"),
        ("growth", "--precision"),
    ],
)
def test_what_would_be_passed_over_is_no_option(bench, name, option, capsys):
    with pytest.raises(SystemExit):
        bench(name, option, "fp64" if option == "--precision" else "1")
    assert option in capsys.readouterr().err


def test_precisions_are_words_between_commas(bench):
    measurable = import_module("benchmarks.measure").measurable
    assert measurable("bf16", torch.device("cpu")) == ["bf16"]
    assert measurable("fp32, bf16", torch.device("cpu")) in (["fp32"], ["fp32", "bf16"])


def test_a_service_is_noted_where_it_runs(bench, monkeypatch):
    service, noted = import_module("benchmarks.service"), {}
    monkeypatch.setattr(service, "under_load", lambda run, picture, options: {})
    monkeypatch.setattr(service, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(service, "note", lambda name, settings, measured, device: noted.update({name: device}))
    service.main([])
    assert noted == {"service": torch.device("meta")}


def test_a_service_computes_with_the_threads_that_are_asked_for(bench, monkeypatch, tmp_path):
    service, given = import_module("benchmarks.service"), {}

    def started(command, env, **rest):
        given.update(env)
        raise InterruptedError

    monkeypatch.setattr(service.subprocess, "Popen", started)
    for threads, expected in ((3, "3"), (0, "7")):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        with pytest.raises(InterruptedError):
            service.under_load(tmp_path, tmp_path, service.Options(threads=threads))
        assert given["OMP_NUM_THREADS"] == expected


def test_what_is_found_is_compared_box_by_box(bench):
    inference = import_module("benchmarks.inference")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 5.0, 5.0]])
    scores, labels = torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 2, 3])
    mine = Detections(boxes, scores, labels, CATEGORIES)
    shifted = Detections(
        boxes.flip(0) + torch.tensor([0.0, 0.0, 0.0, 1.0]), scores.flip(0) - 0.05, labels.flip(0), CATEGORIES
    )
    overlap, score = inference.difference(mine, shifted)
    assert overlap == pytest.approx(1 / 11)
    assert score == pytest.approx(0.05)
    other_labels = Detections(boxes, scores, labels + 1, CATEGORIES)
    assert inference.difference(mine, other_labels) == (1.0, 1.0)


def test_training_steps_lose_the_same(bench):
    (line,) = bench("training", *QUICK, "--side", "64", "--losses", "3", "--precisions", "fp32")
    assert line["largest_difference"] < 1e-4
    assert line["losses"][-1][0] < line["losses"][0][0]
    assert line["settings"]["learning"] > 0
    assert "| fp32, 64, batch 2 |" in table([line], "training")


def test_losses_are_compared_in_the_precision_of_the_steps(bench):
    options = ("--side", "64", "--losses", "2", "--precisions", "bf16")
    (line,) = bench("training", *QUICK, *options)
    assert line["losses_in"] == "bf16"
    assert 0 < line["largest_difference"] < 0.1
    assert f"| {line['largest_difference']:.1e} |" in table([line], "training")
    del line["losses_in"]  # as lines once were: with losses of float32
    assert table([line], "training").endswith("| – |")


def test_a_step_without_the_fast_ways(bench):
    (line,) = bench("plain", *QUICK, "--recipes", "lucid-xs", "--precision", "bf16")
    assert line["seconds"].keys() == {"fast", "plain"}
    assert line["settings"]["precision"] == "bf16"
    assert "| lucid-xs, bf16, 64, batch 16 |" in table([line], "plain")


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_plain_step_is_the_same_step(bench, monkeypatch, matrices):
    """Both ways lead to the same weights in float32: what is timed is one thing, and only one of them is fused."""
    steps, pair = import_module("benchmarks.steps"), import_module("benchmarks.pair")
    config = steps.square("lucid-xs", 64, quick=True)
    config = replace(config, optimiser=replace(config.optimiser, matrices=matrices, ema=0.0))
    batch = pair.random_batch(2, 64, 3, config.model.num_classes, torch.device("cpu"))
    models, optimisers, build = [], [], steps.build_optimiser
    monkeypatch.setattr(steps, "untrained", lambda config: models.append(pair.untrained(config)) or models[-1])
    monkeypatch.setattr(steps, "build_optimiser", lambda *given: optimisers.append(build(*given)) or optimisers[-1])
    for plain in (False, True):
        step = steps.training(config, batch, "fp32", plain=plain)
        step()
        step()
    assert [group["fused"] for group in optimisers[0].param_groups] == [True] * len(optimisers[0].param_groups)
    assert not any(group["fused"] or group["foreach"] for group in optimisers[1].param_groups)
    kernels = [next(p for p in model.backbone.stages.parameters() if p.dim() == 4) for model in models]
    assert [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels] == [True, False]
    fast, plain = (model.state_dict() for model in models)
    for name in fast:
        torch.testing.assert_close(plain[name], fast[name], rtol=0, atol=1e-5, msg=name)
    start = pair.untrained(config).state_dict()
    assert any(not torch.equal(start[name], fast[name]) for name in fast)


def test_peaks(bench):
    options = ("--matrix", "128", "--precisions", "fp32", "--recipes", "lucid-xs")
    (line,) = bench("peaks", *QUICK, *options)
    inference, training = (line["recipes"]["lucid-xs"][kind] for kind in ("inference", "training"))
    assert line["peaks"].keys() == {"matrix", "convolution"}
    assert training["gflops"] > 2 * training["batch"] * inference["gflops"] > 0
    assert 0 < inference["share"] < 1
    assert "| lucid-xs, training |" in table([line], "peaks")


def test_parts_add_up_to_a_step(bench):
    lines = bench("parts", *QUICK)
    assert [line["settings"]["case"] for line in lines] == ["detr-r50", "detr-r50, crowded", "lucid-xs"]
    for line in lines:
        alone = line["training"]["… the matching alone"]
        assert sum(line["training"].values()) - alone == pytest.approx(line["step"], rel=0.2)
        assert {"backbone, stage 2", "decoder", "backward", "matching and losses"} <= line["training"].keys()
        assert {"backbone, stem", "heads"} <= line["inference"].keys()
    assert lines[0]["training"]["reading and decoding"] > 0 == lines[2]["training"]["reading and decoding"]
    assert "| **a step** |" in table(lines, "parts")


def test_a_stopwatch_counts_what_runs_inside_for_itself(bench, monkeypatch):
    steps = import_module("benchmarks.steps")
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    watch = steps.Stopwatch()
    with watch.part("outer"), watch.part("inner"):
        pass
    assert watch.take() == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_how_busy_a_device_is(bench):
    options = ("--recipes", "lucid-xs:4,detr-r50", "--workers", "0", "--warmup", "1", "--steps", "4")
    lines = bench("busy", "--quick", "--device", "cpu", *options)
    assert [line["settings"]["batch"] for line in lines] == [4, 16]
    for line in lines:
        assert line["step"] == pytest.approx(line["settings"]["batch"] / line["images_per_second"])
        assert line["computing"] > 0
    assert "| lucid-xs, 64, batch 4 |" in table(lines, "busy")
    with pytest.raises(InputError, match="there is none here: --device cuda"):
        bench("busy", "--device", "cpu")


def test_what_several_cover_counts_once():
    covered = import_module("benchmarks.busy").covered
    assert covered([]) == 0.0
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0


def test_growth(bench):
    options = ("--sides", "64", "96", "--objects", "3", "--queries", "20", "--batches", "1")
    lines = bench("growth", *QUICK, *options)
    assert [line["settings"]["axis"] for line in lines] == ["side", "objects", "queries", "batch"]
    assert list(lines[0]["rows"]) == ["64", "96"]
    assert "| lucid-s, side 96 |" in table(lines, "growth")


@pytest.mark.slow
def test_exports(bench, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a traced graph has symbols for numbers
    (line,) = bench("exports", "--quick", "--recipes", "lucid-xs", "--shapes", "3")
    assert line["side"] == 64
    assert list(line["files"]) == ["onnx", "openvino", "torch"]
    for row in line["files"].values():
        assert row["bytes"] > 1e5
        assert max(row[name] for name in ("logits", "boxes", "scores", "shapes_logits", "shapes_boxes")) <= 1e-4
    assert line["files"]["onnx"]["boxes"] > 0  # they move, so they are compared
    assert "| lucid-xs | 64 | onnx |" in table([line], "exports")


def test_large_data(bench, monkeypatch, tmp_path):
    large = import_module("benchmarks.large_data")
    here = {"in_own_process": lambda work, *given: large.measured(work, given) | {"with_start": 1.0}, "LINKS": 50}
    for name, value in here.items():
        monkeypatch.setattr(large, name, value)
    options = ("--images", "400", "--boxes", "3000", "--workers", "1", "--folder", str(tmp_path / "data"))
    (line,) = bench("large_data", *options)
    assert line["reading"]["objects"] == 3000
    assert line["start"]["first_batch"] == large.BATCH
    assert line["workers"]["steps"] == 400 // large.BATCH
    assert table([line], "large_data") == "Not measured yet."  # it says nothing of COCO
    usual = line | {"settings": line["settings"] | {"images": 120_000, "boxes": 1_000_000}}
    assert "| reading 1,000,000 boxes" in table([usual, line], "large_data")
    with pytest.raises(InputError, match="has 400 images and 3000 boxes, not 400 and 3001: give --images 400"):
        bench("large_data", *("--images", "400", "--boxes", "3001", "--folder", str(tmp_path / "data")))


def test_a_line_of_fewer_contenders_takes_no_fuller_ones_place(bench):
    newest = import_module("benchmarks.table").newest
    base = {"benchmark": "training", "machine": "two", "amx": False, "device": "cpu", "threads": 1, "settings": {}}
    base |= {"command": "-m benchmarks training", "versions": {"torch": "2", "transformers": "5"}}
    full, alone = base | {"seconds": {"a": [1.0], "b": [2.0]}}, base | {"seconds": {"a": [3.0]}}
    again = base | {"seconds": {"a": [4.0], "b": [5.0]}}
    assert newest([full, alone], "training") == [full]
    assert newest([alone, full, again, alone], "training") == [again]
    compared = full | {"losses": [[1.0, 1.0]]}
    assert newest([compared, full], "training") == [compared]
    other = full | {"settings": {"side": 1}}
    assert newest([full, other, again], "training") == [other, again]  # in the order of the file


def test_lines_of_bf16_take_no_place_by_losses_of_float32(bench):
    newest = import_module("benchmarks.table").newest
    base = {"benchmark": "training", "machine": "two", "amx": False, "device": "cpu", "threads": 1}
    base |= {"command": "", "versions": {"torch": "2", "transformers": "5"}, "settings": {"precision": "bf16"}}
    assert newest([base | {"losses": [[1.0, 1.0]]}, base], "training") == [base]


def test_a_newer_line_that_is_not_shown_is_named(bench, tmp_path, capsys):
    base = {"benchmark": "training", "machine": "two", "amx": False, "device": "cpu", "threads": 1}
    base |= {"versions": {"torch": "2", "transformers": "5"}, "settings": {"precision": "fp32", "side": 64, "batch": 2}}
    times = {"lucidetr": [1.0], "transformers": [3.0]}
    full = base | {"seconds": times, "when": "2026-01-01", "command": "all"}
    alone = base | {"seconds": {"lucidetr": [9.0]}, "when": "2026-02-02", "command": "one"}
    import_module("benchmarks.measure").RESULTS.write_text("\n".join(map(json.dumps, (alone, full, alone))))
    page = tmp_path / "page.md"
    page.write_text("<!-- training -->\n<!-- end -->\n")
    import_module("benchmarks.table").main([str(page)])
    assert "passed over, for an older line has more in it: 2026-02-02, one" in capsys.readouterr().out
    assert "1.00 s" in page.read_text()


def test_lines_of_other_settings_have_other_labels(bench):
    measured = {"seconds": {"lucidetr fp32": [1.0]}, "differences": {"lucidetr fp32": [0.0, 0.0]}}
    settings = {"recipe": "detr-r50", "weights": "random", "side": "64x64", "batch": 1}
    lines = [measured | {"settings": settings | more} for more in ({}, {"recipe": "lucid-s", "weights": "a.st"})]
    assert table(lines, "inference").startswith("|  | 64x64, batch 1 | lucid-s, a.st, 64x64, batch 1 | 1")
    case = {"case": "detr-r50", "precision": "fp32", "side": 640, "batch": 2}
    measured = {"training": {"a": 1.0}, "step": 1.0, "target": 0.02, "inference": {"a": 1.0}}
    lines = [measured | {"settings": case | more} for more in ({}, {"side": 320}, {"case": "lucid-xs", "side": 128})]
    head = "|  | detr-r50, fp32, side 640 | detr-r50, fp32, side 320 | lucid-xs, fp32 |"
    assert table(lines, "parts").startswith(head)
    grown = {"recipe": "lucid-s", "axis": "side"}
    lines = [{"settings": grown | {"precision": each}, "rows": {"64": {"step": 1.0}}} for each in ("fp32", "bf16")]
    assert "| lucid-s, side 64, precision fp32 |" in table(lines, "growth")
    assert "| lucid-s, side 64 |" in table(lines[:1], "growth")
    trained = {"recipe": "lucid-xs", "side": 128, "batch": 16, "precision": "bf16", "workers": 8, "replayed": True}
    measured = {"step": 1.0, "computing": 0.5, "images_per_second": 16.0}
    lines = [measured | {"settings": trained | more} for more in ({}, {"workers": 2}, {"replayed": False})]
    text = table(lines, "busy")
    for row in ("batch 16, replayed, workers 8", "batch 16, replayed, workers 2", "batch 16"):
        assert f"| lucid-xs, 128, {row} |" in text


def test_a_page_is_filled_from_the_newest_lines(bench, tmp_path):
    table_module = import_module("benchmarks.table")
    base = {"benchmark": "training", "machine": "two", "amx": False, "device": "cpu", "threads": 1}
    base |= {"command": "-m benchmarks training"}
    base |= {"versions": {"torch": "2", "transformers": "5"}, "settings": {"precision": "fp32", "side": 64, "batch": 2}}
    lines = [base | {"seconds": {"lucidetr": [own], "transformers": [3.0]}} for own in (1.0, 2.0)]
    lines.append(lines[0] | {"command": "-m benchmarks training --quick"})  # says nothing of the models
    import_module("benchmarks.measure").RESULTS.write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- training -->\nold\n<!-- end -->\nafter\n<!-- peaks -->\n<!-- end -->\n")
    table_module.main([str(page)])
    text = page.read_text()
    assert "two, 1 threads, torch 2, transformers 5:" in text
    assert "| fp32, 64, batch 2 | 2.00 s | 3.00 s (1.50 ×) | – |" in text
    assert "old" not in text
    assert text.startswith("before\n") and "after\n<!-- peaks -->\nNot measured yet.\n" in text


def test_the_page_has_a_place_for_every_table():
    text = (ROOT / "docs" / "performance.md").read_text()
    assert all(
        f"<!-- {name} -->" in text for name in ("inference", "training", "peaks", "parts", "growth", "large_data")
    )
