"""Where a model looks: attention of the encoder and of the queries over the picture (DETR, figures 3 and 6)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from lucidetr.inspection import matching
from lucidetr.inspection.material import Material
from lucidetr.inspection.microscope import View, kept, look
from lucidetr.inspection.page import Figure, Section, chart, fewer_colours, ink_of, lay_out, outline, sized, written
from lucidetr.models.postprocess import class_scores

UNIFORM = 0.95  # of the largest entropy: as good as looking everywhere
SILENT = 0.9  # of a feed-forward's hidden units
AWAY = 0.05  # of the way from what chance gives to a query's own box to all of its attention
SIDE = 128  # pixels of a picture under a heatmap, 3 times that of one by itself
Spreads = dict[str, Float[np.ndarray, " head"]]  # by layer
Silent = dict[str, Bool[np.ndarray, " _"]]
TAB = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def attention_of_point(view: View, layer: int, x: float, y: float) -> Float[np.ndarray, "grid_h grid_w"]:
    """Return where the encoder's token at a point looks, the mean of the heads; x and y are fractions of the picture.

    A point on the border belongs to the cell right or below, or to the last.
    """
    rows, columns = view.encoder_grid
    row, column = (min(int(part * number), number - 1) for part, number in ((y, rows), (x, columns)))
    return view.encoder_attention[layer].mean(0)[row * columns + column].reshape(rows, columns)


def attention_of_query(
    view: View, layer: int, query: int, head: int | None = None
) -> Float[np.ndarray, "grid_h grid_w"]:
    """Return where a query looks in one decoder layer, by one head or the mean of all."""
    of_heads = view.cross_attention[layer, :, query]
    return (of_heads.mean(0) if head is None else of_heads[head]).reshape(view.memory_grid)


def spread(weights: Float[np.ndarray, "*any key"]) -> Float[np.ndarray, "*any"]:
    """Return the entropy of attention as a share of the largest possible: 0 one place alone, 1 everywhere alike.

    >>> spread(np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])).tolist()
    [1.0, 0.5, 0.0]
    """
    information = np.where(weights > 0, -np.log(np.where(weights > 0, weights, 1.0)), 0.0)
    return (weights * information).sum(-1) / max(np.log(weights.shape[-1]), 1e-12)


def spreads(view: View) -> Spreads:
    """Return how spread the attention of every layer is, by name and head: of all tokens, of the kept queries."""
    each = {f"encoder layer {i + 1}": spread(weights).mean(-1) for i, weights in enumerate(view.encoder_attention)}
    drawn = kept(view)
    return each | {f"decoder layer {i + 1}": spread(w[:, drawn]).mean(-1) for i, w in enumerate(view.cross_attention)}


def in_own_boxes(view: View) -> Float[np.ndarray, " decoder_layer_and_one"]:
    """Return how much of their attention the kept queries give to their own boxes, in each decoder layer, a mean.

    The last number is the share of the cells that lie there: what attention that goes everywhere would give. A box has
    all cells that it touches, and is that of the last layer.
    """
    queries, (rows, columns) = kept(view), view.memory_grid
    x, y, width, height = view.boxes_cxcywh[-1, queries, :, None].swapaxes(0, 1)
    in_column = np.abs((np.arange(columns) + 0.5) / columns - x) <= (width + 1 / columns) / 2
    in_row = np.abs((np.arange(rows) + 0.5) / rows - y) <= (height + 1 / rows) / 2
    inside = (in_row[:, :, None] & in_column[:, None, :]).reshape(len(queries), -1)
    shares = (view.cross_attention[:, :, queries].mean(1) * inside).sum(-1).mean(-1)
    return np.append(shares, inside.mean())


def course_of_scores(view: View, queries: Sequence[int]) -> Float[np.ndarray, "layer query"]:
    """Return what every layer gives to the class that each query says in the end."""
    scores = class_scores(torch.from_numpy(view.logits).double(), len(view.categories)).numpy()
    return np.stack([scores[:, query, view.labels[-1, query]] for query in queries], axis=1)


def some_layers(total: int, most: int = 3) -> list[int]:
    """Return the layers to draw: all, or the first, the last and some between.

    >>> some_layers(2), some_layers(6), some_layers(0)
    ([0, 1], [0, 2, 5], [])
    """
    return sorted({int(layer) for layer in np.linspace(0, total - 1, most)}) if total > most else list(range(total))


def points_of(view: View, most: int = 4) -> list[tuple[float, float]]:
    """Return the middles of the largest objects, or of the kept boxes where there is no object."""
    boxes = view.objects_cxcywh if len(view.objects_cxcywh) else view.boxes_cxcywh[-1][kept(view)]
    largest = np.argsort(-(boxes[:, 2] * boxes[:, 3]), kind="stable")[:most]
    return [(min(max(float(x), 0.0), 1.0), min(max(float(y), 0.0), 1.0)) for x, y in boxes[largest, :2]]


def small(view: View, side: int, grey: bool = False) -> Shaped[np.ndarray, "height width ..."]:
    """Return the picture, `side` pixels long, in few colours, which keeps a report's pictures small."""
    picture = sized(view.image, side)
    return np.asarray(picture.convert("L")) // 8 * 8 if grey else fewer_colours(picture)


