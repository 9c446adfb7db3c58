"""The command line as a user meets it: quick help, clear refusals, nothing changed that was not asked for."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lucidetr.cli import VERBS
from lucidetr.cli.evaluate import Options, own_data
from lucidetr.recipes import DETR_XS, LADDER, RECIPES
from lucidetr.studies import ladder
from run_tools import tiny
from surface_tools import lucidetr

TINY = "generated:digits?size=64&digit=14-24&objects=1-3&train=8&val=4"
SMALL = ["--images.size", "64", "--images.max-size", "64", "--model.d-model", "32", "--model.head-dim", "8"]
SMALL += ["--model.backbone.width", "8", "--model.feed-forward", "64", "--micro-batch", "8", "--evaluations", "1"]


def tree(folder):
    """Return every file's path and content hash."""
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Write a small COCO folder and train on it for two steps."""
    root = tmp_path_factory.mktemp("cli")
    lucidetr("data", "convert", TINY, root / "set")
    before = tree(root / "set")
    lucidetr("train", "detr-xs", "--data", root / "set", "--out", root / "run", "--steps", 2, *SMALL)
    return root, before


def test_help_needs_nothing_heavy():
    code = "import sys; sys.argv = ['lucidetr', '--help']; import lucidetr.cli as c; c.main(); "
    code += "print([m for m in ('torch', 'numpy', 'tyro', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lucidetr: DETR from scratch")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("train", ["--data", "--out", "--model.num-queries", "--minutes"]),
        ("eval", ["--data", "--split"]),
        ("predict", ["--out", "--threshold"]),
        ("demo", ["--out", "--minutes", "--data"]),
        ("recipes", ["--ladder", "--neighbours"]),
        ("study", ["ladder", "--out", "--minutes", "--seeds", "--threads", "--part", "--data"]),
    ],
)
def test_each_verb_lists_its_options(verb, options):
    said = lucidetr(verb, "--help")
    assert [option for option in options if option not in said] == []


def test_the_usage_names_every_verb():
    usage = lucidetr("--help")
    assert [verb for verb in VERBS if f"\n  lucidetr {verb} " not in usage] == []
    assert "lucidetr train [RECIPE] --data DATA --out RUN" in usage
    assert max(map(len, usage.splitlines())) <= 120


def test_a_mistake_is_one_line_and_status_2_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "lucidetr", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    known = ", ".join(sorted(VERBS))
    assert done.stderr == f"lucidetr: unknown verb trian: did you mean train? Known: {known}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"]])
def test_who_reads_no_further_is_told_nothing(arguments):
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "lucidetr", *arguments]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_version():
    assert lucidetr("--version").strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown verb trian: did you mean train?"),
        (["train"], "what on? lucidetr train [RECIPE] --data DATA"),
        (["train", "--steps", "1", "--out", "x"], "no data: give --data"),
        (["train", "--steps", "1", "--out", "x", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "--out", "x", "--data", TINY], "how long to train?"),
        (["train", "detr-r5"], "unknown recipe detr-r5: did you mean detr-r50?"),
        (["train", "detr-xs", "--data", TINY, "--out", "x"], "how long to train?"),
        (["train", "detr-xs", "--data", TINY, "--steps", "1"], "where to? Give the run's folder by --out"),
        (["train", "detr-xs", "--steps", "1", "--out", "x"], "no data: give --data"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", "empty"], "no COCO json in"),
        (["train", "detr-xs", "--steps", "1", "--out", "file/x", "--data", TINY], "cannot be written"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", TINY, "--freeze", "bakbone"], "is no part"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", TINY, "--batch", "0"], "--batch = 0: choose"),
        (["train", "detr-xs", "--model.num-querys", "3"], "--model.num-queries"),
        (["train", "detr-xs", "--model.num-queries", "0"], "model.num_queries = 0: choose at least 1"),
        (["train", "detr-xs", "--model.boxes", "refined"], "learned and content queries say absolute boxes"),
        (["train", "lucid-xs", "--loss.classification", "cross_entropy"], "choose focal, varifocal, ia_bce or mal"),
        (["train", "lucid-xs", "--model.fused", "12"], "model.fused = (12,): choose from 8, 4"),
        (["train", "detr-xs", "--epoch", "3"], "--epochs"),
        (["train", "detr-xs", "--precision", "fp16"], "fp16"),
        (["eval", "nowhere", "--data", TINY], "nowhere: no such file"),
        (["eval", "empty", "--data", TINY], "has this run been trained?"),
        (["predict", "nowhere", "a.jpg"], "nowhere: no such file"),
        (["data", "convrt"], "did you mean convert?"),
        (["data", "convert", "generated:digit", "x"], "unknown generated data"),
        (["recipes", "--ladder", "--neighbours"], "--ladder and --neighbours are two tables"),
        (["doctor", "full", "--num-queries", "-5"], "--num-queries = -5: choose at least 0"),
        (["inspect", "full", "--out", "full/mine.txt"], "give the page a name that ends in .html"),
        (["recipes", "--all"], "Unrecognized options: --all"),
        (["study", "ladder"], "--out"),
        (["study", "lader", "--out", "x"], "invalid choice 'lader'"),
        (["study", "ladder", "--out", "x", "--part", "3/2"], "--part 3/2: expected for example 1/2"),
        (["study", "ladder", "--out", "x", "--part", "²/3"], "--part ²/3: expected for example 1/2"),
        (["inspect", "empty", "--images", "3,²"], "--images 3,²: ² is no image id"),
        (["data", "sample", TINY, "x.png", "--seed", "-1"], "--seed = -1: choose at least 0"),
        (["data", "sample", TINY, "x.png", "--images", "0"], "--images = 0: choose at least 1"),
        (["data", "split", TINY, "x", "--seed", "-1"], "--seed = -1: choose at least 0"),
        (["study", "ladder", "--out", "x", "--part", "half"], "--part half: expected for example 1/2"),
        (["study", "ladder", "--out", "x", "--minutes", "0"], "--minutes 0"),
        (["demo", "--out", "full"], "not an earlier demo"),
        (["demo", "--steps", "3"], "--steps"),
    ],
)
def test_mistakes_are_refused_with_the_way_out(tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "full" / "demo").write_text("a program of that name")
    (tmp_path / "file").write_text("")
    before = tree(tmp_path)
    assert said in lucidetr(*arguments, cwd=tmp_path, status=2)
    assert before.items() <= tree(tmp_path).items()


def test_a_faulty_file_is_named_on_the_command_line(trained, tmp_path):
    root, _ = trained
    shutil.copytree(root / "set", tmp_path / "set")
    path = tmp_path / "set" / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    said = lucidetr("train", "detr-xs", "--data", tmp_path / "set", "--out", tmp_path / "run", "--steps", 1, status=2)
    assert "train.json: 1 of " in said
    assert "annotation 1 in 000001.png" in said
    assert "--bad-boxes drop" in said


def test_train_evaluate_predict(trained, tmp_path):
    root, before = trained
    run = root / "run"
    assert (run / "curves.png").stat().st_size > 10_000
    said = lucidetr("eval", run)
    assert "4 images" in said
    numbers = json.loads((run / "metrics-val.json").read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR100", "images", "objects", "detections"} <= set(
        numbers
    )
    rows = json.loads((run / "detections-val.json").read_text())
    assert {row["image_id"] for row in rows} == {1, 2, 3, 4}

    single = root / "set" / "train" / "000001.png"
    lucidetr("predict", run, single, root / "set" / "val", "--out", tmp_path / "drawn", "--threshold", "0.0")
    names = sorted(file.name for file in (tmp_path / "drawn").iterdir())
    pictures = ["000001-2.png", "000001.png", "000002.png", "000003.png", "000004.png"]
    assert names == [".made-by-predict", *pictures, "detections.json"]
    with Image.open(tmp_path / "drawn" / "000001.png") as drawn, Image.open(single) as plain:
        assert drawn.size == plain.size
        assert drawn.tobytes() != plain.tobytes()
    content = json.loads((tmp_path / "drawn" / "detections.json").read_text())
    assert len(content["images"]) == 5
    assert [c["name"] for c in content["categories"]] == list("0123456789")
    assert len(content["annotations"]) == 5 * 25
    assert tree(root / "set") == before


def test_one_broken_picture_does_not_stop_the_others(trained, tmp_path):
    root, _ = trained
    shutil.copytree(root / "set" / "val", tmp_path / "in")
    (tmp_path / "in" / "000002.png").write_text("broken")
    for _ in range(2):  # the second time its own drawings lie in the folder and do not count
        said = lucidetr("predict", root / "run", tmp_path / "in", "--out", tmp_path / "in" / "drawn", status=2)
        assert "1 pictures could not be used" in said
        assert "000002.png: not an image" in said
        content = json.loads((tmp_path / "in" / "drawn" / "detections.json").read_text())
        assert len(content["images"]) == 3


def test_a_split_set_aside_can_be_evaluated_and_other_data_take_no_ones_place(trained, tmp_path):
    root, _ = trained
    shutil.copytree(root / "set", tmp_path / "set")
    (tmp_path / "set" / "annotations" / "val.json").unlink()
    run = tmp_path / "run"
    lucidetr("train", "detr-xs", "--data", tmp_path / "set", "--out", run, "--steps", 1, *SMALL)
    own = (run / "metrics-val.json").read_bytes()
    assert "2 images" in lucidetr("eval", run)
    assert json.loads((run / "metrics-val.json").read_bytes()) == json.loads(own)
    lucidetr("eval", run, "--data", root / "set", "--split", "val")
    assert json.loads((run / "metrics-val.json").read_bytes()) == json.loads(own)
    assert json.loads((run / "metrics-set-val.json").read_text())["images"] == 4
    (run / "thresholds.json").write_text("of the best model")
    (run / "last.safetensors.thresholds.json").write_text("of an earlier one")
    said = lucidetr("eval", run / "last.safetensors")
    assert (run / "last.safetensors.thresholds.json").is_file() == ("best threshold: none" not in said)
    assert json.loads((run / "metrics-last-val.json").read_text())["images"] == 2
    assert json.loads((run / "metrics-val.json").read_bytes()) == json.loads(own)
    assert (run / "thresholds.json").read_text() == "of the best model"


def test_files_can_be_named_one_by_one(trained, tmp_path):
    root, _ = trained
    files = ["--train-json", root / "set" / "annotations" / "train.json", "--train-images", root / "set" / "train"]
    files += ["--val-json", root / "set" / "annotations" / "val.json"]
    lucidetr("train", "detr-xs", *files, "--out", tmp_path / "run", "--steps", 1, *SMALL)
    assert "4 images" in lucidetr("eval", tmp_path / "run", "--json", root / "set" / "annotations" / "val.json")
    assert "4 images" in lucidetr("eval", tmp_path / "run")
    (tmp_path / "run" / "thresholds.json").write_text("of its own data")
    lucidetr("eval", tmp_path / "run", "--data", root / "set" / "annotations" / "val.json")
    assert (tmp_path / "run" / "thresholds.json").read_text() == "of its own data"


def test_a_run_knows_its_own_data_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"data": "scenes"}')
    for data in ("", "scenes", "scenes/", "./scenes", str(tmp_path / "scenes")):
        assert own_data(Options("run", data=data), tmp_path)
    for options in (Options("run", data="other/scenes"), Options("run", data="scenes", json="other.json")):
        assert not own_data(options, tmp_path)
    (tmp_path / "config.json").write_text('{"data": ""}')
    assert own_data(Options("run"), tmp_path)
    assert not own_data(Options("run", data="."), tmp_path)


def test_drawing_never_overwrites_the_picture(trained):
    root, before = trained
    said = lucidetr("predict", root / "run", root / "set" / "val", "--out", root / "set" / "val", status=2)
    assert "would overwrite the picture itself" in said
    assert tree(root / "set") == before


def test_a_resumed_command_goes_on(tmp_path):
    command = ["train", "detr-xs", "--data", TINY, "--out", tmp_path / "run", "--steps", 2, *SMALL]
    lucidetr(*command)
    assert "holds a run already" in lucidetr(*command, status=2)
    assert "resumed after step 2" in lucidetr(*command, "--resume")


def test_without_a_recipe_the_data_choose_and_options_go_on_top(trained, tmp_path):
    root, before = trained
    run = tmp_path / "run"
    said = lucidetr("train", "--data", root / "set", "--out", run, "--steps", 1, "--seed", 5, *SMALL)
    assert "8 images of about 64 pixels; small objects take" in said
    assert "chosen: lucid-xs at 96 × 96" in said
    assert "pictures are not mirrored: the category names speak of left and right, or of signs" in said
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"] == "lucid-xs"
    assert (config["seed"], config["images"]["size"], config["model"]["d_model"]) == (5, 64, 32)
    assert config["augmentation"]["flip"] == 0
    assert "4 images" in lucidetr("eval", run)
    assert tree(root / "set") == before


def test_the_data_choose_anew_for_other_data(trained, tmp_path):
    """A crowd asks for a larger member; `--data` may come in either spelling, before or after other options."""
    crowd = "generated:digits?size=128&digit=8-9&objects=60-60&train=2&val=1"
    small = ["--model.d-model", 32, "--model.head-dim", 8, "--model.backbone.width", 4, "--images.size", 64]
    said = lucidetr("train", "--steps=1", f"--data={crowd}", "--out", tmp_path / "run", "--evaluations", 1, *small)
    assert "chosen: lucid-s at 224 × 224" in said
    assert f"with {RECIPES['lucid-s'].model.num_queries} queries (up to " in said


def test_recipes_print_the_ladder_and_the_neighbours():
    ladder = lucidetr("recipes", "--ladder")
    assert [f"| {rung.name} | {rung.says} |" for rung in LADDER if f"| {rung.name} | {rung.says} |" not in ladder] == []
    neighbours = lucidetr("recipes", "--neighbours")
    for name in ("lucid-xs", "lucid-s", "lucid-m", "lucid-l"):
        assert f"| **{name}** |" in neighbours
    assert "| DETR R50 | 800–1333 |" in neighbours


def test_a_study_leaves_its_lines_and_its_table(tmp_path, monkeypatch):
    name = LADDER[0].name
    monkeypatch.setattr(ladder, "contenders", lambda: iter([("rung", name, replace(tiny(""), steps=0))]))
    monkeypatch.setattr(ladder, "climb", lambda: iter([(LADDER[0], DETR_XS)]))
    command = ["study", "ladder", "--out", tmp_path, "--minutes", 0.01, "--seeds", 1, "--threads", 1, "--data", TINY]
    said = lucidetr(*command)
    assert f"rung {name}, seed 0: AP" in said
    assert f"table: {tmp_path / 'ladder.md'}" in said
    (line,) = (tmp_path / "ladder.jsonl").read_text().splitlines()
    page = (tmp_path / "ladder.md").read_text()
    assert f"| {json.loads(line)['ap']:.3f} |" in page
    assert "seed 0" not in lucidetr(*command)


def test_the_demo_leaves_what_it_says_and_replaces_only_itself(tmp_path):
    command = ["demo", "--out", tmp_path / "demo", "--minutes", 0.02, "--data", TINY]
    said = lucidetr(*command)
    assert "scenes that it has not seen" in said
    for name in ("curves.png", "best.safetensors", "metrics-val.json", "metrics.jsonl", "predictions/4-found.png"):
        assert (tmp_path / "demo" / name).is_file()
        assert name.split("/")[0] in said
    assert (tmp_path / "demo" / "predictions" / "4-truth.png").is_file()
    assert json.loads((tmp_path / "demo" / "config.json").read_text())["recipe"] == "lucid-xs"
    (tmp_path / "demo" / "left.txt").write_text("of the last demo")
    lucidetr(*command)
    assert not (tmp_path / "demo" / "left.txt").exists()
    (tmp_path / "demo" / "left.txt").write_text("of the last demo")
    lucidetr(*command[:-1], "generated:nonsense", status=2)
    lucidetr(*command[:3], "--minutes", 0, *command[5:], status=2)
    assert (tmp_path / "demo" / "left.txt").exists(), "the last demo went before the new one could start"


def test_python_and_command_line_agree(trained, tmp_path):
    import lucidetr as package

    root, _ = trained
    picture = root / "set" / "val" / "000002.png"
    lucidetr("predict", root / "run", picture, "--out", tmp_path, "--threshold", "0.0")
    rows = json.loads((tmp_path / "detections.json").read_text())["annotations"]
    detections = package.load(root / "run").predict(picture)
    assert [row["category_id"] for row in rows] == detections.category_ids
    assert [row["score"] for row in rows] == pytest.approx(detections.scores.tolist(), abs=1e-5)
    assert isinstance(detections, package.Detections)
    assert package.recipe("detr-xs").recipe == "detr-xs"
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = package.laod
    assert Path(package.__file__).name == "__init__.py"


def test_doctor_says_names_that_are_no_text(tmp_path):
    lucidetr("data", "convert", TINY, tmp_path / "set", "--to", "yolo")
    name = os.fsdecode(b"\xff.png")
    shutil.copy(tmp_path / "set/images/train/000001.png", tmp_path / "set/images/train" / name)
    command = [sys.executable, "-m", "lucidetr", "doctor", "set", "--all", "--json", "found.json"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=tmp_path, env=strict, capture_output=True, text=True, check=False)
    assert "\\udcff.png" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    texts = [finding["text"] for finding in json.loads((tmp_path / "found.json").read_text())["findings"]]
    assert any(name in text for text in texts)
