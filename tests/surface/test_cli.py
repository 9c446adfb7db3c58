"""The command line as a user meets it: quick help, clear refusals, nothing changed that was not asked for."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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
    lucidetr("data", "write", TINY, root / "set")
    before = tree(root / "set")
    lucidetr("train", "detr-xs", "--data", root / "set", "--out", root / "run", "--steps", 2, *SMALL)
    return root, before


def test_help_needs_nothing_heavy():
    code = "import sys; sys.argv = ['lucidetr', '--help']; import lucidetr.cli as c; c.main(); "
    code += "print([m for m in ('torch', 'numpy', 'tyro', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lucidetr: DETR from scratch")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", ["train", "eval", "predict", "demo"])
def test_each_verb_lists_its_options(verb):
    assert "--out" in lucidetr(verb, "--help") or "--split" in lucidetr(verb, "--help")


def test_a_mistake_is_one_line_and_status_2_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "lucidetr", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "lucidetr: unknown verb trian: did you mean train? Known: convert, data, demo, eval, predict, recipes, train\n"
    )


def test_version():
    assert lucidetr("--version").strip() == "0.1.0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown verb trian: did you mean train?"),
        (["train"], "which recipe?"),
        (["train", "detr-r5"], "unknown recipe detr-r5: did you mean detr-r50?"),
        (["train", "detr-xs", "--data", TINY, "--out", "x"], "how long to train?"),
        (["train", "detr-xs", "--data", TINY, "--steps", "1"], "where to? Give the run's folder by --out"),
        (["train", "detr-xs", "--steps", "1", "--out", "x"], "no data: give --data"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", "nowhere"], "nowhere: no such folder"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", "empty"], "no COCO json found"),
        (["train", "detr-xs", "--steps", "1", "--out", "file/x", "--data", TINY], "cannot be written"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", TINY, "--freeze", "bakbone"], "is no part"),
        (["train", "detr-xs", "--steps", "1", "--out", "x", "--data", TINY, "--batch", "0"], "--batch = 0: choose"),
        (["train", "detr-xs", "--model.num-querys", "3"], "--model.num-queries"),
        (["train", "detr-xs", "--model.num-queries", "0"], "model.num_queries = 0: choose at least 1"),
        (["train", "detr-xs", "--epoch", "3"], "--epochs"),
        (["train", "detr-xs", "--precision", "fp16"], "fp16"),
        (["eval", "nowhere", "--data", TINY], "nowhere: no such file"),
        (["eval", "empty", "--data", TINY], "has this run been trained?"),
        (["predict", "nowhere", "a.jpg"], "nowhere: no such file"),
        (["data", "wirte"], "did you mean write?"),
        (["data", "write", "generated:digit", "x"], "unknown generated data"),
        (["recipes", "--all"], "takes no options"),
        (["demo", "--out", "full"], "not an earlier demo"),
    ],
)
def test_mistakes_are_refused_with_the_way_out(tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
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
    assert names == ["000001-2.png", "000001.png", "000002.png", "000003.png", "000004.png", "detections.json"]
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


def test_files_can_be_named_one_by_one(trained, tmp_path):
    root, _ = trained
    files = ["--train-json", root / "set" / "annotations" / "train.json", "--train-images", root / "set" / "train"]
    files += ["--val-json", root / "set" / "annotations" / "val.json"]
    lucidetr("train", "detr-xs", *files, "--out", tmp_path / "run", "--steps", 1, *SMALL)
    assert "4 images" in lucidetr("eval", tmp_path / "run", "--json", root / "set" / "annotations" / "val.json")
    assert "4 images" in lucidetr("eval", tmp_path / "run")
    lucidetr("eval", tmp_path / "run", "--data", root / "set" / "annotations" / "val.json")


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


@pytest.mark.slow
def test_the_demo_leaves_what_it_says(tmp_path):
    said = lucidetr("demo", "--out", tmp_path / "demo", "--steps", 20)
    for name in ("curves.png", "best.safetensors", "metrics-val.json", "metrics.jsonl", "predictions/8-found.png"):
        assert (tmp_path / "demo" / name).is_file()
        assert name.split("/")[0] in said


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
