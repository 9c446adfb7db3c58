"""What the queries begin with: a place of their own, a box, or the best guesses of the picture's tokens.

(DETR, section 3.2; DAB-DETR, Liu et al. 2022, section 4; two-stage Deformable DETR, Zhu et al. 2021, section 4.2; DINO,
Zhang et al. 2023, section 3.4.)
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lucidetr.reference.boxes import move
from lucidetr.reference.elementary import linear, relu, sigmoid
from lucidetr.reference.norms import layer_norm
from lucidetr.reference.positions import cell_centres
from lucidetr.reference.scope import Scope
from lucidetr.reference.transformer import Memory
from lucidetr.structures import Hints, Predictions

ANCHOR_SIDE = 0.2  # a token's guess starts from a fifth of the picture
SMALLEST_SIDE = 0.01  # of a start box: moves are in units of its sides
SILENT = -50.0  # the logit of a token that is padding, so that, as costs are weighed, any other is chosen first


@dataclass(frozen=True, eq=False)
class Start:
    """Hold what queries bring along: content, and a position (learned queries and contents) or a box (the others).

    `proposals` is what selected tokens said before the decoder, supervised as a layer of its own. The queries may be
    several groups, as many in each, side by side.
    """

    content: Float[Tensor, "batch query d_model"]
    position: Float[Tensor, "batch query d_model"] | None = None
    boxes_cxcywh: Float[Tensor, "batch query 4"] | None = None
    proposals: Predictions | None = None
    groups: int = 1


def queries(here: Scope, memory: Memory) -> Start:
    """Return the start of all groups, side by side; one group's weights carry no number.

    Only the first group outlives training.
    """
    kinds = {"learned": learned, "content": contents, "anchors": anchors, "selected": selected, "scored": scored}
    begin = kinds[here.config.queries]
    if here.config.query_groups == 1:
        return begin(here, memory)
    groups = here.config.query_groups if here.training else 1
    return side_by_side([begin(here.inside(group), memory) for group in range(groups)])


def hinted(here: Scope, hints: Hints, number: int) -> Start:
    """Return queries that start from noised truths: the box as it is, a learned vector for the label.

    (Denoising: Li et al. 2022.) They learn what to do with a box that is nearly right, before the others can say one.
    """
    labels, boxes = hints.labels[:, :number], hints.boxes_cxcywh[:, :number]
    return Start(content=here["label.weight"][labels], boxes_cxcywh=boxes)


def side_by_side(starts: list[Start]) -> Start:
    """Return the starts joined along the query axis, group 0 first.

    >>> group = Start(content=torch.zeros(1, 3, 8), boxes_cxcywh=torch.zeros(1, 3, 4))
    >>> both = side_by_side([group, group])
    >>> both.content.shape, both.boxes_cxcywh.shape, both.position, both.groups
    (torch.Size([1, 6, 8]), torch.Size([1, 6, 4]), None, 2)
    """
    groups = sum(start.groups for start in starts)
    sizes = {start.content.shape[1] / start.groups for start in starts}
    assert len(sizes) == 1, f"groups of {sizes} queries: all must be of one size"

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        """Return the parts that are there in one."""
        there = [part for part in parts if part is not None]
        return torch.cat(there, dim=-2) if there else None

    proposals = [start.proposals for start in starts if start.proposals is not None]
    return Start(
        content=torch.cat([start.content for start in starts], dim=-2),
        position=joined([start.position for start in starts]),
        boxes_cxcywh=joined([start.boxes_cxcywh for start in starts]),
        proposals=Predictions(
            logits=torch.cat([said.logits for said in proposals], dim=-2),
            boxes_cxcywh=torch.cat([said.boxes_cxcywh for said in proposals], dim=-2),
            tokens=all_layers([said.tokens for said in proposals if said.tokens is not None]),
        )
        if proposals
        else None,
        groups=groups,
    )


def all_layers(parts: list[Predictions]) -> Predictions | None:
    """Return the layers of all parts one after the other, None where there is no part."""
    if not parts:
        return None
    return Predictions(
        logits=torch.cat([part.logits for part in parts]),
        boxes_cxcywh=torch.cat([part.boxes_cxcywh for part in parts]),
    )


def learned(here: Scope, memory: Memory) -> Start:
    """Return no content yet, and learned positions, equal for every picture (the paper's queries)."""
    position = here.record("position", here["position"].expand(len(memory.tokens), -1, -1))
    return Start(content=torch.zeros_like(position), position=position)


def contents(here: Scope, memory: Memory) -> Start:
    """Return learned content, equal for every picture, and no position: only the stream says which query is which."""
    start = here.record("content", here["content"].expand(len(memory.tokens), -1, -1))
    return Start(content=start, position=torch.zeros_like(start))


def anchors(here: Scope, memory: Memory) -> Start:
    """Return learned content and learned boxes, equal for every picture."""
    batch = len(memory.tokens)
    boxes = here.record("boxes_cxcywh", sigmoid(here["box"]).expand(batch, -1, -1))
    return Start(content=here["content"].expand(batch, -1, -1), boxes_cxcywh=boxes)


def selected(here: Scope, memory: Memory) -> Start:
    """Return the tokens that look most like an object: they are the content, their guessed boxes the start.

    Guesses are learned where they are supervised, as proposals; the decoder takes its start boxes as given.
    """
    x = layer_norm(
        linear(memory.tokens, here["project.weight"], here["project.bias"]), here["norm.weight"], here["norm.bias"]
    )
    padding = memory.padding.flatten(1)
    logits = silenced(linear(x, here["category.weight"], here["category.bias"]), padding)
    anchors = token_anchors(memory)
    taught = here.config.teach_tokens and here.training
    all_say = of_all_tokens(here, x, anchors, padding) if taught else None
    scores = here.record("scores", torch.where(padding, -torch.inf, logits.detach().amax(dim=-1)))
    tokens = here.record("chosen", best(scores, here.config.num_queries))
    content, chosen_logits, chosen_anchors = (pick(each, tokens) for each in (x, logits, anchors))
    proposed = guessed_boxes(here.inside("box"), content, chosen_anchors)
    proposals = Predictions(
        logits=here.record("proposals.logits", chosen_logits)[None],
        boxes_cxcywh=here.record("proposals.boxes_cxcywh", proposed)[None],
        tokens=all_say,
    )
    boxes = here.record("boxes_cxcywh", within(proposed.detach()))
    return Start(content=content, boxes_cxcywh=boxes, proposals=proposals)


def scored(here: Scope, memory: Memory) -> Start:
    """Return the selected tokens' boxes and proposals; of what the tokens are, queries hear the score alone.

    So they must look at the picture to say what is there. The score, the logit of a token's best class, comes without
    gradient, as the boxes do.
    """
    start = selected(here, memory)
    assert start.proposals is not None
    score = start.proposals.logits[0].detach().amax(dim=-1)
    content = here.record("content", here["base"] + score[:, :, None] * here["by_score"])
    return replace(start, content=content)


def guessed_boxes(
    here: Scope, x: Float[Tensor, "batch token d_model"], anchors: Float[Tensor, "batch token 4"]
) -> Float[Tensor, "batch token 4"]:
    """Return each token's anchor, moved as two layers say."""
    hidden = relu(linear(x, here["hidden.weight"], here["hidden.bias"]))
    return move(anchors, linear(hidden, here["output.weight"], here["output.bias"]))


def of_all_tokens(
    here: Scope,
    x: Float[Tensor, "batch token d_model"],
    anchors: Float[Tensor, "batch token 4"],
    padding: Bool[Tensor, "batch token"],
) -> Predictions:
    """Return what every token says, as one layer: in training each object teaches several tokens.

    (One to many: Jia et al. 2023, section 3.2.) Classes have weights of their own. What is padding says nothing, at no
    place, and learns nothing.
    """
    logits = linear(x, here["taught_category.weight"], here["taught_category.bias"])
    boxes = guessed_boxes(here.inside("box"), x, anchors)
    return Predictions(
        logits=here.record("taught.logits", silenced(logits, padding))[None],
        boxes_cxcywh=here.record("taught.boxes_cxcywh", torch.where(padding[:, :, None], 0.0, boxes))[None],
    )


def silenced(
    logits: Float[Tensor, "batch token category"], padding: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token category"]:
    """Return the logits, of padding so low that it comes after every token, and says nothing where it is chosen.

    >>> silenced(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]), torch.tensor([[False, True]])).tolist()
    [[[1.0, 2.0], [-50.0, -50.0]]]
    """
    return torch.where(padding[:, :, None], SILENT, logits)


def best(scores: Float[Tensor, "batch token"], most: int) -> Int[Tensor, "batch query"]:
    """Return the numbers of the `most` tokens with the highest scores, best first; of all, where there are fewer.

    >>> best(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2).tolist()
    [[1, 3]]
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :most]


def pick(values: Float[Tensor, "batch token _"], tokens: Int[Tensor, "batch query"]) -> Float[Tensor, "batch query _"]:
    """Return the rows of the chosen tokens, image by image.

    >>> pick(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[2, 0]])).tolist()
    [[[3.0], [1.0]]]
    """
    image = torch.arange(len(values), device=values.device)
    return values[image[:, None], tokens]


def token_anchors(memory: Memory) -> Float[Tensor, "batch token 4"]:
    """Return a box of a fifth of the picture around the middle of every token's cell."""
    rows, columns = cell_centres(memory.padding, memory.tokens.dtype)
    y = rows[:, :, None].expand(memory.padding.shape)
    x = columns[:, None, :].expand(memory.padding.shape)
    side = torch.full_like(x, ANCHOR_SIDE)
    return torch.stack([x, y, side, side], dim=-1).flatten(1, 2)


def within(boxes_cxcywh: Float[Tensor, "batch query 4"]) -> Float[Tensor, "batch query 4"]:
    """Return the boxes with their centres inside the picture, and sides that are neither nothing nor larger than it.

    >>> within(torch.tensor([[[-0.5, 0.5, 0.0, 3.0]]], dtype=torch.float64)).tolist()
    [[[0.0, 0.5, 0.01, 1.0]]]
    """
    centre = boxes_cxcywh[..., :2].clamp(min=0.0, max=1.0)
    return torch.cat([centre, boxes_cxcywh[..., 2:].clamp(min=SMALLEST_SIDE, max=1.0)], dim=-1)
