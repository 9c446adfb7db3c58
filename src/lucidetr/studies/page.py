"""What a study leaves behind: a Markdown page with figures beside it, and how these are drawn."""

import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lucidetr.studies.experiment import Plan, Result

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
BARS = "A bar is the mean over the seeds, its whisker their standard deviation, and each dot one seed."


@dataclass(frozen=True)
class Page:
    """Hold what a study says: a question, figures (file and caption), tables, and sentences that answer it."""

    title: str
    question: str
    figures: tuple[tuple[Path, str], ...]
    tables: tuple[str, ...]
    answer: tuple[str, ...]


def write_page(folder: Path, name: str, page: Page, plan: Plan, results: Sequence[Result]) -> Path:
    """Write the page of a study into its folder and return the file."""
    pictures = [f"![{caption}]({file.relative_to(folder)})\n\n{caption}" for file, caption in page.figures]
    parts = [
        f"# {page.title}",
        page.question.strip(),
        *pictures,
        *page.tables,
        "## Answer",
        "\n".join(f"- {sentence}" for sentence in page.answer),
        "## How it was made",
        f"`{command(name, plan)}`",
        conditions(results),
    ]
    file = folder / f"{name}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def command(name: str, plan: Plan) -> str:
    """Return the command that makes a study's page.

    >>> command("ladder", Plan(minutes=2, seeds=3))
    'lucidetr study ladder --out DIR --minutes 2 --seeds 3'
    >>> command("three-ways", Plan(minutes=2, seeds=1, steps=9, images=3200, weights="a b", clock="processor"))
    "lucidetr study three-ways --out DIR --steps 9 --seeds 1 --weights 'a b' --clock processor --threads 1"
    """
    words = ["lucidetr study", name, "--out DIR", "--quick" if plan.quick else ""]
    words += [f"--steps {plan.steps}" if plan.steps else f"--minutes {plan.minutes:g}", f"--seeds {plan.seeds}"]
    words += [f"--images {plan.images}" if plan.images and not plan.steps else ""]
    words += [f"--weights {shlex.quote(plan.weights)}" if plan.weights else ""]
    words += [f"--data {shlex.quote(plan.data)}" if plan.data != Plan(1, 1).data else ""]
    words += [f"--side {plan.side}" if plan.side else ""]
    words += ["--clock processor --threads 1" if plan.clock == "processor" else ""]
    return " ".join(word for word in words if word)


def conditions(results: Sequence[Result]) -> str:
    """Return in a sentence what was measured on what, by which code."""
    if not results:
        return "Nothing measured yet."
    precisions, commits = sorted({r.precision for r in results}), sorted({r.commit for r in results if r.commit})
    threads, machines = sorted({r.threads for r in results}), sorted({r.machine for r in results})
    said = (
        f"{len(results)} run(s) on {results[0].data} with {'/'.join(map(str, threads))} thread(s) of "
        f"{', '.join(machines)}, {', '.join(precisions)}; commit {', '.join(commits) or 'unknown'}."
    )
    lost = sum("diverged" in r.numbers for r in results)
    return said + (f" {lost} of them met numbers that are not finite; their AP counts as 0." if lost else "")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def save(file: Path, size: tuple[float, float], draw: Callable[[Any], object]) -> Path:
    """Let `draw` draw on a figure of that many inches and write it; return the file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    file.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, dpi=110)
    return file


def draw_bars(axes: Any, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Draw a bar for the mean of each row's values, its deviation as a whisker, and every value as a dot.

    Rows without values stay empty.
    """
    names = list(values)
    for place, each in enumerate(values.values()):
        if each:
            deviation = statistics.stdev(each) if len(each) > 1 else 0.0
            axes.barh(place, statistics.fmean(each), xerr=deviation, color="tab:blue", alpha=0.7)
            axes.plot(each, [place] * len(each), ".", color="black", markersize=3)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel=label, ylim=(len(names) - 0.5, -0.5))


def draw_depth(axes: Any, rows: Mapping[str, Mapping[str, float]], title: str, log: bool = True) -> None:
    """Draw a line for each row over the parts of a network, in the order of depth.

    `rows` maps a line's label to {name of a part: value}; all lines have the same parts. Where a part of another
    first name begins (backbone, encoder, …), its name stands under the axis.
    """
    names: list[str] = list(next(iter(rows.values()), {}))
    for label, values in rows.items():
        shown = [value if value > 0 or not log else math.nan for value in values.values()]
        axes.plot(range(len(shown)), shown, marker=".", markersize=3, linewidth=1, label=label)
    begins = beginnings(names)
    axes.set(title=title, xticks=begins)
    axes.set_xticklabels([names[i].split(".")[0] for i in begins], rotation=45, ha="right")
    if log:
        axes.set_yscale("log")


def beginnings(names: Sequence[str]) -> list[int]:
    """Return where another first name begins; of two too close to be written beside each other, the later.

    >>> beginnings(["a.x", "a.y", "b.x", "b.y"])
    [0, 2]
    >>> beginnings(["a"] * 40 + ["b"] + ["c"] * 40)
    [0, 41]
    """
    first = [name.split(".")[0] for name in names]
    begins = [i for i, part in enumerate(first) if not i or part != first[i - 1]]
    return [i for i, after in zip(begins, [*begins[1:], len(names)], strict=True) if after - i > len(names) / 25]
