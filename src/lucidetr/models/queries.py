"""The object queries: what the decoder starts from (DETR, section 3.2), and alternatives to the paper's."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lucidetr.config import ModelConfig
from lucidetr.layers.feed_forward import TwoLayers
from lucidetr.models.heads import PRIOR_BIAS, move
from lucidetr.models.memory import Memory
from lucidetr.structures import Hints, Predictions

ANCHOR_SIDE = 0.2  # of the picture: the box of a token before anything is learned
SMALLEST_START = 0.01
SILENT = -50.0  # a logit so low that, as costs are weighed, any other token is chosen first


@dataclass(frozen=True, eq=False)
class Start:
    """Hold what the decoder starts from: content, a position (the paper) or a box, and the proposals, if any.

    Proposals hold what all other tokens said, too, where those are taught.
    """

    content: Float[Tensor, "batch query d_model"]
    position: Float[Tensor, "batch query d_model"] | None = None
    boxes_cxcywh: Float[Tensor, "batch query 4"] | None = None
    proposals: Predictions | None = None  # one layer, supervised like those of the decoder


class LearnedQueries(nn.Module):
    """Start every query with empty content and its own learned position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.position = nn.Parameter(torch.randn(config.num_queries, config.d_model))

    def forward(self, memory: Memory) -> Start:
        """Return content and position of the queries, the same for every image."""
        position = self.position.expand(memory.tokens.shape[0], -1, -1)
        return Start(content=torch.zeros_like(position), position=position)


class ContentQueries(nn.Module):
    """Start every query with its own learned content and no position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.content = nn.Parameter(torch.randn(config.num_queries, config.d_model))

    def forward(self, memory: Memory) -> Start:
        """Return content and position of the queries, the same for every image."""
        content = self.content.expand(memory.tokens.shape[0], -1, -1)
        return Start(content=content, position=torch.zeros_like(content))


class AnchorQueries(nn.Module):
    """Start every query with its own learned box and content (Liu et al. 2022, DAB-DETR)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        centres = 0.1 + 0.8 * torch.rand(config.num_queries, 2)
        sizes = torch.full((config.num_queries, 2), ANCHOR_SIDE)
        self.box = nn.Parameter(torch.cat([centres, sizes], dim=1).logit())
        self.content = nn.Parameter(torch.randn(config.num_queries, config.d_model))

    def forward(self, memory: Memory) -> Start:
        """Return content and boxes of the queries, the same for every image."""
        batch = memory.tokens.shape[0]
        boxes = self.box.sigmoid().expand(batch, -1, -1)
        return Start(content=self.content.expand(batch, -1, -1), boxes_cxcywh=boxes)


class SelectedQueries(nn.Module):
    """Start from the tokens that score highest as objects, with their predicted boxes (Zhu et al. 2021, two-stage).

    These proposals are matched and supervised like a decoder layer's predictions, and so the ranking is learned.
    The decoder gets the boxes without gradient, the content with it.

    With `teach_tokens`, every token says a class and a box in training, and each object teaches several of them (one to
    many: Jia et al. 2023; Zong et al. 2023). The class has weights of its own: those that select go on learning one to
    one, or the best tokens would all be of the same object.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.project = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.category = nn.Linear(config.d_model, config.num_classes)
        nn.init.constant_(self.category.bias, PRIOR_BIAS)
        self.box = TwoLayers(config.d_model, config.d_model, 4)  # by how much a token would move its anchor
        nn.init.zeros_(self.box.output.weight)
        nn.init.zeros_(self.box.output.bias)
        self.taught_category = nn.Linear(config.d_model, config.num_classes) if config.teach_tokens else None
        if self.taught_category is not None:
            nn.init.constant_(self.taught_category.bias, PRIOR_BIAS)

    def forward(self, memory: Memory) -> Start:
        """Return the best tokens' content and boxes, best first, and the proposals; fewer if there are fewer tokens."""
        tokens = self.norm(self.project(memory.tokens))
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.to(self.category.weight.dtype)
            logits = self.category(tokens).masked_fill(memory.padding[..., None], SILENT)
            score = logits.amax(-1)  # padding becomes queries only where a picture has too few tokens, and says nothing
            enough = tokens.shape[1] >= self.num_queries  # not min(): so an exported graph has a fixed number
            chosen = score.topk(self.num_queries if enough else tokens.shape[1], dim=1).indices
            centres = memory.grid.centres()
            anchors = torch.cat([centres, torch.full_like(centres, ANCHOR_SIDE)], dim=-1)
            all_say = self.of_all(tokens, anchors, memory.padding) if self.training else None
            content, logits, anchors = (pick(each, chosen) for each in (tokens, logits, anchors))
            boxes = move(anchors, self.box(content))
        centre, size = boxes.detach().split(2, dim=-1)
        start = torch.cat([centre.clamp(0, 1), size.clamp(SMALLEST_START, 1.0)], dim=-1)
        proposals = Predictions(logits=logits[None], boxes_cxcywh=boxes[None], tokens=all_say)
        return Start(content, boxes_cxcywh=start, proposals=proposals)

    def of_all(
        self,
        tokens: Float[Tensor, "batch token d_model"],
        anchors: Float[Tensor, "batch token 4"],
        padding: Bool[Tensor, "batch token"],
    ) -> Predictions | None:
        """Return what all tokens say, as one layer, if they are taught; padding says nothing, and learns nothing."""
        if self.taught_category is None:
            return None
        logits = self.taught_category(tokens).masked_fill(padding[..., None], SILENT)
        boxes = move(anchors, self.box(tokens)).masked_fill(padding[..., None], 0.0)
        return Predictions(logits=logits[None], boxes_cxcywh=boxes[None])


