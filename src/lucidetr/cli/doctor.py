"""lucidetr doctor: what is wrong or odd in a data set, each fault with its file, id, value and fix. It only reads."""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lucidetr.cli.data import refuse_inside, sheet_path
from lucidetr.errors import InputError
from lucidetr.fields import HUGE, check_ranges

SHOWN_OF_A_KIND = 5


@dataclass(frozen=True)
class Options:
    """Examine a COCO, YOLO or Pascal VOC data set; nothing in it is changed."""

    data: Annotated[str, tyro.conf.Positional]
    """Its folder, or a data.yaml."""
    num_queries: int = 0
    """Say when a picture holds more objects than this."""
    json: str = ""
    """Write all findings into this file."""
    sheet: str = ""
    """Draw a sheet of pictures with their boxes into this file (of data that can be read)."""
    html: str = ""
    """Write numbers, findings and the worst pictures as one page into this file."""
    places: Literal["auto", "all", "off"] = "auto"
    """Compare every two pictures of one size, to find those that show one place; auto: up to 1,000 pictures."""
    all: bool = False
    """Print every finding, not only the first few of each kind."""


def run(arguments: list[str]) -> None:
    """Examine, print, and end with status 1 where there are faults."""
    options = tyro.cli(Options, args=arguments, prog="lucidetr doctor")
    if options.data.startswith("generated:"):
        raise InputError(f"{options.data} is generated and sound; doctor examines folders")
    check_ranges(options, "--", {"num_queries": (0, HUGE)})
    for name in ("json", "sheet", "html"):
        refuse_inside(options.data, f"--{name} ", getattr(options, name))
    if options.sheet:
        sheet_path(options.sheet)

    from lucidetr.data.doctor import diagnose, summary_table

    report = diagnose(Path(options.data), options.num_queries, options.places)
    for name in ("json", "sheet", "html"):
        pictures = (picture.path for raw in report.raws for picture in raw.pictures)
        refuse_inside(options.data, f"--{name} ", getattr(options, name), pictures)
    print(summary_table(report))
    shown: Counter[str] = Counter()
    for finding in sorted(report.findings, key=lambda each: each.severity != "error"):
        shown[finding.kind] += 1
        if options.all or shown[finding.kind] <= SHOWN_OF_A_KIND:
            print(f"{finding.severity}: {finding.text}")
    for kind, number in shown.items():
        if not options.all and number > SHOWN_OF_A_KIND:
            print(f"… and {number - SHOWN_OF_A_KIND} more of the kind {kind} (--all)")
    if options.json:
        text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
        Path(options.json).write_text(text, encoding="utf-8", errors="backslashreplace")  # as JSON escapes, too
    if options.sheet:
        _draw(options)
    if options.html:
        from lucidetr.data.doctor_page import write_page

        write_page(report, Path(options.html))
        print(f"page: {options.html}")
    errors = sum(finding.severity == "error" for finding in report.findings)
    others = len(report.findings) - errors
    faults = f"{errors} fault{'s' * (errors != 1)}"
    print(f"{faults}, {others} thing{'s that are' if others != 1 else ' that is'} odd" if report.findings else "sound")
    if errors:
        sys.exit(1)


def _draw(options: Options) -> None:
    """Draw a sheet of the first split."""
    from lucidetr.data.dataset import open_dataset
    from lucidetr.data.sheet import draw_sheet
    from lucidetr.data.splits import find_splits

    split = next(iter(find_splits(Path(options.data)).splits))
    draw_sheet(open_dataset(options.data, split, "drop"), 12, seed=0).save(options.sheet)
    print(f"sheet: {options.sheet}")
