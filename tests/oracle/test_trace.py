"""The trace holds what the fast modules compute on the way, complete and under the expected names."""

from dataclasses import replace

import pytest
import torch

from lucidetr.reference.network import forward

from .drawn import agree, build, image_batch, leaves
from .test_network import KINDS, SMALL

BATCH = image_batch(((41, 70), (65, 33)), (3, 1), 3, 5, torch.float64)


def run(config=SMALL, **options):
    return forward(leaves(build(config, seed=1)), config, BATCH.images, BATCH.padding, **options)


@pytest.mark.parametrize("kind", ["bottlenecks, frozen batch norm, DC5", "pre-norm, learned positions"])
def test_values_are_those_of_the_fast_modules(kind):
    config = KINDS[kind]
    model = build(config, seed=1).eval()
    fast = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: fast.update({name: output}))
    model(BATCH.images, BATCH.padding)
    _, trace = run(config)

    same = {"backbone.stem": "backbone.stem.output", "backbone": "backbone", "projection": "projection"}
    same |= {"position": "position", "encoder": "memory"}
    same |= {n: f"{n}.output" for n in fast if n.startswith("backbone.stages.") and n.count(".") == 3}
    same |= {n: f"{n}.after" for n in fast if n.endswith("_path")}
    assert len(same) > 20
    for there, here in same.items():
        agree(fast[there], trace[here], here)
    for layer, hidden in enumerate(fast["decoder"]):
        agree(hidden, trace[f"decoder.layers.{layer}.hidden"], f"hidden {layer}")


def test_attention_of_every_layer_and_head():
    predictions, trace = run()
    kinds = ["encoder.layers.{}.attention", "decoder.layers.{}.self_attention", "decoder.layers.{}.cross_attention"]
    names = [f"{kind.format(layer)}.weights" for kind in kinds for layer in range(2)]
    assert {name for name in trace if name.endswith(".weights")} == set(names)
    hidden = trace["padding"].flatten(1)
    assert hidden.any()
    for name in names:
        weights = trace[name]
        assert weights.shape[:2] == (2, SMALL.num_heads)
        agree(weights.sum(-1), torch.ones_like(weights[..., 0]), name)
        if "self_" not in name:
            unseen = hidden[:, None, None, :].expand_as(weights)
            assert (weights[unseen] == 0).all()
            assert (weights[~unseen] > 0).all()
    for layer in range(2):
        assert torch.equal(trace[f"heads.{layer}.logits"], predictions.logits[layer])
        assert torch.equal(trace[f"heads.{layer}.boxes_cxcywh"], predictions.boxes_cxcywh[layer])


def test_the_stream_is_the_sum_of_what_was_added():
    config = replace(SMALL, encoder_block="pre_norm")
    _, trace = run(config)
    stream = trace["encoder.layers.0.attention_path.before"]
    for layer in range(config.encoder_layers):
        for path in ("attention_path", "feed_forward_path"):
            agree(trace[f"encoder.layers.{layer}.{path}.before"], stream, "before")
            stream = stream + trace[f"encoder.layers.{layer}.{path}.added"]
            agree(trace[f"encoder.layers.{layer}.{path}.after"], stream, "after")


def test_keep_limits_the_trace():
    everything = list(run()[1])
    some = list(run(keep=["encoder.layers.1", "memory"])[1])
    assert some == [name for name in everything if name.startswith("encoder.layers.1.") or name == "memory"]
    asked = list(run(keep=lambda name: name.endswith(".weights"))[1])
    assert asked == [name for name in everything if name.endswith(".weights")]
    assert not run(keep=())[1]


def test_gradient_of_a_box_at_a_kept_value():
    predictions, trace = run()
    weights = trace["decoder.layers.1.cross_attention.weights"]
    (gradient,) = torch.autograd.grad(predictions.boxes_cxcywh[-1, 0, 0, 0], weights)
    assert gradient[0, :, 0].abs().max() > 0
    assert gradient[1].abs().max() == 0  # another picture's attention does not matter