def show(axes: Any, view: View, heat: np.ndarray | None = None) -> None:
    """Draw the picture, in grey under a heatmap where there is one; places are fractions of the picture."""
    place = {"extent": (0, 1, 1, 0), "interpolation": "none"}
    if heat is None:
        axes.imshow(small(view, 3 * SIDE), **place)
    else:
        axes.imshow(small(view, SIDE, grey=True), cmap="gray", vmin=0, vmax=255, **place)
        axes.imshow(heat, cmap="inferno", vmin=0, alpha=0.6, **place)
    lay_out(axes, *view.image.shape[:2])


def draw_found(axes: Any, view: View, queries: Sequence[int]) -> None:
    """Draw what the queries say in the end."""
    show(axes, view)
    for query in reversed(queries):
        label = int(view.labels[-1, query])
        caption = f"{written(view.categories.names[label])} {view.scores[-1, query]:.2f}"
        outline(axes, view.boxes_cxcywh[-1, query], ink_of(label), caption, linewidth=1.5)
    axes.set_title("found", fontsize=9)


def draw_truth(axes: Any, view: View) -> None:
    """Draw the objects as they are in the data."""
    show(axes, view)
    for box, label in zip(view.objects_cxcywh, view.object_labels.tolist(), strict=True):
        outline(axes, box, ink_of(label), written(view.categories.names[label]), linewidth=1.5)
    axes.set_title("true", fontsize=9)


def draw_encoder_attention(drawn: Any, view: View, layers: Sequence[int]) -> None:
    """Draw where the tokens in the middle of some objects look: a row for each layer, a column for each point."""
    points = points_of(view)
    panels = drawn.subplots(len(layers), len(points), squeeze=False)
    for row, layer in zip(panels, layers, strict=True):
        for axes, (x, y) in zip(row, points, strict=True):
            show(axes, view, attention_of_point(view, layer, x, y))
            axes.plot(x, y, marker="+", color="tab:cyan", markersize=9, markeredgewidth=2)
        row[0].set_ylabel(f"layer {layer + 1}")


def draw_cross_attention(drawn: Any, view: View, queries: Sequence[int], layers: Sequence[int]) -> None:
    """Draw where queries look, the mean of the heads: a row for each layer, a column for each query."""
    panels = drawn.subplots(len(layers), len(queries), squeeze=False)
    first = int(view.has_proposals)
    for row, layer in zip(panels, layers, strict=True):
        for axes, query in zip(row, queries, strict=True):
            show(axes, view, attention_of_query(view, layer, query))
            outline(axes, view.boxes_cxcywh[first + layer, query], "tab:cyan")
        row[0].set_ylabel(f"layer {layer + 1}")
    for axes, query in zip(panels[0], queries, strict=True):
        axes.set_title(f"query {query}: {written(view.categories.names[view.labels[-1, query]])}", fontsize=8)


