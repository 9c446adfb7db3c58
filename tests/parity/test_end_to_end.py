"""From JPEG files to boxes in pixels, each side with its own decoding, resizing, padding and postprocessing."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import DetrForObjectDetection, DetrImageProcessor

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, ModelCard, ModelConfig
from lucidetr.conversion.convert import convert, export_hugging_face
from lucidetr.data.decoding import as_image
from lucidetr.data.preprocessing import make_batch, prepare
from lucidetr.models.detr import DETR
from lucidetr.models.postprocess import postprocess

CARD = ModelCard(
    model=ModelConfig(
        backbone=BackboneConfig(name="resnet18", width=32),
        num_classes=6,
        d_model=64,
        num_heads=4,
        head_dim=16,
        feed_forward=96,
        encoder_layers=2,
        decoder_layers=2,
        num_queries=20,
    ),
    images=ImageConfig(size=200, max_size=300),
    categories=Categories(ids=tuple(range(6)), names=tuple("abcdef")),
    recipe="converted",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Wide, upright, so long that the longer side limits it, and smaller than what it is resized to."""
    folder = tmp_path_factory.mktemp("pictures")
    china, flower = (Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
    pictures = {
        "wide": china,
        "upright": flower.crop((100, 20, 391, 403)),
        "long": china.crop((0, 100, 640, 233)),
        "small": flower.resize((151, 101)),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.jpg", quality=92)
    return [folder / f"{name}.jpg" for name in pictures]


def detections(predictions, sizes, files):
    """Ours, but in the order of the queries, to compare one by one."""
    found = postprocess(predictions, sizes, CARD.categories)
    order = predictions.logits[-1].softmax(-1)[..., :-1].amax(-1).argsort(descending=True, stable=True)
    return [
        (d.boxes_xyxy[o.argsort()], d.scores[o.argsort()], d.labels[o.argsort()])
        for d, o in zip(found, order, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("resize", ["shortest", "square"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "one padded batch"])
def test_boxes_in_pixels_agree(together, resize, files, randomised, tmp_path):
    card = replace(CARD, images=replace(CARD.images, resize=resize))
    export_hugging_face(randomised(lambda: DETR(card.model)).state_dict(), card, tmp_path)
    theirs = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    processor = DetrImageProcessor.from_pretrained(tmp_path)
    converted = convert(tmp_path)
    ours = DETR(converted.card.model).eval()
    ours.load_state_dict(converted.state)
    images = converted.card.images
    for group in [files] if together else [[file] for file in files]:
        pictures = [Image.open(file) for file in group]
        sizes = [(picture.height, picture.width) for picture in pictures]
        inputs = processor(images=pictures, return_tensors="pt")
        expected = processor.post_process_object_detection(theirs(**inputs), threshold=0.0, target_sizes=sizes)
        batch = make_batch([prepare(as_image(file), images) for file in group], images)
        assert batch.images.shape == inputs["pixel_values"].shape
        found = detections(ours(batch.images, batch.padding), batch.sizes, group)
        for (boxes, scores, labels), answer in zip(found, expected, strict=True):
            pixels = (boxes - answer["boxes"]).abs().max().item()
            chances = (scores - answer["scores"]).abs().max().item()
            print(f"largest difference of boxes {pixels:.1e} pixels, of scores {chances:.1e}")
            assert boxes.std(0).min() > 1  # in pixels: the queries do not all say the same
            assert pixels <= 1.0
            assert chances <= 1e-2
            assert torch.equal(labels, answer["labels"])
