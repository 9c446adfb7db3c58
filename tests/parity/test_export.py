"""Exported files give what torch gives: every recipe, any batch, any size, before and after post-processing."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import jaxtyping
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import lucidetr
from lucidetr.categories import Categories
from lucidetr.cli.export import some_pictures
from lucidetr.config import ImageConfig, ModelCard, ModelConfig
from lucidetr.data.dataset import open_dataset
from lucidetr.deployment import export as exporting
from lucidetr.deployment.detector import Detector
from lucidetr.deployment.export import SUFFIXES, WRITERS, differences, export, metadata, onnx_to_openvino, trace
from lucidetr.deployment.exported import Exported, open_exported, sides
from lucidetr.errors import InputError
from lucidetr.evaluation.detect import detect
from lucidetr.fields import to_dict
from lucidetr.models.detr import DETR
from lucidetr.models.postprocess import postprocess
from lucidetr.recipes import RECIPES, recipe
from lucidetr.structures import Predictions
from lucidetr.training.checkpoint import save_model
from surface_tools import lucidetr as command

QUICK = ("lucid-xs",)
ALIKE = ("detr-r101", "detr-r101-dc5", "lucid-l")  # of the same parts as others, only more of them
EVERY = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.record if name in ALIKE else pytest.mark.slow)
    for name in RECIPES
]
VARIANTS = {
    "lucid-xs with bells": {"queries": "selected", "box_bias": "gaussian", "boxes": "refined"},
}
EVERY += [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
SIZES = [(64, 64), (64, 96), (96, 64), (75, 101), (101, 75), (127, 65), (160, 224), (66, 203)]
ALLOWED = 1e-4
NAMES = ("zero", "größer", 'the "third"', "four", "five")


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """Shapes are not checked here: the checks ask for numbers where a traced graph has symbols."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def small(name: str) -> ModelCard:
    """Return a recipe's card, its parts kept and its widths made small."""
    config = recipe(name.split(" with ")[0])
    config = replace(config, model=replace(config.model, **VARIANTS.get(name, {})))
    width = config.model.backbone.width if config.model.backbone.name == "efficientnet_lite0" else 8
    model = replace(
        config.model,
        backbone=replace(config.model.backbone, width=width),
        num_classes=len(NAMES),
        d_model=32,
        num_heads=3,
        head_dim=16,
        feed_forward=64,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=10,
    )
    images = ImageConfig(resize=config.images.resize, size=96, max_size=160)
    return ModelCard(model, images, Categories(ids=(1, 3, 5, 7, 9), names=NAMES), name)


def varied(card: ModelCard) -> DETR:
    """Return a model with its usual weights, but those that start all alike varied, and boxes further apart."""
    torch.manual_seed(3)
    model = DETR(card.model).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("box.output.weight"):
            tensor *= 10
        if tensor.is_floating_point() and tensor.std(correction=0) == 0:
            tensor += 0.1 * torch.randn(tensor.shape)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a recipe's small model, its card, its graph and its files, made when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            card, folder = small(name), tmp_path_factory.mktemp(name)
            model, about = varied(card), metadata(card)
            program = trace(model)
            files = {form: folder / f"model{suffix}" for form, suffix in SUFFIXES.items()}
            WRITERS["onnx"](program, about, files["onnx"])
            onnx_to_openvino(files["onnx"], about, files["openvino"])
            WRITERS["torch"](program, about, files["torch"])
            made[name] = model, card, program, files
        return made[name]

    return make


class Norm(nn.Module):
    """Norm images in one group; the second output is there because files have two."""

    def forward(self, images, padding):
        return torch.nn.functional.group_norm(images, 1, WEIGHT, BIAS, 1e-5), padding


WEIGHT, BIAS = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.0, -1.0, 1.0])


