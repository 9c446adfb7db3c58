"""The tables of docs/performance.md, made from results.jsonl.

Of runs with equal settings the fullest counts, that with most contenders and losses compared, of equal ones the newest.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import large_data as coco
from benchmarks import measure
from lucidetr.errors import InputError

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
Line = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the tables of docs/performance.md, or of the page that is given; print what was filled, and what was not."""
    if len(arguments or ()) > 1:
        raise InputError(f"{' '.join(arguments or ())}: give one page: python -m benchmarks table [PAGE]")
    page = Path(arguments[0]) if arguments else PAGE
    if not page.is_file():
        raise InputError(f"no page {page}: python -m benchmarks table [PAGE] fills the tables of a page")
    lines = [json.loads(text) for text in measure.RESULTS.read_text(encoding="utf-8").splitlines()]
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        chosen = newest(lines, name)
        places = sorted({place(line) for line in chosen})
        tables = [f"{where}:\n\n{table([line for line in chosen if place(line) == where])}" for where in places]
        filled = "\n\n".join(tables) or "Not measured yet."
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, filled=filled: f"{m[1]}{filled}\n{m[2]}", text, flags=re.DOTALL)
        print(f"{name}: {len(chosen)} runs on {len(places)} machines" + ("" if found else f", but no place in {page}"))
        for line in passed_over(lines, name):
            print(f"  passed over, for an older line has more in it: {line['when']}, {line['command']}")
    page.write_text(text, encoding="utf-8")


def newest(lines: Sequence[Line], benchmark: str) -> list[Line]:
    """Return the newest of the fullest lines of each settings and machine, in the order of the file."""
    kept: dict[tuple[str, str], Line] = {}
    for line in of_benchmark(lines, benchmark):
        if (key := case(line)) not in kept or fullness(line) >= fullness(kept[key]):
            kept.pop(key, None)  # a new line stands where it stands in the file
            kept[key] = line
    return list(kept.values())


def passed_over(lines: Sequence[Line], benchmark: str) -> list[Line]:
    """Return the last line of each settings and machine where an older one is fuller and so is shown."""
    shown = newest(lines, benchmark)
    last = {case(line): line for line in of_benchmark(lines, benchmark)}
    return [line for line in last.values() if line not in shown]


def of_benchmark(lines: Sequence[Line], benchmark: str) -> list[Line]:
    """Return the lines of one benchmark, without those of models too small to say anything."""
    return [line for line in lines if line["benchmark"] == benchmark and "--quick" not in line["command"].split()]


def case(line: Line) -> tuple[str, str]:
    """Return what two lines share of which one takes the other's place."""
    return json.dumps(line["settings"]), place(line)


def fullness(line: Line) -> int:
    """Return how many things were measured beside each other, losses counted as one of them."""
    return len(line.get("seconds") or line.get("recipes") or line.get("rows") or ()) + has_losses(line)


def has_losses(line: Line) -> bool:
    """Say whether losses were compared in the line's own precision; older lines of bf16 hold those of float32."""
    return "losses" in line and line.get("losses_in", "fp32") == line["settings"].get("precision", "fp32")


def place(line: Line) -> str:
    """Say on what a line was measured."""
    versions = ", ".join(f"{name} {line['versions'][name]}" for name in ("torch", "transformers"))
    matrix = ", AMX" if line["amx"] else ", AVX512-BF16" if line.get("avx512_bf16") else ""
    computes = "" if line["device"] == "cpu" else f", {line['device']}"
    return f"{line['machine']}{matrix}{computes}, {line['threads']} threads, {versions}"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