def draw_heads(drawn: Any, view: View, query: int) -> None:
    """Draw where each head of one query looks in the last decoder layer."""
    heads = view.cross_attention.shape[1]
    panels = drawn.subplots(-(-heads // 8), min(heads, 8), squeeze=False).ravel()
    for axes in panels[heads:]:
        axes.set_axis_off()
    for head, axes in enumerate(panels[:heads]):
        show(axes, view, attention_of_query(view, -1, query, head))
        outline(axes, view.boxes_cxcywh[-1, query], "tab:cyan")
        axes.set_title(f"head {head + 1}", fontsize=8)


def draw_boxes_by_layer(axes: Any, view: View, queries: Sequence[int]) -> None:
    """Draw how each query's box moves: faint and dotted what it starts from, then bolder layer by layer."""
    show(axes, view)
    rows = list(view.boxes_cxcywh[:, queries])
    if view.reference_cxcywh is not None and not view.has_proposals:
        rows = [view.reference_cxcywh[0, queries], *rows]
    for row, boxes in enumerate(rows):
        done = (row + 1) / len(rows)
        style = {"linestyle": ":" if row == 0 and view.reference_cxcywh is not None else "-"}
        for rank, box in enumerate(boxes):
            outline(axes, box, TAB[rank % len(TAB)], alpha=0.2 + 0.8 * done**2, linewidth=0.5 + 1.5 * done**2, **style)


def draw_classes_by_layer(axes: Any, view: View, queries: Sequence[int]) -> None:
    """Draw the score of each query's final class after every layer."""
    for rank, course in enumerate(course_of_scores(view, queries).T):
        name = written(view.categories.names[view.labels[-1, queries[rank]]])
        axes.plot(course, color=TAB[rank % len(TAB)], marker="o", markersize=3, label=f"query {queries[rank]}: {name}")
    axes.set_xticks(range(len(view.logits)), view.row_names, rotation=30, ha="right")
    axes.set(ylim=(-0.02, 1.02), ylabel="score of the final class")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def draw_spreads(axes: Any, means: Spreads) -> None:
    """Draw how spread every head's attention is, layer by layer."""
    for place, (name, heads) in enumerate(means.items()):
        ink = "tab:blue" if name.startswith("encoder") else "tab:orange"
        axes.plot([place] * len(heads), heads, linestyle="", marker="o", markersize=4, alpha=0.6, color=ink)
        axes.plot([place - 0.3, place + 0.3], [heads.mean()] * 2, color=ink)
    axes.axhline(UNIFORM, color="tab:red", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(means)), list(means), rotation=30, ha="right")
    axes.set(ylim=(-0.02, 1.02), ylabel="entropy, share of the largest")


def draw_silent(axes: Any, shares: dict[str, float]) -> None:
    """Draw the share of every feed-forward's hidden units that no picture woke."""
    colours = ["tab:blue" if name.startswith("encoder") else "tab:orange" for name in shares]
    axes.bar(range(len(shares)), list(shares.values()), color=colours)
    axes.axhline(SILENT, color="tab:red", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(shares)), list(shares), rotation=30, ha="right")
    axes.set(ylim=(0, 1.02), ylabel="silent hidden units, share")
    axes.grid(visible=False, axis="x")


def panels(view: View, rows: int, columns: int, draw: Callable[[Any], None]) -> Any:
    """Return a chart of that many small copies of the picture."""
    height, width = view.image.shape[:2]
    side = min(10 / columns, 2.2)
    return chart(side * columns + 0.3, (min(side * height / width, 4.0) + 0.25) * rows, draw)


