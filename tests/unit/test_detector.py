"""The user's object: it keeps to itself what is its own, takes what it is given as it is, and travels."""

import pickle
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lucidetr.categories import Categories
from lucidetr.config import ImageConfig, ModelCard
from lucidetr.deployment.detector import Detector, load
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR
from lucidetr.recipes import RECIPES

CATEGORIES = Categories(ids=tuple(range(10)), names=tuple(map(str, range(10))))
MODEL = replace(RECIPES["lucid-xs"].model, num_classes=len(CATEGORIES))
CARD = ModelCard(MODEL, ImageConfig(size=64, resize="square"), CATEGORIES, "lucid-xs")
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), dtype=np.uint8)


@pytest.fixture
def unchecked():
    """Shapes are not checked: mistakes come as far as they do for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Detector(DETR(MODEL), CARD, "cpu", "fp32")


def refilled(buffer, pictures):
    """Yield the same buffer again and again, with another picture in it, as cameras do."""
    for picture in pictures:
        buffer[:] = picture
        yield buffer


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_buffer_may_be_filled_anew_while_others_are_looked_at(detector, kind):
    pictures = PICTURES if kind is np.asarray else torch.from_numpy(PICTURES).permute(0, 3, 1, 2).contiguous()
    alone = [detector.predict(picture) for picture in pictures]
    buffer = kind(pictures[0]).copy() if kind is np.asarray else pictures[0].clone()
    for found, expected in zip(detector.predict_many(refilled(buffer, pictures)), alone, strict=True):
        assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("path", ["folder", Path("folder")])
def test_one_path_is_not_several_pictures(unchecked, detector, path):
    with pytest.raises(InputError, match="takes several pictures, and folder is one path: give a list of paths"):
        detector.predict_many(path)


def test_nothing_to_look_at_gives_nothing(detector):
    assert detector.detect([]) == []


def test_the_caller_s_model_stays_as_it_is():
    model = DETR(MODEL).train().double()
    detector = Detector(model, CARD, "cpu", "fp32")
    assert model.training
    assert {each.dtype for each in model.parameters()} == {torch.float64}
    assert {each.dtype for each in detector.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_detector_can_be_pickled(detector, precision):
    detector = Detector(detector.model, CARD, "cpu", precision)
    copied = pickle.loads(pickle.dumps(detector))  # noqa: S301  just written
    assert torch.equal(copied.predict(PICTURES[0]).scores, detector.predict(PICTURES[0]).scores)


@pytest.mark.parametrize("device", [None, "nowhere"])
def test_a_device_that_is_none_is_refused(unchecked, device):
    with pytest.raises(InputError, match=f"--device {device} cannot be used here"):
        Detector(DETR(MODEL), CARD, device)


def test_other_projects_weights_are_to_be_converted(tmp_path):
    torch.save({"model": {}}, tmp_path / "fb.pth")
    save_file({"class_labels_classifier.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    for path in (tmp_path / "fb.pth", tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match="turn other weights into a model by lucidetr convert"):
            load(path)


def test_an_exported_file_is_not_refused_for_a_device_of_torch_s(unchecked):
    for device in ("cpu", torch.device("cpu")):
        with pytest.raises(InputError, match=r"a\.onnx: no such file"):
            load("a.onnx", device=device)
    with pytest.raises(InputError, match=r"--device None: a\.onnx is an exported model and runs on the cpu"):
        load("a.onnx", device=None)
