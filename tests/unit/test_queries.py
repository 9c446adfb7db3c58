"""What the decoder starts from: anchors, the tokens that look most like objects, groups that do not see each other."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lucid_tools import TINY
from lucidetr.layers.box_bias import Grid
from lucidetr.layers.positions import cell_centres
from lucidetr.models.detr import DETR
from lucidetr.models.memory import Memory
from lucidetr.models.queries import SILENT, AnchorQueries, ScoredQueries, SelectedQueries
from lucidetr.structures import Predictions

D = TINY.d_model
SELECTED = replace(TINY, queries="selected", boxes="refined")
SCORED = replace(SELECTED, queries="scored")
ANCHORS = replace(TINY, queries="anchors", boxes="refined")
LEARNED = replace(TINY, queries="learned", boxes="absolute", box_bias="none")


def remember(padding, seed=0):
    """Return random tokens of a grid as memory."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(padding), padding[0].numel(), D, generator=generator)
    return Memory(tokens, tokens, padding.flatten(1), Grid(*cell_centres(padding, torch.float32)))


def unpadded(batch=2, height=3, width=4):
    return torch.zeros(batch, height, width, dtype=torch.bool)


def padded():
    """Return the padding of two images of 3 × 5 cells, the second one smaller: six of its cells are its own."""
    padding = unpadded(2, 3, 5)
    padding[1, 2:], padding[1, :, 3:] = True, True
    return padding


def selecting(**changes):
    """Return queries whose scores and boxes are spread out."""
    torch.manual_seed(1)
    queries = SelectedQueries(replace(SELECTED, **changes))
    nn.init.normal_(queries.box.output.weight, std=0.3)
    return queries


def test_the_best_scored_tokens_are_chosen_best_first_and_never_padded_ones():
    queries, memory = selecting(num_queries=4), remember(padded())
    start = queries(memory)
    tokens = queries.norm(queries.project(memory.tokens))
    score = queries.category(tokens).amax(-1)
    assert memory.padding[1][score[1].topk(4).indices].any()  # unmasked, padding would have been among the best
    for image in range(2):
        inside = [t for t in range(15) if not memory.padding[image, t]]
        best = sorted(inside, key=lambda t: -score[image, t].item())[:4]
        torch.testing.assert_close(start.content[image], tokens[image, best])
        torch.testing.assert_close(start.proposals.logits[0, image], queries.category(tokens)[image, best])
        anchors = torch.cat([memory.grid.centres()[image, best], torch.full((4, 2), 0.2)], dim=-1)
        delta = queries.box(tokens[image : image + 1, best])[0]
        centre = anchors[:, :2] + delta[:, :2] * 0.2
        expected = torch.cat([centre, 0.2 * delta[:, 2:].exp()], dim=-1)
        torch.testing.assert_close(start.proposals.boxes_cxcywh[0, image], expected)


def test_where_a_picture_has_too_few_tokens_padding_says_nothing_and_comes_last():
    queries, memory = selecting(num_queries=9), remember(padded())
    proposals = queries(memory).proposals.logits[0, 1]  # nine queries for six tokens
    assert (proposals[:6] > -30).all()
    assert (proposals[6:] == SILENT).all()


def test_a_token_that_has_learned_nothing_proposes_a_fifth_of_the_picture_around_itself_and_rarely_an_object():
    start = SelectedQueries(SELECTED)(remember(unpadded()))
    boxes = start.proposals.boxes_cxcywh[0]
    assert torch.equal(boxes[..., 2:], torch.full_like(boxes[..., 2:], 0.2))
    cells = {(round(x * 4 - 0.5, 4), round(y * 3 - 0.5, 4)) for x, y in boxes[0, :, :2].tolist()}
    assert cells <= {(x, y) for x in range(4) for y in range(3)}
    assert len(cells) == SELECTED.num_queries
    assert SelectedQueries(SELECTED).category.bias.sigmoid().tolist() == pytest.approx([0.01] * TINY.num_classes)


def test_fewer_tokens_than_queries_are_all_taken():
    start = selecting(num_queries=50)(remember(unpadded(2, 2, 3)))
    assert start.content.shape == (2, 6, D)
    assert start.proposals.logits.shape == (1, 2, 6, TINY.num_classes)


def test_start_boxes_are_clamped_and_carry_no_gradient_but_content_and_proposals_do():
    queries = selecting(num_queries=12)
    with torch.no_grad():
        queries.box.output.weight.zero_()
        queries.box.output.bias.copy_(torch.tensor([4.0, -4.0, 2.0, -9.0]))  # off the picture, too wide, too low
    start = queries(remember(unpadded()))
    centre, size = start.boxes_cxcywh.split(2, dim=-1)
    assert centre.min() == 0
    assert centre.max() == 1
    assert (size[..., 0] == 1).all()
    torch.testing.assert_close(size[..., 1], torch.full_like(size[..., 1], 0.01))
    proposed = start.proposals.boxes_cxcywh[0]
    torch.testing.assert_close(proposed[..., 2], torch.full_like(proposed[..., 2], 0.2 * torch.e**2))
    assert proposed[..., 0].max() > 1 > 0 > proposed[..., 1].min()
    assert not start.boxes_cxcywh.requires_grad

    def reached(value):
        gradients = torch.autograd.grad(value, list(queries.parameters()), retain_graph=True, allow_unused=True)
        return {name for (name, _), g in zip(queries.named_parameters(), gradients, strict=True) if g is not None}

    weights = torch.randn(D)
    assert "project.weight" in reached((start.content * weights).sum())
    assert {"box.output.bias", "project.weight"} <= reached(start.proposals.boxes_cxcywh.square().sum())
    assert {"category.weight", "project.weight"} <= reached(start.proposals.logits.square().sum())


