"""Weights through the run: how they are spread, how fast they move, and which units pass nothing back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure as Chart

from lucidetr.config import ModelConfig
from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, Section, chart
from lucidetr.inspection.parts import (
    FAMILIES,
    FEWEST_LOOKS,
    Line,
    PartCourse,
    block_of,
    course_of_parts,
    explained,
    family_of,
    is_vector,
    pooled_histogram,
    pooled_std,
)
from lucidetr.models.size import part_of

FASTEST, SLOWEST = 1e-1, 1e-6  # of an update, in shares of its weights: beyond these something is wrong
USUAL = {"adamw": (1e-3, "10⁻³"), "muon": (1e-2, "10⁻²")}  # of most parts; to ten times less or more is usual
SILENT = 0.5
BINS = 80
WIDTHS = 4.0  # standard deviations that are drawn to each side
COLOURS = ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan", "gray")  # of matplotlib's tab:
NO_STATISTICS = (
    "This run holds no statistics.jsonl: it was trained by a version that did not write it, or with --statistics 0. "
    "A run trained anew writes it by itself."
)


@dataclass(frozen=True, eq=False)
class Distribution:
    """Hold how the weights of a group of matrices are spread at some looks: shares of the bins between the edges."""

    steps: Int[np.ndarray, " look"]
    edges: Float[np.ndarray, " edge"]
    shares: Float[np.ndarray, "look bin"]


def group_of(name: str) -> str | None:
    """Return the group whose distribution a weight is drawn in, None for those that are not drawn.

    >>> group_of("encoder.layers.3.attention.key.weight"), group_of("heads.1.box.output.weight")
    ('encoder key', 'box head')
    >>> group_of("decoder.layers.0.feed_forward.expand.weight"), group_of("projection.weight")
    ('decoder', None)
    >>> group_of("decoder.layers.0.box_bias.x.output.weight")
    """
    if ".box_bias." in name:  # a few weights that may start a hundred times as large as all others: a chart of these
        return None
    _, part, piece = part_of(name)
    room = family_of(part)
    if room in ("backbone", "decoder"):
        return room
    matrix = piece.split(" ")[-1]
    if room == "encoder" and matrix in ("query", "key", "value"):
        return f"encoder {matrix}"
    return part if part == "box head" else None


def weight_distributions(statistics: Sequence[Line], looks: Sequence[int]) -> dict[str, Distribution]:
    """Return the distribution of every group's weights at some looks, four standard deviations to each side."""
    groups: dict[str, list[str]] = {}
    for name in statistics[0]["tensors"]:
        if not is_vector(name) and (group := group_of(name)):
            groups.setdefault(group, []).append(name)
    steps = np.array([statistics[look]["step"] for look in looks], dtype=np.int64)
    made = {}
    for group, names in groups.items():
        tensors = [[statistics[look]["tensors"][name] for name in names] for look in looks]
        width = WIDTHS * max(pooled_std(each, "weight") for each in tensors)
        edges = np.linspace(-width, width, BINS + 1) if width > 0 else np.linspace(-1, 1, BINS + 1)
        shares = np.stack([pooled_histogram(each, "weight", edges) for each in tensors])
        made[group] = Distribution(steps, edges, shares)
    return made