def milliseconds(seconds: float) -> str:
    """Return seconds for people."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def labels(lines: Sequence[Line], form: str, *others: str) -> list[str]:
    """Return for each line its settings in that form, with those of the others that tell it from lines named alike."""
    names = [form.format(**line["settings"]) for line in lines]
    found = []
    for name, line in zip(names, lines, strict=True):
        alike = [each["settings"] for each, its in zip(lines, names, strict=True) if its == name]
        apart = [other for other in others if len({str(settings.get(other)) for settings in alike}) > 1]
        found.append(", ".join([name, *(f"{other} {line['settings'].get(other, '–')}" for other in apart)]))
    return found


def inference(lines: Sequence[Line]) -> str:
    """Return seconds of each contender for each size and batch, and how much its boxes and scores differ."""
    usual = {"recipe": "detr-r50", "weights": "random"}
    columns = {}
    for line in sorted(lines, key=lambda line: (line["settings"]["batch"], line["settings"]["side"])):
        settings = line["settings"]
        named = [settings[key] for key, value in usual.items() if settings.get(key, value) != value]
        columns[", ".join([*named, settings["side"], f"batch {settings['batch']}"])] = line
    contenders = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
    rows = []
    for name in contenders:
        cells = [compared(line["seconds"], name, "lucidetr fp32") for line in columns.values()]
        pairs = [line["differences"][name] for line in lines if name in line["differences"]]
        rows.append([name, *cells, *(f"{max(pair[k] for pair in pairs):.1e}" for k in (0, 1))])
    return markdown(["", *columns, "1 − IoU", "scores"], rows)


def compared(seconds: dict[str, list[float]], name: str, mine: str) -> str:
    """Return the median of a contender and how many times ours it is."""
    if name not in seconds:
        return "–"
    taken, own = median(seconds[name]), median(seconds[mine])
    return milliseconds(taken) + ("" if name == mine else f" ({taken / own:.2f} ×)")


def training(lines: Sequence[Line]) -> str:
    """Return the seconds of a step of both."""
    rows = []
    names = labels(lines, "{precision}, {side}, batch {batch}", "recipe", "learning", "objects", "dropout")
    for what, line in zip(names, lines, strict=True):
        cells = [compared(line["seconds"], name, "lucidetr") for name in ("lucidetr", "transformers")]
        rows.append([what, *cells, f"{line['largest_difference']:.1e}" if has_losses(line) else "–"])
    return markdown(["", "lucidetr", "transformers", "largest difference of losses"], rows)


def plain(lines: Sequence[Line]) -> str:
    """Return the seconds of a step both ways, and the images in a second as users train."""
    rows = []
    for line in lines:
        settings, seconds = line["settings"], line["seconds"]
        speed = f"{settings['batch'] / median(seconds['fast']):.0f}"
        cells = [compared(seconds, name, "fast") for name in ("fast", "plain")]
        what = f"{settings['recipe']}, {settings['precision']}, {settings['side']}, batch {settings['batch']}"
        rows.append([what, speed, *cells])
    return markdown(["", "images/s", "as users train", "plain, float32"], rows)


def peaks(lines: Sequence[Line]) -> str:
    """Return the measured peaks and what share of them each recipe reaches."""
    heading = ["", *labels(lines, "{precision}", "side")]
    rows = [[f"peak, {kind}", *(f"{line['peaks'][kind]:.0f} GFLOP/s" for line in lines)] for kind in lines[0]["peaks"]]
    for recipe in dict.fromkeys(name for line in lines for name in line["recipes"]):
        for kind in ("inference", "training"):
            each = [line["recipes"].get(recipe, {}).get(kind) for line in lines]
            cells = [f"{one['gflops_per_second']:.0f} GFLOP/s, {one['share']:.0%}" if one else "–" for one in each]
            rows.append([f"{recipe}, {kind}", *cells])
    return markdown(heading, rows)


def busy(lines: Sequence[Line]) -> str:
    """Return how fast each recipe trains and how much of that time the GPU computes."""
    rows = []
    for name, line in zip(busy_labels(lines), lines, strict=True):
        step = line["step"]
        cells = [milliseconds(step), milliseconds(line["computing"]), f"{line['computing'] / step:.0%}"]
        rows.append([name, f"{line['images_per_second']:.0f}", *cells])
    return markdown(["", "images/s", "a step", "the GPU computes", "of the time"], rows)


def busy_labels(lines: Sequence[Line]) -> list[str]:
    """Return the recipe of each line with its batch, and whether its steps were replayed."""
    said = [{"said": ", replayed" if line["settings"].get("replayed") else ""} | line["settings"] for line in lines]
    form = "{recipe}, {side}, batch {batch}{said}"
    return labels([{"settings": settings} for settings in said], form, "precision", "workers")


def parts(lines: Sequence[Line]) -> str:
    """Return the share of each part of a training step and of a prediction, a column for each case."""
    columns = labels(lines, "{case}, {precision}", "side", "batch", "queries", "objects")
    names = list(dict.fromkeys(name for line in lines for name in line["training"]))
    rows = [
        [name, *(f"{line['training'].get(name, 0.0) / line['step']:.1%}" for line in lines)]
        for name in names
        if any(line["training"].get(name, 0.0) > 0.001 * line["step"] for line in lines)
    ]
    rows.append(["**a step**", *(f"**{milliseconds(line['step'])}**" for line in lines)])
    rows.append(["matching and losses, at most", *(f"{line['target']:.0%}" for line in lines)])
    found = [name for name in names if any(name in line["inference"] for line in lines)]
    wholes = [sum(line["inference"].values()) for line in lines]
    rows += [
        [f"predicting: {name}", *(f"{line['inference'].get(name, 0.0) / whole:.1%}" for line, whole in both)]
        for name in found
        if (both := list(zip(lines, wholes, strict=True)))
    ]
    rows.append(["**a prediction**", *(f"**{milliseconds(whole)}**" for whole in wholes)])
    return markdown(["", *columns], rows)


def growth(lines: Sequence[Line]) -> str:
    """Return the seconds of every axis, one table below the other."""
    rows = []
    for name, line in zip(labels(lines, "{recipe}, {axis} {{}}", "precision"), lines, strict=True):
        for value, row in line["rows"].items():
            rows.append([name.format(value), *(milliseconds(seconds) for seconds in row.values())])
    return markdown(["", *next(iter(lines[0]["rows"].values()))], rows)


def large_data(lines: Sequence[Line]) -> str:
    """Return what a data set of COCO's size costs, and the targets; data sets of other sizes say nothing of it."""
    size = {"images": coco.Options.images, "boxes": coco.Options.boxes}.items()
    lines = sorted((line for line in lines if size <= line["settings"].items()), key=lambda each: each["when"])
    if not lines:
        return "Not measured yet."
    line = lines[-1]
    reading, start, libraries = (line[name] for name in ("reading", "start", "libraries"))
    above = reading["peak_mb"] - libraries["peak_mb"]
    rows = [
        [
            f"reading {line['settings']['boxes']:,} boxes, {line['file_mb']:.0f} MB",
            f"{reading['reading_seconds']:.1f} s",
            "15 s",
        ],
        ["most memory of it, libraries included", f"{reading['peak_mb']:.0f} MB", "1,024 MB"],
        ["of it above the libraries", f"{above:.0f} MB", ""],
        ["a run's first batch, from the start of its process", f"{start['with_start']:.1f} s", ""],
    ]
    watched: Line = next((each["workers"] for each in reversed(lines) if "workers" in each), {})
    for kind, label in (("uss_mb", "its own"), ("pss_mb", "with its part of what is shared")):
        grown = watched.get("growth", {}).get(kind)
        rows.append(
            [f"growth of a worker's memory over an epoch, {label}", f"{grown:.1%}" if grown is not None else "–", "5 %"]
        )
    return markdown(["", "measured", "at most"], rows)


def exports(lines: Sequence[Line]) -> str:
    """Return how far each recipe's files are from its model by its last comparison, and their size."""
    rows = []
    for line in {line["settings"]["recipe"]: line for line in lines}.values():
        name = line["settings"]["recipe"]
        for form, row in line["files"].items():
            numbers = [f"{row[key]:.1e}" for key in ("logits", "boxes", "scores")]
            shown = f"{row['shapes_logits']:.1e}, {row['shapes_boxes']:.1e}" if "shapes_logits" in row else ""
            rows.append([name, str(line["side"]), form, *numbers, f"{row['bytes'] / 1e6:.1f} MB", shown])
            name = ""
    return markdown(["recipe", "side", "file", "logits", "boxes", "scores", "size", "noise: logits, boxes"], rows)


TABLES: dict[str, Callable[[Sequence[Line]], str]] = {
    "inference": inference,
    "training": training,
    "plain": plain,
    "peaks": peaks,
    "busy": busy,
    "parts": parts,
    "growth": growth,
    "large_data": large_data,
    "exports": exports,
}
