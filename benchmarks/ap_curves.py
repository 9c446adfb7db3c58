"""Curves of AP over training time from the lines that time_to_ap wrote: averaged over seeds, drawn, and as a table."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from lucidetr.studies.experiment import spread

# each contender is drawn alike in every chart; curves of the same one differ by their marker
COLOURS = {
    "lucid-xs": "tab:blue",
    "transformers-rtdetrv2": "tab:red",
    "transformers-dfine": "tab:green",
    "transformers-detr": "tab:gray",
    "detr-xs": "black",
    "lucid-s": "tab:cyan",
}
OTHERS = ("tab:purple", "tab:orange", "tab:brown", "tab:pink", "tab:olive")
MARKERS = ("o", "s", "^", "D", "v")
MARKS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # shares of the budget in the table
# settings beside the contender that make another experiment, and how a curve says what is its own
APART = {
    "minutes": "{:.3g} min",
    "augmentation": "augmentation {}",
    "split": "split {}",
    "precision": "{}",
    "channels_last": "channels last: {}",
}


@dataclass(frozen=True)
class Curve:
    """Hold the runs of one contender that differ by seed alone, and their mean."""

    name: str
    lines: list[dict[str, Any]]

    @property
    def contender(self) -> str:
        """Return which recipe or peer it is."""
        return self.lines[0]["settings"]["contender"]

    @property
    def ours(self) -> bool:
        """Say whether it is a recipe of ours."""
        return self.contender not in PEERS

    @property
    def minutes(self) -> float:
        """Return the length of the runs."""
        return self.lines[0]["settings"]["minutes"]

    @property
    def points(self) -> list[tuple[float, float, float]]:
        """Return seconds, AP and AP50 of every evaluation, each the mean over the runs."""
        looks = zip(*(line["points"] for line in self.lines), strict=False)
        return [tuple(statistics.fmean(each) for each in zip(*look, strict=True)) for look in looks]

    def at(self, minutes: float) -> float | None:
        """Return the AP of the evaluation at that time, None where there was none within a twentieth of the budget."""
        seconds, ap, _ = min(self.points, key=lambda point: abs(point[0] - 60 * minutes))
        return ap if abs(seconds - 60 * minutes) <= 60 * self.minutes / 20 else None

    def reached(self, ap: float) -> float | None:
        """Return the seconds of the first evaluation with at least that AP, None where it was never reached."""
        return next((seconds for seconds, there, _ in self.points if there >= ap), None)


def average(lines: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return a curve for each contender and experiment, the best rate and batch of each where there are several.

    Of runs with equal settings the newest counts, and of a recipe that has changed only what it was last.
    """
    newest = {json.dumps(line["settings"]): line for line in lines}.values()
    last = {kind_of(line): line["settings"].get("config") for line in newest}
    kinds: dict[tuple, dict[tuple, list[dict[str, Any]]]] = {}
    for line in newest:
        settings, kind = line["settings"], kind_of(line)
        if settings.get("config") == last[kind]:
            choice = (settings["lr"], settings["batch"], settings["evaluations"])
            kinds.setdefault(kind, {}).setdefault(choice, []).append(line)
    curves = []
    for kind, choices in kinds.items():
        best = max(choices.values(), key=lambda each: statistics.fmean(line["AP"] for line in each))
        curves.append(Curve(name_of(kind, list(kinds)), best))
    return curves


def kind_of(line: dict[str, Any]) -> tuple:
    """Return what runs share that differ by seed, rate and batch alone."""
    settings = line["settings"]
    return (settings["contender"], *(settings.get(name) for name in APART))


def name_of(kind: tuple, kinds: Sequence[tuple]) -> str:
    """Return a contender's name, with what tells its curve from the others of it."""
    columns = zip(*(each for each in kinds if each[0] == kind[0]), strict=True)
    apart = [len(set(column)) > 1 for column in columns][1:]
    words = [
        form.format("none" if value in ("", None) else value)
        for form, value, differs in zip(APART.values(), kind[1:], apart, strict=True)
        if differs
    ]
    return ", ".join([kind[0], *words])