def test_group_norm_is_exact_on_large_maps_far_from_zero(tmp_path):
    """Summed in one go, half a million values about 3 have a mean that is off by 5e-4 of their deviation."""
    images = 3 + 0.003 * torch.randn(2, 3, 400, 401, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 400, 401, dtype=torch.bool)
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    shapes = {"images": {0: batch, 2: height, 3: width}, "padding": {0: batch, 1: height, 2: width}}
    program = torch.export.export(Norm(), (images, padding), dynamic_shapes=shapes)
    exporting.write_onnx(program, {}, tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx")
    found = session.run(None, {"images": images.numpy(), "padding": padding.numpy()})[0]
    exact = torch.nn.functional.group_norm(images.double(), 1, WEIGHT.double(), BIAS.double(), 1e-5)
    assert np.abs(found - exact.numpy()).max() < 4e-4  # a float32 mean alone may cost 1.6e-4


def picture(height, width):
    """Return one image and its padding, of which there is none."""
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
    return images, torch.zeros(1, height, width, dtype=torch.bool)


def padded_batch(height, width):
    """Return three images, of which two are smaller and padded below, or below and to the right."""
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(width))
    padding = torch.zeros(3, height, width, dtype=torch.bool)
    padding[1, height * 2 // 3 :] = True
    padding[2, height - 7 :] = True
    padding[2, :, width // 2 + 3 :] = True
    return images.masked_fill(padding[:, None], 0.0), padding


def batches():
    """Yield one picture, and three of which two are padded, at every size; and two of them."""
    for height, width in SIZES:
        yield picture(height, width)
        images, padding = padded_batch(height, width)
        yield images, padding
        yield images[1:].contiguous(), padding[1:].contiguous()


def furthest(found, truth, sizes, categories):
    """Return the largest difference of boxes (in units of the picture) and of scores of matched detections."""
    worst = 0.0
    for one, other, size in zip(
        postprocess(found, sizes, categories), postprocess(truth, sizes, categories), sizes, strict=True
    ):
        assert len(one) == len(other)
        boxes = (one.boxes_xyxy[:, None] - other.boxes_xyxy).abs().amax(-1) / max(size)
        scores = (one.scores[:, None] - other.scores).abs()
        cost = boxes + scores + 10.0 * (one.labels[:, None] != other.labels)
        worst = max(worst, cost[linear_sum_assignment(cost.numpy())].max().item())
    return worst


@pytest.mark.parametrize("name", EVERY)
def test_files_say_what_the_model_says(name, exported):
    model, card, _, files = exported(name)
    for form, file in files.items():
        engine, _, _ = open_exported(file, "fp32")
        worst, apart, number = [0.0, 0.0], 0.0, 0
        for images, padding in batches():
            truth = model(images, padding)
            found = engine(images, padding)
            assert found.logits.shape == truth.logits[-1:].shape
            assert truth.boxes_cxcywh[-1].std(1).amax(-1).min() > 1e-4  # the queries do not all say the same
            worst = [max(pair) for pair in zip(worst, differences(found, truth), strict=True)]
            sizes = ((480, 640),) * len(images)
            apart = max(apart, furthest(found, truth, sizes, card.categories))
            number += 1
        print(f"{name} {form}: {number} batches, logits {worst[0]:.1e}, boxes {worst[1]:.1e}, detections {apart:.1e}")
        assert number >= 20
        assert max(worst) <= ALLOWED
        assert apart <= ALLOWED


def test_card_names_and_preprocessing_travel_inside(exported):
    _, card, _, files = exported("lucid-xs")
    for file in files.values():
        assert open_exported(file)[1] == card
    kept = {entry.key: json.loads(entry.value) for entry in onnx.load(files["onnx"]).metadata_props}
    assert tuple(kept["categories"]["names"]) == NAMES
    assert kept["images"]["size"] == card.images.size
    graph = onnx.load(files["onnx"]).graph
    assert [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input] == [
        ["batch", 3, "height", "width"],
        ["batch", "height", "width"],
    ]
    for form in ("onnx", "torch"):
        assert b"lucidetr/models" not in files[form].read_bytes()  # no path of the machine that wrote it


@pytest.mark.parametrize("form", WRITERS)
def test_load_gives_the_same_detector(form, exported):
    model, card, _, files = exported("lucid-xs")
    detector, truth = lucidetr.load(files[form], precision="fp32"), Detector(model, card, "cpu", "fp32")
    assert detector.names == NAMES
    generator = np.random.default_rng(0)
    pictures = [
        generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((60, 90), (91, 40))
    ]
    for one, other in zip(detector.predict_many(pictures), truth.predict_many(pictures), strict=True):
        assert (one.scores - other.scores).abs().max() <= ALLOWED
        assert (one.boxes_xyxy - other.boxes_xyxy).abs().max() <= ALLOWED * 90
        assert one.names == other.names
    assert len(detector.predict(pictures[0], threshold=1.0)) == 0
    scenes = open_dataset("generated:digits?size=64&digit=14-24&objects=1-3&val=3", "val")
    found, wanted = (detect(each.model, scenes, card.images, card.categories, batch=2) for each in (detector, truth))
    for one, other in zip(found, wanted, strict=True):
        assert (one.scores - other.scores).abs().max() <= ALLOWED


def test_what_a_file_cannot_do_is_said(exported, tmp_path, monkeypatch):
    _, _, _, files = exported("lucid-xs")
    engine = lucidetr.load(files["onnx"]).model
    with pytest.raises(InputError, match=r"16 × 64 pixels .* at least 25"):
        engine(*picture(16, 64))
    with pytest.raises(InputError, match="computes in fp32"):
        lucidetr.load(files["torch"], precision="bf16")
    with pytest.raises(InputError, match="runs on the cpu"):
        lucidetr.load(files["onnx"], device="cuda")
    with pytest.raises(InputError, match="no such file"):
        lucidetr.load(tmp_path / "nowhere.onnx")
    for suffix in SUFFIXES.values():
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(b"not a model")
        if suffix == ".xml":
            with pytest.raises(InputError, match=r"damaged\.xml: its weights .*damaged\.bin are not there"):
                lucidetr.load(damaged)
            damaged.with_suffix(".bin").write_bytes(b"")
        with pytest.raises(InputError, match="not a model that can be read"):
            lucidetr.load(damaged)
    foreign = onnx.load(files["onnx"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="no lucidetr card"):
        lucidetr.load(tmp_path / "foreign.onnx")
    card = json.loads(next(each.value for each in onnx.load(files["onnx"]).metadata_props if each.key == "card"))
    for text, said in (
        ("{", r"odd\.onnx: its card is not readable JSON"),
        ("[1]", r"odd\.onnx: its card is no card of ours"),
        (json.dumps(card | {"qecipe": 1}), r"odd\.onnx: its card cannot be used: unknown field"),
        (json.dumps(card | {"schema": 99}), r"odd\.onnx: written by a newer lucidetr"),
    ):
        odd = onnx.load(files["onnx"])
        next(each for each in odd.metadata_props if each.key == "card").value = text
        onnx.save(odd, tmp_path / "odd.onnx")
        with pytest.raises(InputError, match=said):
            lucidetr.load(tmp_path / "odd.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'lucidetr\[export\]'"):
        lucidetr.load(files["onnx"])


@pytest.mark.parametrize("form", WRITERS)
def test_a_file_that_disagrees_is_not_written(form, exported, tmp_path, monkeypatch):
    """The file is that of a model whose class bias differs by 0.002."""
    model, card, program, files = exported("lucid-xs")

    def write(program, about, path):
        for file in {files[form], files[form].with_suffix(".bin") if form == "openvino" else files[form]}:
            shutil.copy(file, path.with_name(file.name))

    monkeypatch.setattr(exporting, "trace", lambda model: program)
    monkeypatch.setitem(WRITERS, form, write)
    changed = varied(card)
    changed.heads.category.bias += 0.002
    pictures = [torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))]
    out = tmp_path / files[form].name
    with pytest.raises(InputError, match="not written, the file and the model differ"):
        export(changed, card, form, out, pictures, "noise")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(exporting, "version", without_openvino)
    parity = export(model, card, form, out, pictures, "noise")
    assert max(parity.logits, parity.boxes, parity.scores) <= ALLOWED
    assert set(parity.versions) == {"torch"} | ({"onnx", "onnxscript", "onnxruntime"} if form != "torch" else set())
    weights = {"model.bin"} if form == "openvino" else set()
    assert {file.name for file in tmp_path.iterdir()} == {out.name, f"{out.name}.parity.json"} | weights


def without_openvino(name):
    """Return a package's version as if openvino were not installed."""
    if name == "openvino":
        raise PackageNotFoundError(name)
    return version(name)


def test_the_command(exported, tmp_path, monkeypatch):
    model, card, program, _ = exported("lucid-xs")
    monkeypatch.setattr(exporting, "trace", lambda model: program)
    save_model(tmp_path / "best.safetensors", model.state_dict(), card)
    said = command("export", tmp_path, "--format", "openvino", "--pictures", 2)
    assert "agrees with the model on 2 pictures of generated:digits val" in said
    kept = json.loads((tmp_path / "model.xml.parity.json").read_text())
    assert max(kept["logits"], kept["boxes"], kept["scores"]) <= kept["allowed"] == ALLOWED
    assert [each["batch"] for each in kept["batches"]] == [1, 1, 2]
    assert set(kept["versions"]) == {"torch", "onnx", "onnxscript", "onnxruntime", "openvino"}
    assert lucidetr.load(tmp_path / "model.xml").card == card
    assert "exists already" in command("export", tmp_path, "--format", "openvino", status=2)
    for name in ("mine.bin", "mine.xml.parity.json"):
        (tmp_path / name).write_text("precious")
        said = command("export", tmp_path, "--format", "openvino", "--out", tmp_path / "mine.xml", status=2)
        assert f"{name} exists already" in said
        (tmp_path / name).unlink()
    assert "ends in .pt2" in command("export", tmp_path, "--format", "torch", "--out", tmp_path / "x.onnx", status=2)
    assert "exported model itself" in command("export", tmp_path / "model.xml", "--out", tmp_path / "y.onnx", status=2)


def test_a_damaged_picture_of_the_run_prevents_no_export(tmp_path):
    command("data", "convert", "generated:digits?size=64&digit=14-24&objects=1-3&train=2&val=3", tmp_path / "set")
    config = replace(recipe("lucid-xs"), data=str(tmp_path / "set"))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    name, pictures = some_pictures(tmp_path, 3)
    assert str(tmp_path / "set") in name and len(pictures) == 3
    damaged = sorted((tmp_path / "set" / "val").glob("*.png"))[1]
    damaged.write_bytes(damaged.read_bytes()[:200])
    name, pictures = some_pictures(tmp_path, 3)
    assert name == "generated:digits val" and len(pictures) == 3


@pytest.mark.parametrize("form", WRITERS)
def test_a_detector_of_a_file_can_be_pickled(form, exported, tmp_path, monkeypatch):
    *_, files = exported("lucid-xs")
    monkeypatch.chdir(files[form].parent)
    detector = lucidetr.load(files[form].name, device=torch.device("cpu"))
    content = pickle.dumps(detector)
    monkeypatch.chdir(tmp_path)
    image = torch.zeros(3, 70, 90, dtype=torch.uint8)
    assert torch.equal(pickle.loads(content).predict(image).scores, detector.predict(image).scores)  # noqa: S301


@pytest.mark.parametrize("installed", ["2.9.0", "2.12.1+cu130"])
def test_a_torch_that_cannot_describe_a_max_pool_is_named(monkeypatch, installed):
    card = small("lucid-m")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(installed))
    with pytest.raises(InputError, match=r"torch 2\..* cannot export resnet18 .*: pip install 'torch>=2.13'"):
        trace(varied(card))


