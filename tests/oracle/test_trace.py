"""The trace holds what the fast modules compute on the way, complete and under the expected names."""

from dataclasses import replace

import pytest
import torch

from lucidetr.reference.network import forward
from lucidetr.reference.norms import layer_norm

from .drawn import agree, build, image_batch, leaves
from .test_network import KINDS, SMALL

BATCH = image_batch(((41, 70), (65, 33)), (3, 1), 3, 5, torch.float64)


def run(config=SMALL, **options):
    return forward(leaves(build(config, seed=1)), config, BATCH.images, BATCH.padding, **options)


def named(module: torch.nn.Module) -> str:
    return type(module).__name__


@pytest.mark.parametrize(
    "kind",
    [
        "bottlenecks, frozen batch norm, DC5",
        "pre-norm, learned positions",
        "convnet, group norm, one stage",
        "anchors, refined, bells, pre-norm",
        "selected, refined twice",
        "no residual, anchors, refined, bells",
        "shared norm",
        "no positions",
        "positions at the input, learned",
        "no feed-forward",
    ],
)
def test_values_are_those_of_the_fast_modules(kind):
    config = KINDS[kind]
    model = build(config, seed=1).eval()
    fast, hidden = {}, []

    def keep(name, output):  # of a module used twice, what it said first
        fast.setdefault(name, output)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    model.decoder.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    model(BATCH.images, BATCH.padding)
    _, trace = run(config)

    fast["backbone"] = fast["backbone"][-1]
    same = {"backbone.stem": "backbone.stem.output", "backbone": "backbone", "projection": "projection"}
    same |= {"position": "position", "encoder": "memory"}
    blocks = ("Bottleneck", "BasicBlock", "Halving")
    same |= {n: f"{n}.output" for n, m in model.named_modules() if n.startswith("backbone") and named(m) in blocks}
    same |= {n: n for n in fast if n.endswith(".box_bias") and fast[n] is not None}
    same |= {n: f"{n}.after" for n, m in model.named_modules() if n.endswith("_path") and named(m) != "NoPart"}
    assert len(same) > 15
    for there, here in same.items():
        agree(fast[there], trace[here], here)
    assert len(hidden) == config.decoder_layers
    for layer, value in enumerate(hidden):
        agree(value, trace[f"decoder.layers.{layer}.hidden"], f"hidden {layer}")


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


def test_without_a_residual_only_the_part_is_passed_on():
    config = KINDS["no residual, anchors, refined, bells"]
    _, trace = run(config)
    state = leaves(build(config, seed=1))
    paths = [name.removesuffix(".added") for name in trace if name.endswith(".added")]
    assert len(paths) == 2 * (2 + 3)
    for path in paths:
        weight, bias = state[f"{path}.norm.weight"], state[f"{path}.norm.bias"]
        agree(layer_norm(trace[f"{path}.added"], weight, bias), trace[f"{path}.after"], path)


def test_without_a_residual_queries_without_content_stay_equal_until_they_look():
    _, trace = run(KINDS["no residual in the decoder"])
    after = trace["decoder.layers.0.self_attention_path.after"]
    agree(after, after[:, :1].expand_as(after), "every query")
    after = trace["decoder.layers.0.cross_attention_path.after"]
    assert after.std(dim=1).min() > 1e-6  # their positions look at different places


def test_one_norm_for_two_paths_and_none_for_the_heads():
    config = KINDS["shared norm"]
    _, trace = run(config)
    state = leaves(build(config, seed=1))
    assert not any(name.startswith("decoder.norm") for name in state)
    for layer in (f"decoder.layers.{index}" for index in range(2)):
        weight, bias = (
            state[f"{layer}.self_attention_path.norm.weight"],
            state[f"{layer}.self_attention_path.norm.bias"],
        )
        for path in ("self_attention_path", "cross_attention_path"):
            total = trace[f"{layer}.{path}.before"] + trace[f"{layer}.{path}.added"]
            agree(layer_norm(total, weight, bias), trace[f"{layer}.{path}.after"], path)
        before, added, after = (trace[f"{layer}.feed_forward_path.{name}"] for name in ("before", "added", "after"))
        agree(before + added, after, "an un-normed sum")
        agree(after, trace[f"{layer}.hidden"], "what the heads read")


def test_positions_at_the_input_are_added_once():
    config = KINDS["positions at the input, fused, selected, bells"]
    _, trace = run(config)
    state = leaves(build(config, seed=1))
    position = trace["position"].flatten(2).transpose(1, 2)
    assert position.abs().max() > 0.5
    agree(trace["encoder.layers.0.attention_path.before"], trace["tokens"] + position, "what enters the encoder")
    assert "fusion.position" not in trace
    for name, seen in (
        ("encoder.layers.1.attention", "encoder.layers.1.attention_path.before"),
        ("decoder.layers.0.cross_attention", "memory"),
    ):
        key = trace[seen] @ state[f"{name}.key.weight"].T + state[f"{name}.key.bias"]
        agree(trace[f"{name}.key"].transpose(1, 2).flatten(2), key, name)