class ScoredQueries(SelectedQueries):
    """Start from the selected tokens' boxes and scores (logits of their best class), not from what they are.

    A query must look at the picture to say what is there. (After mixed query selection, Zhang et al. 2023, DINO, where
    content is learned for each rank; a score says more than a rank, and goes with any number of queries.)
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        # what a query of logit 0 starts from: little, so that what it sees soon outweighs it
        self.base = nn.Parameter(0.3 * torch.randn(config.d_model))
        self.by_score = nn.Parameter(torch.randn(config.d_model) / 8)

    def forward(self, memory: Memory) -> Start:
        """Return content that follows the score alone, the best tokens' boxes, best first, and the proposals."""
        start = super().forward(memory)
        assert start.proposals is not None
        score = start.proposals.logits[0].detach().amax(-1, keepdim=True)
        return replace(start, content=self.base + score * self.by_score)


def pick(values: Float[Tensor, "batch token channel"], chosen: Tensor) -> Float[Tensor, "batch query channel"]:
    """Return the chosen tokens' values, in the order chosen."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))


QUERIES = {
    "learned": LearnedQueries,
    "content": ContentQueries,
    "anchors": AnchorQueries,
    "selected": SelectedQueries,
    "scored": ScoredQueries,
}


class GroupedQueries(nn.ModuleList):
    """Start several groups of queries side by side when training, the first alone afterwards (Chen et al. 2023).

    Every group has its own parameters and is matched by itself, so each object supervises one query of every group.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(QUERIES[config.queries](config) for _ in range(config.query_groups))

    def forward(self, memory: Memory) -> Start:
        """Return the groups' starts, one after the other along the query axis."""
        return side_by_side([queries(memory) for queries in (self if self.training else [self[0]])])


class HintQueries(nn.Module):
    """Start a group of queries from noised truths: the label's learned content, the noised box.

    The group is matched and supervised like any other, so the decoder learns from the first step what to do with a
    query near an object.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.label = nn.Embedding(config.num_classes, config.d_model)

    def forward(self, hints: Hints, number: int) -> Start:
        """Return content and boxes of the first `number` hints."""
        return Start(content=self.label(hints.labels[:, :number]), boxes_cxcywh=hints.boxes_cxcywh[:, :number])


def side_by_side(groups: list[Start]) -> Start:
    """Return groups of queries as one start, one after the other; all proposals as layers of their own."""
    proposals = [group.proposals for group in groups if group.proposals]
    return Start(
        content=torch.cat([group.content for group in groups], dim=1),
        position=joined([group.position for group in groups]),
        boxes_cxcywh=joined([group.boxes_cxcywh for group in groups]),
        proposals=Predictions.stacked(proposals) if proposals else None,
    )


def joined(parts: list[Tensor | None]) -> Tensor | None:
    """Return the groups' values joined along the query axis; None if there are none."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim=1) if there else None


def build_queries(config: ModelConfig) -> nn.Module:
    """Return the queries that the config names."""
    return GroupedQueries(config) if config.query_groups > 1 else QUERIES[config.queries](config)