@pytest.mark.slow
def test_a_learned_position_has_a_longest_side(tmp_path):
    card = small("detr-xs")
    card = replace(card, model=replace(card.model, position="learned", position_table=8))
    model = varied(card)
    WRITERS["torch"](trace(model), metadata(card), tmp_path / "model.pt2")
    engine, _, _ = open_exported(tmp_path / "model.pt2")
    images, padding = picture(75, 128)
    assert max(differences(engine(images, padding), model(images, padding))) <= ALLOWED
    with pytest.raises(InputError, match="at most 128"):
        engine(*picture(75, 129))


def test_shortest_sides():
    assert sides(recipe("lucid-xs").model) == (33, None)  # 25 tokens of stride 8: five by five
    assert sides(recipe("lucid-l").model) == (273, None)  # 300 of stride 16: eighteen by eighteen
    assert sides(ModelConfig()) == (33, None)


def test_differences_are_those_of_sets():
    generator = torch.Generator().manual_seed(0)
    truth = Predictions(
        logits=5 * torch.randn(2, 2, 6, 3, generator=generator),
        boxes_cxcywh=torch.rand(2, 2, 6, 4, generator=generator),
    )
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    assert differences(Predictions(truth.logits[:, :, order], truth.boxes_cxcywh[:, :, order]), truth) == (0, 0)
    moved, scale = truth.logits.clone(), truth.logits[-1].abs().max().item()
    moved[-1, 1, 2, 0] += 0.1
    assert differences(Predictions(moved, truth.boxes_cxcywh), truth) == pytest.approx((0.1 / scale, 0), abs=1e-6)
    moved[-1, 0, 0, 0] = torch.nan
    assert differences(Predictions(moved, truth.boxes_cxcywh), truth)[0] == 1e9


def test_an_engine_says_what_a_network_says():
    card = small("lucid-xs")
    engine = Exported(lambda images, padding: (torch.zeros(1, 10, 5), torch.zeros(1, 10, 4)), card)
    assert next(engine.parameters()).dtype == torch.float32
    assert engine.eval()(*picture(64, 64)).logits.shape == (1, 1, 10, 5)