def test_learned_contents_have_no_position():
    config = KINDS["learned contents"]
    _, trace = run(config)
    state = leaves(build(config, seed=1))
    agree(trace["queries.content"], state["queries.content"].expand(2, -1, -1), "content")
    name = "decoder.layers.0.self_attention"
    agree(trace[f"{name}_path.before"], trace["queries.content"], "what enters the decoder")
    query = trace["queries.content"] @ state[f"{name}.query.weight"].T + state[f"{name}.query.bias"]
    agree(trace[f"{name}.query"].transpose(1, 2).flatten(2), query, "queries")


def test_without_a_feed_forward_there_is_no_trace_of_it():
    _, trace = run(KINDS["no feed-forward"])
    assert not [name for name in trace if "feed_forward" in name]
    agree(trace["encoder.layers.1.attention_path.before"], trace["encoder.layers.0.attention_path.after"], "stream")
    agree(trace["memory"], trace["encoder.layers.1.attention_path.after"], "memory")


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


@pytest.mark.parametrize(
    "kind", ["anchors, refined, bells, pre-norm", "anchors, refined twice, distances to the sides"]
)
def test_every_layer_looks_from_the_box_of_the_one_before(kind):
    predictions, trace = run(KINDS[kind])
    layers = [f"decoder.layers.{layer}" for layer in range(2)]
    start = trace["queries.boxes_cxcywh"]
    for layer, came_from in zip(layers, (start, predictions.boxes_cxcywh[0]), strict=True):
        agree(trace[f"{layer}.reference_cxcywh"], came_from, "reference")
        assert trace[f"{layer}.query_position"].shape == (2, 6, 16)
        by_row, by_column = trace[f"{layer}.box_bias.y"], trace[f"{layer}.box_bias.x"]
        both = by_row[..., :, None] + by_column[..., None, :]
        agree(trace[f"{layer}.box_bias"], both.flatten(-2), "bias")
        weights = trace[f"{layer}.cross_attention.weights"]
        assert weights.shape == trace[f"{layer}.box_bias"].shape
        assert (weights.sum(-1) - 1).abs().max() < 1e-9


def test_selected_tokens_and_what_they_propose():
    predictions, trace = run(KINDS["selected, refined twice"])
    scores, chosen, hidden = trace["queries.scores"], trace["queries.chosen"], trace["padding"].flatten(1)
    assert hidden.any()
    assert (scores[hidden] == -torch.inf).all()
    for image in range(2):
        taken = chosen[image].tolist()
        assert len(set(taken)) == 6
        assert not hidden[image, taken].any()
        assert scores[image, taken].tolist() == sorted(scores[image].tolist(), reverse=True)[:6]
    agree(trace["queries.proposals.logits"], predictions.logits[0], "logits")
    agree(trace["queries.proposals.boxes_cxcywh"], predictions.boxes_cxcywh[0], "boxes")
    agree(trace["queries.proposals.logits"].amax(-1), scores.gather(1, chosen), "scores of the chosen")
    agree(trace["heads.0.boxes_cxcywh"], predictions.boxes_cxcywh[1], "boxes of the first layer")
    start = trace["decoder.layers.0.reference_cxcywh"]
    assert not start.requires_grad
    assert 0 <= start.min() <= start.max() <= 1


def test_groups_do_not_see_each_other():
    config = KINDS["groups of selected queries, bells, heads of their own"]
    predictions, trace = run(config, training=True)
    assert predictions.logits.shape == (6, 2, 6, 3)  # (proposals and two layers) of two groups
    weights = trace["decoder.layers.1.self_attention.weights"]
    assert weights.shape == (2, 3, 12, 12)
    assert weights[..., :6, 6:].abs().max() == weights[..., 6:, :6].abs().max() == 0
    assert weights[..., :6, :6].min() > 0
    agree(trace["heads.1.logits"][:, 6:], predictions.logits[5], "the last layer's second group")
    alone, _ = run(config, training=False)
    agree(alone.logits, predictions.logits[::2], "the first group")


def test_fused_maps():
    _, trace = run(KINDS["fused, group norm beside frozen batch norm"])
    assert trace["coarse"].shape == trace["projection"].shape == (2, 16, 3, 3)
    assert trace["fusion.0.output"].shape == (2, 16, 5, 5)
    assert trace["fusion.1.up"].shape == trace["fusion.1.output"].shape == (2, 16, 9, 9)
    assert trace["memory"].shape == (2, 81, 16)
    assert trace["fusion.padding"].shape == (2, 9, 9)
    assert trace["decoder.layers.0.cross_attention.weights"].shape[-1] == 81