def figures_of(view: View) -> list[Figure]:
    """Return the figures of one picture."""
    best, every = kept(view), kept(view, most=None)
    decoder_layers = some_layers(len(view.cross_attention))
    height, width = view.image.shape[:2]
    figures = [
        Figure(
            name="found",
            title="found and true",
            chart=chart(8, min(4 * height / width, 6) + 0.3, lambda drawn: draw_beside(drawn, view, every)),
            healthy="Every object has one box of its class, and nothing else has any.",
        ),
        Figure(
            name="layers",
            title="boxes and classes, layer by layer",
            chart=chart(9, min(4 * height / width, 6) + 0.3, lambda drawn: draw_by_layer(drawn, view, best)),
            healthy="Boxes settle after a layer or two; scores of objects rise and those of everything else fall.",
        ),
        Figure(
            name="cross-attention",
            title="where queries look",
            chart=panels(
                view,
                len(decoder_layers),
                len(best),
                lambda drawn: draw_cross_attention(drawn, view, best, decoder_layers),
            ),
            healthy="A query looks at its own object, in the paper's late layers at its borders, where boxes are read.",
        ),
        Figure(
            name="heads",
            title=f"where each head of query {best[0]} looks in the last layer",
            chart=panels(
                view,
                -(-view.cross_attention.shape[1] // 8),
                min(view.cross_attention.shape[1], 8),
                lambda drawn: draw_heads(drawn, view, best[0]),
            ),
            healthy="Heads differ: each watches another side or another part of the object.",
        ),
    ]
    if encoder_layers := some_layers(len(view.encoder_attention), most=2):
        drawing = panels(
            view,
            len(encoder_layers),
            len(points_of(view)),
            lambda drawn: draw_encoder_attention(drawn, view, encoder_layers),
        )
        healthy = (
            "In the paper's figure 3 a token within an object looks at that object: the encoder tells objects apart. "
            "Where tokens themselves are taught, they can do well without."
        )
        figures.insert(2, Figure("encoder-attention", "where tokens look", drawing, healthy))
    named = [
        replace(each, name=f"picture-{view.image_id}-{each.name}", title=f"Image {view.image_id}: {each.title}")
        for each in figures
    ]
    matched = matching.figure(view)
    return [*named, matched] if matched else named


def draw_beside(drawn: Any, view: View, queries: Sequence[int]) -> None:
    """Draw found and true side by side."""
    found, true = drawn.subplots(1, 2)
    draw_found(found, view, queries)
    draw_truth(true, view)


def draw_by_layer(drawn: Any, view: View, queries: Sequence[int]) -> None:
    """Draw the way of boxes and of classes through the layers side by side."""
    boxes, classes = drawn.subplots(1, 2)
    draw_boxes_by_layer(boxes, view, queries)
    draw_classes_by_layer(classes, view, queries)


def uniform(means: Spreads) -> list[str]:
    """Return a sentence for each layer whose attention goes everywhere alike, and so tells no place from another."""
    return [
        f"{name}: attention has {heads.mean():.1%} of the largest entropy: it is nearly the same everywhere, "
        + ("a mean of the whole picture." if name.startswith("encoder") else "so queries do not look at objects.")
        for name, heads in means.items()
        if heads.mean() > UNIFORM
    ]


def own_boxes(shares: Sequence[Float[np.ndarray, " decoder_layer_and_one"]]) -> Figure:
    """Return the figure of how much of their attention queries give to the boxes that they find."""
    *layers, chance = np.mean(shares, axis=0).tolist()
    names = [f"layer {i + 1}" for i in range(len(layers))]

    def draw(drawn: Any) -> None:
        axes = drawn.subplots()
        axes.bar(names, layers, width=0.5)
        axes.axhline(chance, color="tab:red", linestyle="--", linewidth=1)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of the attention")

    away = [
        f"decoder {name}: {share:.1%} of the queries' attention lies in their boxes, as do {chance:.1%} of the cells: "
        "they do not look at what they found."
        for name, share in zip(names, layers, strict=True)
        if share - chance < AWAY * (1 - chance)
    ]
    return Figure(
        name="pictures-own-boxes",
        title="All pictures: how much of a query's attention lies in its own box",
        chart=chart(5, 3.2, draw),
        healthy="Bars stand well above the dashed line, which is what attention gives that goes everywhere alike. "
        "Selected queries can do without: their tokens know what lies there. Then the maps below mean little.",
        warnings=tuple(away),
    )


def common(spreads: list[Spreads], silent: list[Silent]) -> Figure:
    """Return the figure of what the pictures have in common: mean spread of attention, units that none of them woke."""
    means = {name: np.mean([each[name] for each in spreads], axis=0) for name in spreads[0]}
    shares = {name: float(np.all([each[name] for each in silent], axis=0).mean()) for name in silent[0]}

    def draw(drawn: Any) -> None:
        entropy, hidden = drawn.subplots(1, 2)
        draw_spreads(entropy, means)
        draw_silent(hidden, shares)

    quiet = [
        f"{name}: {share:.0%} of the feed-forward's hidden units are 0 at every place of every picture shown."
        for name, share in shares.items()
        if share > SILENT
    ]
    return Figure(
        name="pictures-spread",
        title="All pictures: how spread attention is, and what stays silent",
        chart=chart(10, 3.2, draw),
        healthy="Attention that has learned something goes to few places: a dot is a head, the line their mean; 1 is "
        "everywhere alike, and above the dashed line nearly so. Some hidden units sleep on a few pictures; where a bar "
        "reaches the dashed line, hardly any are awake.",
        warnings=(*uniform(means), *quiet),
    )


def section(material: Material) -> Section:
    """Return what the model does with some pictures, one by one, and what they have in common."""
    figures: list[Figure] = []
    spread_of: list[Spreads] = []
    silent: list[Silent] = []
    own: list[np.ndarray] = []
    for index in material.pictures:
        view = look(material.model, material.card, material.dataset, index, material.config.loss)
        figures += figures_of(view)
        spread_of.append(spreads(view))
        silent.append(view.silent)
        own.append(in_own_boxes(view))
    return Section(
        title="Pictures",
        says=f"Some pictures of the {material.split} through the model, with everything that it computes on the way. "
        "Queries are shown that found something (score of at least 0.5; beside the truth all, else the best six), or "
        "the best three.",
        figures=(common(spread_of, silent), own_boxes(own), *figures) if figures else (),
    )
