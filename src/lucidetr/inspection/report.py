"""The report: every section of a run on one HTML page that needs nothing but itself."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lucidetr.inspection.material import Material
from lucidetr.inspection.page import Figure, Section, as_svg, save_chart
from lucidetr.training.checkpoint import write_atomically

# modules of this folder with a function section(material), in reading order: a new section is one file and one line
SECTIONS = ("course", "weights", "gradients", "attention", "queries", "errors", "layers", "card")
TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Warned:
    """Hold a warning and where it stands in the page."""

    id: str
    text: str


@dataclass(frozen=True, eq=False)
class Part:
    """Hold a section as the template reads it."""

    id: str
    section: Section
    own: list[Warned]  # of the section as a whole
    figures: list[dict[str, Any]]
    tables: list[tuple[str, list[str], list[list[str]]]]  # caption, head (empty: none), rows

    @property
    def warnings(self) -> list[Warned]:
        """Return all warnings of the section."""
        return [*self.own, *(each for figure in self.figures for each in figure["warnings"])]


def make_sections(material: Material, progress: Callable[[str], None] = lambda name: None) -> dict[str, Section]:
    """Compute and draw every section, by the name of its module."""
    made = {}
    for name in SECTIONS:
        progress(name)
        made[name] = import_module(f"lucidetr.inspection.{name}").section(material)
    return made


def write_report(
    material: Material,
    out: Path,
    save_figures: Path | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[Path, list[str]]:
    """Write the page, and every figure as PNG and SVG where a folder is given; return the file and all warnings."""
    sections = make_sections(material, progress)
    if save_figures:
        for section in sections.values():
            for figure in section.figures:
                save_chart(figure, save_figures)
    write_atomically(out, render(material, sections).encode(errors="backslashreplace"))
    return out, [f"{each.title}: {text}" for each in sections.values() for text in warnings_of(each)]


def warnings_of(section: Section) -> list[str]:
    """Return the warnings of a section and of its figures."""
    return [*section.warnings, *(text for figure in section.figures for text in figure.warnings)]


def render(material: Material, sections: dict[str, Section]) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    parts = [lay_out(name, section) for name, section in sections.items()]
    card, name = material.card, material.run.resolve().name
    return template.render(
        title=f"{name}: inside a run of {card.recipe}",
        description=f"{card.recipe} trained on {material.config.data or material.config.train_json}, "
        f"looked at on {material.dataset.name}.",
        facts=summary(material),
        parts=parts,
        number=sum(len(part.warnings) for part in parts),
    )


def summary(material: Material) -> list[tuple[str, str]]:
    """Return the few numbers that stand on top."""
    metrics = material.evaluation
    seconds = max((line["seconds"] for line in material.metrics if "seconds" in line), default=0.0)
    parameters = sum(parameter.numel() for parameter in material.model.parameters())
    said = {name: "–" if (value := metrics.numbers[name]) is None else f"{value:.3f}" for name in ("AP", "AP50")}
    return [
        ("AP", said["AP"]),
        ("AP50", said["AP50"]),
        ("images looked at", f"{metrics.images:,}"),
        ("training", f"{seconds / 60:.1f} min"),
        ("step of this model", f"{material.card.step:,}"),
        ("parameters", f"{parameters / 1e6:.2f} M"),
    ]


def lay_out(name: str, section: Section) -> Part:
    """Return a section as the template reads it, every id of its own."""
    own = _numbered(f"{name}-warning", section.warnings)
    figures = [_figure(figure) for figure in section.figures]
    tables = [(caption, _head(head), rows) for caption, (head, *rows) in section.tables if rows]
    return Part(name, section, own, figures, tables)


def _head(cells: list[str]) -> list[str]:
    """Return a table's head, nothing where it has no words."""
    return cells if any(cells) else []


def _figure(figure: Figure) -> dict[str, Any]:
    """Return a figure as the template reads it."""
    from markupsafe import Markup

    anchor = f"figure-{figure.name}"
    return {
        "id": anchor,
        "title": figure.title,
        "svg": Markup(as_svg(figure.chart, anchor, figure.title)),  # noqa: S704 (matplotlib has escaped every text)
        "width": round(72 * figure.chart.get_figwidth()),
        "healthy": figure.healthy,
        "warnings": _numbered(f"{anchor}-warning", figure.warnings),
    }


def _numbered(stem: str, texts: Iterable[str]) -> list[Warned]:
    """Return warnings with ids."""
    return [Warned(f"{stem}-{number}", text) for number, text in enumerate(texts, start=1)]