def draw_distributions(made: Chart, distributions: dict[str, Distribution]) -> None:
    """Draw a panel for each group, a line for each look."""
    columns = min(3, len(distributions))
    rows = -(-len(distributions) // columns)
    panels = np.atleast_1d(made.subplots(rows, columns, squeeze=False)).ravel()
    for axes, (group, each) in zip(panels, distributions.items(), strict=False):
        for step, shares, colour in zip(each.steps, each.shares, ("tab:gray", "tab:orange", "tab:blue"), strict=False):
            axes.stairs(100 * shares, each.edges, color=colour, label=f"step {step}", linewidth=1.3)
        axes.set(title=group, yticks=[])
        axes.grid(visible=False)
    for axes in panels[len(distributions) :]:
        axes.remove()
    panels[0].legend(fontsize=8)


def draw_over_steps(made: Chart, course: PartCourse, values: Float[np.ndarray, "look part"]) -> dict[str, Any]:
    """Draw each part faintly and each block's median boldly, a panel for each family; return the panels."""
    families: dict[str, dict[str, list[int]]] = {family: {} for family in FAMILIES}
    for column, part in enumerate(course.parts):
        if np.isfinite(values[:, column]).any():
            families[family_of(part)].setdefault(block_of(part), []).append(column)
    families = {family: blocks for family, blocks in families.items() if blocks}
    if not families:
        return {}
    grid = made.subplots(-(-len(families) // 2), min(2, len(families)), squeeze=False, sharex=True)
    marker = "o" if len(course.steps) < 3 else None
    panels = {}
    for axes, (family, blocks) in zip(grid.ravel(), families.items(), strict=False):
        for number, (block, columns) in enumerate(blocks.items()):
            colour, style = f"tab:{COLOURS[number % len(COLOURS)]}", ("-", "--", ":")[number // len(COLOURS) % 3]
            mine = values[:, columns]
            if len(columns) > 1:
                axes.plot(course.steps, mine, color=colour, alpha=0.25, linewidth=0.8)
            there = np.isfinite(mine).any(1)
            middle = np.nanmedian(mine[there], axis=1)
            axes.plot(course.steps[there], middle, style, color=colour, label=block, linewidth=1.6, marker=marker)
        axes.set_title(family)
        if any((values[:, columns] > 0).any() for columns in blocks.values()):
            axes.set_yscale("log", nonpositive="mask")
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))  # below, clear of the lines
        panels[family] = axes
    for axes in grid.ravel()[len(families) :]:
        axes.remove()
    made.supxlabel("optimiser step", fontsize=9)
    return panels


def draw_updates(made: Chart, course: PartCourse, usual: float) -> None:
    """Draw the update-to-weight ratio, with what is usual shaded."""
    for axes in draw_over_steps(made, course, course.update).values():
        axes.axhspan(usual / 10, usual * 10, color="tab:green", alpha=0.1, linewidth=0)


def draw_silent(made: Chart, course: PartCourse) -> None:
    """Draw the share of silent units, a row for each part in order of depth, a column for each look."""
    there = np.flatnonzero(np.isfinite(course.silent).any(0))
    axes = made.subplots()
    draw_looks(
        made, axes, course.steps, [course.parts[i] for i in there], 100 * course.silent[:, there].T, "%", (0, 100)
    )


def draw_looks(
    made: Chart,
    axes: Any,
    steps: Int[np.ndarray, " look"],
    parts: Sequence[str],
    values: Float[np.ndarray, "part look"],
    unit: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a table of numbers as colours: a row for each part, a column for each look."""
    low, high = limits or (None, None)
    drawn = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(len(parts)), parts, fontsize=7)
    shown = sorted({round(x) for x in np.linspace(0, len(steps) - 1, min(8, len(steps)))})
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    axes.set_xlabel("optimiser step")
    axes.grid(visible=False)
    made.colorbar(drawn, ax=axes, label=unit, fraction=0.04, pad=0.02)


def update_warnings(course: PartCourse, config: ModelConfig) -> tuple[str, ...]:
    """Return a sentence for each part whose middle update after the first look is beyond reason.

    Fewer than five looks tell nothing, and what `explained` names may stand still.
    """
    if len(course.update) < FEWEST_LOOKS:
        return ()
    said = []
    for part, updates in zip(course.parts, course.update.T, strict=True):
        if not np.isfinite(updates[1:]).any() or explained(part, config):
            continue
        middle = float(np.nanmedian(updates[1:]))
        last = float(updates[np.isfinite(updates)][-1])
        if middle > FASTEST < last:  # else it has only begun, from zero
            said.append(
                f"{part}: a step changes the weights by {middle:.1g} of their size; "
                "the rate is far too high for it, or its weights have shrunk to nothing."
            )
        elif middle < SLOWEST:
            said.append(f"{part}: a step changes the weights by only {middle:.1g} of their size: it does not learn.")
    return tuple(said)


def silent_warnings(course: PartCourse, config: ModelConfig) -> tuple[str, ...]:
    """Return a sentence for each part of which more than half of a layer's units are silent at each late look.

    Tables of which a batch reads only some rows (labels of hints, learned positions) are silent by nature, and so is
    what `explained` names. Fewer than five looks tell nothing.
    """
    if len(course.silent) < FEWEST_LOOKS:
        return ()
    said = []
    for part, shares in zip(course.parts, course.silent.T, strict=True):
        by_nature = part in ("hints", "positions of tokens") or explained(part, config)
        late = shares[len(shares) // 2 :]
        least = float(np.nanmin(late)) if np.isfinite(late).any() else 0.0
        if not by_nature and least > SILENT:
            said.append(
                f"{part}: in the run's second half at least {least:.0%} of one layer's units passed no gradient at "
                "each look, not always the same ones; those that stay silent are dead and only cost time."
            )
    return tuple(said)


def section(material: Material) -> Section:
    """Return the section on weights."""
    says = (
        "What training wrote down of the weights: matrices and kernels only, since biases and norms are of another "
        "size. In the charts over steps each part is a faint line and the median of a block a bold one."
    )
    if not material.statistics:
        return Section("Weights", NO_STATISTICS)
    course = course_of_parts(material.statistics)
    usual, in_words = USUAL[material.config.optimiser.matrices]
    distributions = weight_distributions(material.statistics, course.moments())
    figures = [
        Figure(
            "weights-distribution",
            "How the weights are spread, at the first look, in the middle and at the last",
            chart(9, 2.3 * -(-len(distributions) // 3), lambda made: draw_distributions(made, distributions)),
            "Boxes (uniform at the start) and bells around zero whose edges blur and widen with training. Three lines "
            "that coincide have learned little yet; a spike at zero is a part that decays to nothing.",
        ),
        Figure(
            "weights-std",
            "Standard deviation of the weights over the run",
            chart(9, 6.6, lambda made: draw_over_steps(made, course, course.weight_std)),
            "Slow growth that levels off as the rate falls; a line that keeps climbing is a part that runs away, a "
            "line that falls is one that weight decay eats.",
        ),
        Figure(
            "weights-update",
            "Update-to-weight ratio: length of a step over length of the weights",
            chart(9, 6.6, lambda made: draw_updates(made, course, usual)),
            f"About {in_words} at the peak of the rate (the shaded band is a tenth to ten times of it), falling with "
            "the rate; what starts at zero begins far above.",
            update_warnings(course, material.config.model),
        ),
        Figure(
            "weights-silent",
            "Silent units: share of the outputs of a part's worst layer that passed no gradient at all",
            chart(9, 0.8 + 0.15 * len(course.parts), lambda made: draw_silent(made, course)),
            "Dark everywhere, or bright only in the first column, where a layer behind starts at zero. A ReLU that is "
            "never above zero in a batch is bright: dead when it stays so.",
            silent_warnings(course, material.config.model),
        ),
    ]
    return Section("Weights", says, tuple(figures))
