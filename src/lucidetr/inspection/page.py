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
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure as Chart
from matplotlib.patches import Rectangle
from PIL import Image

from lucidetr.drawing import colour

INK = "#1d1e21"  # stands for the page's text colour until the SVG is written
TAG = re.compile(r"<[^>]+>")
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # letters stay letters: they can be searched, and the page's font draws them
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,  # the grid lies behind bars
    "grid.alpha": 0.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
EDGE = 0.06  # of a picture: so near to its top a caption has no room above its box
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


def ink_of(label: int) -> tuple[float, float, float]:
    """Return a label's colour as matplotlib reads it."""
    red, green, blue = colour(label)
    return red / 255, green / 255, blue / 255


def outline(axes: Any, box_cxcywh: np.ndarray, ink: Any, caption: str = "", **line: Any) -> None:
    """Draw one box in fractions of a picture whose axes go from 0 to 1, and a caption on it, inside at the top edge."""
    x, y, width, height = box_cxcywh.tolist()
    left, top, right = x - width / 2, y - height / 2, x + width / 2
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=ink, **line))
    if caption:
        late = left > 0.8  # a caption that begins here would run over the right edge
        corner = min(right, 1.0) if late else max(left, 0.0), max(top, 0.0)
        at = {"ha": "right" if late else "left", "va": "top" if top < EDGE else "bottom"}
        back = {"facecolor": ink, "edgecolor": "none", "pad": 1}
        axes.text(*corner, caption, color="black", fontsize=7, bbox=back, clip_on=True, **at)


def lay_out(axes: Any, height: int, width: int) -> None:
    """Make axes those of a picture: places are fractions of it, from its upper left corner."""
    axes.set(aspect=height / width, xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    axes.grid(visible=False)


def sized(image: UInt8[np.ndarray, "height width 3"], side: int) -> Image.Image:
    """Return a picture whose longer side has that many pixels."""
    picture = Image.fromarray(image)
    scale = side / max(picture.size)
    return picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))


def fewer_colours(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Return a picture with 32 steps for each of red, green and blue: as PNG half as large, and no eye sees it."""
    return np.asarray(picture) // 8 * 8 + 4


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
    svg = TAG.sub(lambda tag: shortened(tag[0]), svg)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box
    label = html.escape(title, quote=True)
    return f'<svg {box[0]} role="img" aria-label="{label}">' + own_ids(body, name)


def shortened(tag: str) -> str:
    """Return a tag without its font, which is the page's, and with numbers of a path cut to hundredths.

    >>> shortened('<path d="M 1.23456 7">')
    '<path d="M 1.23 7">'
    """
    tag = re.sub(r" font-family: [^;\"]*;?|(?<=px) 'DejaVu Sans'[^;\"]*", "", tag)
    return re.sub(r'( d=")([^"]*)', lambda found: found[1] + re.sub(r"(\.\d\d)\d+", r"\1", found[2]), tag)


def own_ids(svg: str, name: str) -> str:
    """Drop the ids that nothing refers to, and let the others begin with a name; what is written between tags stays.

    >>> own_ids('<g id="a"/><path id="b"/><use href="#b"/><text clip-path="url(#b)">id="3" of url(#b)</text>', "one")
    '<g/><path id="one-b"/><use href="#one-b"/><text clip-path="url(#one-b)">id="3" of url(#b)</text>'
    """
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', " ".join(TAG.findall(svg))))
    named = {each for pair in used for each in pair if each}

    def kept(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in named else ""

    def renamed(tag: re.Match[str]) -> str:
        return re.sub(r'href="#|url\(#', lambda found: f"{found[0]}{name}-", re.sub(r' id="([^"]+)"', kept, tag[0]))

    return TAG.sub(renamed, svg)


def save_chart(figure: Figure, folder: Path) -> None:
    """Write a figure as PNG and as SVG on white, named by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for kind in ("png", "svg"):
            figure.chart.savefig(folder / f"{figure.name}.{kind}", dpi=150, facecolor="white")