def draw(curves: Sequence[Curve], out: Path) -> None:
    """Draw AP over minutes of training, each run faintly and the mean boldly, ours in full lines."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    curves = sorted(curves, key=lambda curve: (not curve.ours, curve.contender, -curve.minutes))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for curve, (colour, marker) in zip(curves, looks(curves), strict=True):
            style: dict[str, Any] = {"color": colour, "linestyle": "-" if curve.ours else "--"}
            for line in curve.lines if len(curve.lines) > 1 else ():
                axes.plot(
                    [s / 60 for s, *_ in line["points"]], [ap for _, ap, _ in line["points"]], alpha=0.25, **style
                )
            minutes, aps = [s / 60 for s, *_ in curve.points], [ap for _, ap, _ in curve.points]
            axes.plot(minutes, aps, marker=marker, markersize=4, label=curve.name, **style)
        settings = curves[0].lines[0]["settings"]
        axes.set(xscale="log", xlabel="minutes of training", ylabel="AP, validation split", ylim=(0, None))
        marks = [share * max(curve.minutes for curve in curves) for share in MARKS]
        first = min(seconds for curve in curves for seconds, *_ in curve.points) / 60
        while marks[0] > 1.5 * first:  # ticks go down to the first look
            marks.insert(0, marks[0] / 2)
        axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axes.set_xticks([], minor=True)
        place = f"{settings['side']} × {settings['side']} pixels, threads: {settings['threads']}"
        axes.set_title(f"{settings['data']}, {place}\n{machine(curves)}")
        axes.legend(frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)


def looks(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """Return colour and marker of every curve: the contender has the one, and its curves differ by the other."""
    names = [curve.contender for curve in curves]
    others = [name for name in dict.fromkeys(names) if name not in COLOURS]
    colours = COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    return [(colours[name], MARKERS[names[:i].count(name) % len(MARKERS)]) for i, name in enumerate(names)]


def machine(curves: Sequence[Curve]) -> str:
    """Return the machine or machines of the runs."""
    places = {(line["machine"], line["settings"].get("device")) for curve in curves for line in curve.lines}
    return " and ".join(sorted(", ".join(filter(None, place)) for place in places))


def table(curves: Sequence[Curve]) -> str:
    """Return AP after shares of the longest budget as a Markdown table, and when ours reached the peers' final AP."""
    longest = max(curve.minutes for curve in curves)
    marks = [share * longest for share in MARKS]
    heads = ["", "parameters", "images/s", *(f"{mark:g} min" for mark in marks), "AP50", "other split"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for curve in curves:
        others = [line["other_split"]["AP"] or 0.0 for line in curve.lines if line["other_split"]]
        speed = statistics.fmean(line["images_per_second"] for line in curve.lines)
        aps = [curve.at(mark) for mark in marks]
        row = [curve.name, f"{curve.lines[0]['parameters'] / 1e6:.1f} M", f"{speed:.0f}"]
        row += ["–" if ap is None else f"{ap:.3f}" for ap in aps]
        rows.append([*row, f"{curve.points[-1][2]:.3f}", spread(others)])
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    runs = "; ".join(f"{curve.name} {spread([line['AP'] for line in curve.lines])}" for curve in curves)
    sentences = [sooner(mine, theirs) for theirs in curves if not theirs.ours for mine in curves if mine.ours]
    return "\n".join([text, "", f"AP at the end (± deviation over seeds): {runs}.", *sentences])


def sooner(mine: Curve, theirs: Curve) -> str:
    """Return a sentence on when a curve of ours reached a peer's AP at the end, against when the peer itself did."""
    final = theirs.points[-1][1]
    here, there = mine.reached(final), theirs.reached(final)
    if here is None or there is None:
        return f"{mine.name} did not reach {theirs.name}'s AP at the end, {final:.3f}."
    when = f"after {here:.0f} s, {there / here:.1f}× sooner"
    return f"{mine.name} reached {theirs.name}'s AP at the end, {final:.3f}, {when}."
