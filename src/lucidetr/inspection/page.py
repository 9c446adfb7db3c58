"""What a report is made of: figures with a caption, and sections; and how a chart becomes part of a page.

Charts are SVG drawn without a background and in the page's own text colour, so that one file is right in light and in
dark. Pictures are PNG inside the SVG.
"""

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Chart

INK = "#1d1e21"  # stands for the page's text colour until the SVG is written
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # letters stay letters: they can be searched, and the page's font draws them
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
LONGEST = 40  # letters of a category's name in a figure


@dataclass(frozen=True, eq=False)
class Figure:
    """Hold one figure of a report.

    `healthy` is one sentence on what a healthy run looks like here, `warnings` what is not so in this run.
    """

    name: str  # of its file, when figures are saved: letters, digits, dashes
    title: str
    chart: Chart
    healthy: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Section:
    """Hold one section of a report: figures, and tables as rows of text whose first row is the head."""

    title: str
    says: str  # a sentence or two before the figures
    figures: tuple[Figure, ...] = ()
    tables: tuple[tuple[str, list[list[str]]], ...] = ()  # caption and rows
    warnings: tuple[str, ...] = ()


def written(name: str) -> str:
    """Return a category's name as matplotlib draws it: $ is no formula, _ at the start does not hide it, and it fits.

    >>> written("_background_"), written("cat"), written("a" * 50) == "a" * 39 + "…"
    (' _background_', 'cat', True)
    """
    short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    return (" " if name.startswith("_") else "") + short.replace("$", r"\$")


def chart(width: float, height: float, draw: Callable[[Chart], Any]) -> Chart:
    """Return a chart of that many inches on which `draw` has drawn, in the style of all reports."""
    with mpl.rc_context(STYLE):
        made = Chart(figsize=(width, height), layout="constrained")
        draw(made)
    return made


def as_svg(made: Chart, name: str = "chart", title: str = "") -> str:
    """Return the chart as an SVG element of an HTML page: it takes its ink from the page and scales with its column.

    `title` is what a screen reader says. Only ids that are referred to are kept, and begin with `name`, so that many
    charts share a page; numbers are cut to hundredths of a point.
    """
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        made.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;?|(?<=px) 'DejaVu Sans'[^;\"]*", "", svg)  # the page's font
    svg = re.sub(r'( d=")([^"]*)', lambda found: found[1] + re.sub(r"(\.\d\d)\d+", r"\1", found[2]), svg)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box
    label = html.escape(title, quote=True)
    return f'<svg {box[0]} role="img" aria-label="{label}">' + own_ids(body, name)


def own_ids(svg: str, name: str) -> str:
    """Drop the ids that nothing refers to, and let the others begin with a name.

    >>> own_ids('<g id="a"/><path id="b"/><use href="#b"/><g clip-path="url(#b)"/>', "one")
    '<g/><path id="one-b"/><use href="#one-b"/><g clip-path="url(#one-b)"/>'
    """
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    named = {each for pair in used for each in pair if each}

    def kept(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in named else ""

    svg = re.sub(r' id="([^"]+)"', kept, svg)
    return re.sub(r'href="#|url\(#', lambda found: f"{found[0]}{name}-", svg)


def save_chart(figure: Figure, folder: Path) -> None:
    """Write a figure as PNG and as SVG on white, named by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for kind in ("png", "svg"):
            figure.chart.savefig(folder / f"{figure.name}.{kind}", dpi=150, facecolor="white")
