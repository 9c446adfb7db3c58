"""Models that other projects cannot build are refused in their formats, with the setting that does not fit."""

from dataclasses import replace

import pytest

from lucidetr.categories import Categories
from lucidetr.config import BackboneConfig, ImageConfig, ModelCard, ModelConfig
from lucidetr.conversion.convert import export_facebook, export_hugging_face
from lucidetr.errors import InputError
from lucidetr.models.detr import DETR

MODEL = ModelConfig(
    backbone=BackboneConfig(name="resnet18"),
    num_classes=2,
    d_model=16,
    num_heads=2,
    head_dim=8,
    feed_forward=24,
    encoder_layers=1,
    decoder_layers=1,
    num_queries=3,
)


@pytest.mark.parametrize("export", [export_facebook, export_hugging_face])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder_block": "no_residual", "decoder_block": "no_residual"}, "no_residual|its blocks are post_norm"),
        ({"decoder_block": "shared_norm"}, "encoder_block and decoder_block differ|its blocks are post_norm"),
        ({"position": "none"}, "position is none"),
        ({"position": "octaves"}, "position is octaves"),
        ({"position_at": "input"}, "position_at is input"),
        ({"queries": "content"}, "queries is content"),
        ({"feed_forward": 0}, "feed_forward is 0"),
        ({"classification": "sigmoid"}, "classification is sigmoid"),
    ],
)
def test_a_model_that_tensors_do_not_show_is_refused(export, changes, said, tmp_path):
    model = replace(MODEL, **changes)
    card = ModelCard(model, ImageConfig(), Categories(ids=(1, 2), names=("a", "b")), "converted")
    with pytest.raises(InputError, match=f"cannot build this model: .*({said})"):
        export(DETR(model).state_dict(), card, tmp_path / "out")


def test_a_start_is_no_other_model(tmp_path):
    card = ModelCard(
        replace(MODEL, initialisation="xavier", residual_start="zero"),
        ImageConfig(),
        Categories(ids=(1, 2), names=("a", "b")),
        "converted",
    )
    export_facebook(DETR(card.model).state_dict(), card, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").is_file()
