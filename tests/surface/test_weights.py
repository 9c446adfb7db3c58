"""Weights on the command line: converted, started from, given back."""

import json
from pathlib import Path

import pytest
import torch

from lucidetr.deployment.detector import load
from lucidetr.training.checkpoint import load_model
from surface_tools import lucidetr

TINY = "generated:digits?size=64&digit=14-24&objects=1-3&train=8&val=4"
SMALL = ["--images.size", "64", "--images.max-size", "64", "--model.d-model", "32", "--model.head-dim", "4"]
SMALL += ["--model.feed-forward", "64", "--model.encoder-layers", "1", "--model.decoder-layers", "1"]
SMALL += ["--augmentation.scales", "64", "--augmentation.crop", "0", "--batch", "4", "--micro-batch", "4"]
SMALL += ["--evaluations", "1", "--steps", "1"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Write a torchvision ResNet-18 file."""
    import torchvision

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def started(backbone, tmp_path_factory):
    """Train one step from it, the paper's way: statistics and the first stage frozen."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = ["train", "detr-r50", "--model.backbone.name", "resnet18", "--data", TINY, "--out", out, *SMALL]
    return out, lucidetr(*command, "--weights", backbone)


def test_a_backbone_starts_a_detector_and_its_frozen_part_stays(backbone, started):
    out, said = started
    assert "the backbone starts from resnet18; the rest is new" in said
    assert "group norm" not in said
    state, card = load_model(out)
    assert card.model.backbone.norm == "frozen_batch"
    source = torch.load(backbone, weights_only=True)
    assert torch.equal(state["backbone.stem.conv.weight"], source["conv1.weight"])
    assert torch.equal(state["backbone.stages.0.0.conv1.weight"], source["layer1.0.conv1.weight"])
    assert torch.equal(state["backbone.stages.3.1.norm2.running_var"], source["layer4.1.bn2.running_var"])
    assert not torch.equal(state["backbone.stages.3.0.conv1.weight"], source["layer4.0.conv1.weight"])


def test_a_detector_starts_a_detector_of_the_same_names(started, tmp_path):
    out, _ = started
    command = [
        "train",
        "detr-r50",
        "--model.backbone.name",
        "resnet18",
        "--data",
        TINY,
        "--out",
        tmp_path / "b",
        *SMALL,
    ]
    said = lucidetr(*command, "--weights", out, "--optimiser.lr", "0", "--optimiser.backbone-lr", "0")
    assert "all weights start from detr-r50" in said
    a, b = load_model(out)[0], load_model(tmp_path / "b")[0]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ours_to_hugging_face_and_back(started, tmp_path):
    out, _ = started
    lucidetr("convert", out, tmp_path / "hf", "--to", "hugging-face")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_queries"] == 100
    said = lucidetr("convert", tmp_path / "hf", tmp_path / "again.safetensors")
    assert "10 categories" in said
    picture = torch.randint(0, 255, (3, 60, 64), dtype=torch.uint8)
    mine, theirs = load(out).predict(picture), load(tmp_path / "again.safetensors").predict(picture)
    torch.testing.assert_close(theirs.scores, mine.scores)
    torch.testing.assert_close(theirs.boxes_xyxy, mine.boxes_xyxy, rtol=1e-4, atol=1e-3)
    assert theirs.names == mine.names


def test_ours_to_facebook_and_back(started, tmp_path):
    out, _ = started
    lucidetr("convert", out, tmp_path / "detr.pth", "--to", "facebook")
    lucidetr("convert", tmp_path / "detr.pth", tmp_path / "again.safetensors")
    a, b = load_model(out)[0], load_model(tmp_path / "again.safetensors")[0]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_backbone_alone_is_no_detector(backbone, tmp_path):
    assert "a backbone alone" in lucidetr("convert", backbone, tmp_path / "r18.safetensors")
    for kind in ("hugging-face", "facebook"):
        said = lucidetr("convert", backbone, tmp_path / "out", "--to", kind, status=2)
        assert "a backbone alone cannot be written as a detector" in said
        assert not (tmp_path / "out").exists()
    said = lucidetr("predict", tmp_path / "r18.safetensors", "a.jpg", status=2)
    assert "backbone alone; train a detector from them by --weights" in said


def test_the_installed_backbone_starts_a_detector(tmp_path):
    command = ["train", "detr-r50", "--model.backbone.name", "efficientnet_lite0", "--data", TINY]
    said = lucidetr(*command, "--out", tmp_path / "run", *SMALL, "--weights", "efficientnet-lite0")
    assert "pixels are normalised as the weights know them" in said
    _, card = load_model(tmp_path / "run")
    assert card.images.std[0] == pytest.approx(128 / 255)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: no such file or folder"),
        (["--weights", "https://example.org/a.pth"], "give the file's SHA-256 too"),
        (["--weights", "http://example.org/a.pth", "--weights-sha256", "0" * 64], "only https addresses"),
        (["--weights-sha256", "0" * 64], "--weights-sha256 is that of a file, and --weights is not given"),
        (["--weights", "efficientnet-lite0", "--weights-sha256", "0" * 64], "and --weights is efficientnet-lite0"),
        (["--weights", __file__, "--weights-sha256", "0" * 64], f"{__file__}: its SHA-256 is "),
        (["--weights", str(Path(__file__).parent), "--weights-sha256", "0" * 64], "is a folder, --weights-sha256 that"),
        (["--train-images", "x"], "--train-images x belongs to --train-json, which is not given"),
        (["--val-images", "x"], "--val-images x belongs to --val-json, which is not given"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(tmp_path, weights, said):
    assert said in lucidetr("train", "detr-r50", "--data", TINY, "--out", tmp_path / "x", *SMALL, *weights, status=2)


def test_what_says_itself_how_it_is_built_takes_no_word_for_it(backbone, tmp_path):
    lucidetr("convert", backbone, tmp_path / "own.safetensors")
    for option in (("--num-heads", 7), ("--dilation", True)):
        said = lucidetr("convert", tmp_path / "own.safetensors", tmp_path / "x.safetensors", *option, status=2)
        assert "own.safetensors says itself what it is: leave --dilation and --num-heads out" in said


def test_converting_never_overwrites(backbone, tmp_path):
    (tmp_path / "mine.safetensors").write_text("precious")
    assert "exists already" in lucidetr("convert", backbone, tmp_path / "mine.safetensors", status=2)
    assert "ends in .safetensors" in lucidetr("convert", backbone, tmp_path / "mine.pt", status=2)
    assert (tmp_path / "mine.safetensors").read_text() == "precious"
