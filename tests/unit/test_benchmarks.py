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
    lines = bench("busy", *QUICK, *options)
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
    assert "| reading 3,000 boxes" in table([line], "large_data")


def test_a_line_of_fewer_contenders_takes_no_fuller_ones_place(bench):
    newest = import_module("benchmarks.table").newest
    base = {"benchmark": "training", "machine": "two", "amx": False, "device": "cpu", "threads": 1, "settings": {}}
    base |= {"command": "-m benchmarks training", "versions": {"torch": "2", "transformers": "5"}}
    full, alone = base | {"seconds": {"a": [1.0], "b": [2.0]}}, base | {"seconds": {"a": [3.0]}}
    again = base | {"seconds": {"a": [4.0], "b": [5.0]}}
    assert newest([full, alone], "training") == [full]
    assert newest([alone, full, again, alone], "training") == [again]


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