def test_scored_queries_hear_the_box_and_the_score_of_their_token_and_nothing_else_of_it():
    torch.manual_seed(1)
    scored, selected = ScoredQueries(replace(SCORED, num_queries=50)), selecting(num_queries=50)
    selected.load_state_dict(scored.state_dict(), strict=False)
    memory = remember(padded())
    start, other = scored(memory), selected(memory)
    assert torch.equal(start.boxes_cxcywh, other.boxes_cxcywh)
    assert torch.equal(start.proposals.logits, other.proposals.logits)
    scores = other.proposals.logits[0].amax(-1)
    for image, query in ((0, 0), (0, 3), (1, 2)):
        expected = scored.base + scores[image, query] * scored.by_score
        torch.testing.assert_close(start.content[image, query], expected)
    gradients = torch.autograd.grad(start.content.square().sum(), list(scored.parameters()), allow_unused=True)
    learn = {name for (name, _), g in zip(scored.named_parameters(), gradients, strict=True) if g is not None}
    assert learn == {"base", "by_score"}


def test_anchors_are_the_same_for_every_image_and_lie_in_the_picture():
    torch.manual_seed(0)
    queries = AnchorQueries(replace(ANCHORS, num_queries=40))
    start = queries(remember(unpadded()))
    assert start.position is None
    assert start.proposals is None
    for image in range(2):
        torch.testing.assert_close(start.boxes_cxcywh[image], 1 / (1 + (-queries.box).exp()))
        assert torch.equal(start.content[image], queries.content)
    centre, size = start.boxes_cxcywh.split(2, dim=-1)
    assert 0.1 <= centre.min() < 0.3 < 0.7 < centre.max() <= 0.9
    torch.testing.assert_close(size, torch.full_like(size, 0.2))


@pytest.mark.parametrize("boxes", ["relative", "refined", "refined_twice"])
def test_anchors_learn_from_the_first_layer_s_box(boxes):
    model, images, padding = build(replace(ANCHORS, boxes=boxes, box_bias="none"))
    nn.init.zeros_(model.decoder.position.output.weight)  # the only other way from an anchor to a prediction
    model(images, padding).boxes_cxcywh[0].sum().backward()
    assert (model.queries.box.grad.abs() > 0).all()


def build(config, seed=0):
    """Return a model whose parameters are all off their start, and a batch with padding."""
    torch.manual_seed(seed)
    model = DETR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images, padding = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 72:], images[1, :, :, 72:] = True, 0
    return model, images, padding


def test_proposals_are_the_first_layer_of_the_predictions():
    model, images, padding = build(SELECTED)
    predictions = model(images, padding)
    assert predictions.logits.shape == (TINY.decoder_layers + 1, 2, TINY.num_queries, TINY.num_classes)
    start = model.queries(model.encode(model.backbone(images), padding))
    torch.testing.assert_close(predictions.logits[0], start.proposals.logits[0])
    torch.testing.assert_close(predictions.boxes_cxcywh[0], start.proposals.boxes_cxcywh[0])
    assert not torch.allclose(predictions.logits[1], predictions.logits[0])


def test_the_ranking_learns_from_the_proposals_alone():
    model, images, padding = build(SELECTED)
    predictions = model(images, padding)
    predictions.logits[1:].square().sum().backward(retain_graph=True)
    assert not model.queries.category.weight.grad.any()
    predictions.logits[0].square().sum().backward()
    assert model.queries.category.weight.grad.abs().sum() > 0


GROUPED = [replace(config, query_groups=3) for config in (LEARNED, ANCHORS, SELECTED, SCORED)]


@pytest.mark.parametrize("config", GROUPED, ids=lambda c: c.queries)
def test_groups_do_not_see_each_other(config):
    model, images, padding = build(config)
    before = model(images, padding)
    with torch.no_grad():
        for parameter in model.queries[1].parameters():
            parameter += torch.randn_like(parameter)
    after = model(images, padding)
    layers = TINY.decoder_layers + config.selects
    assert len(before.logits) == layers * 3
    for row in range(layers * 3):
        same = torch.equal(before.logits[row], after.logits[row])
        assert same == (row % 3 != 1), f"row {row}: group {row % 3} after layer {row // 3}"


@pytest.mark.parametrize("config", GROUPED, ids=lambda c: c.queries)
def test_row_l_times_groups_plus_g_is_what_group_g_says_and_the_first_group_alone_predicts(config):
    model, images, padding = build(config)
    together = model(images, padding)
    model.eval()
    for group in range(3):
        model.queries[0].load_state_dict(build(config)[0].queries[group].state_dict())
        alone = model(images, padding)
        torch.testing.assert_close(alone.logits, together.logits[group::3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.boxes_cxcywh, together.boxes_cxcywh[group::3], rtol=1e-4, atol=1e-5)


def test_one_group_has_no_number_in_its_names():
    assert "queries.category.weight" in DETR(SELECTED).state_dict()
    assert "queries.2.category.weight" in DETR(replace(SELECTED, query_groups=3)).state_dict()


def test_groups_become_layers_of_their_own():
    said = torch.arange(2 * 1 * 6, dtype=torch.float32).view(2, 1, 6, 1)  # two layers, three groups of two queries
    rows = Predictions(said, said.expand(-1, -1, -1, 4)).groups_as_layers(3)
    assert rows.logits[:, 0, :, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert rows.boxes_cxcywh[:, 0, :, 3].tolist() == rows.logits[:, 0, :, 0].tolist()
