"""Run the tests of docs/reliability.md at any size and seed, and keep what came of it.

    python -m benchmarks.reliability --kills 500 --damages 10000 --fuzz 200000 --sets 20000 --signals 200
    python -m benchmarks.reliability --planted 200 --seeded 20

Each number is of cases of its kind; what is not named is not run. `--fuzz` is the number of mutated files of each kind:
pictures, and COCO, VOC and YOLO annotations for training's readers and for the doctor's.
"""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import tyro

from benchmarks.measure import note

TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Options:
    """Break things at random, as often as asked for."""

    kills: int = 0
    """Runs killed without warning, every second one inside a save, and taken up again."""
    damages: int = 0
    """Damaged checkpoints."""
    fuzz: int = 0
    """Mutated files of each kind."""
    sets: int = 0
    """Random data sets evaluated here and by pycocotools."""
    signals: int = 0
    """Runs stopped by Ctrl-C or SIGTERM in every phase, and taken up again."""
    planted: int = 0
    """Numbers that are not finite, planted in steps."""
    seeded: int = 0
    """Runs of one seed, with 0, 2 and 4 workers."""
    seed: int = 0


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, append a line to results.jsonl for each kind, and end with 1 where anything failed."""
    options = tyro.cli(Options, args=arguments or [], prog="python -m benchmarks.reliability")
    sys.path.insert(0, str(TESTS))
    asked = {name: work for name, work in KINDS.items() if getattr(options, name)}
    sound = [run(name, work, options.seed, getattr(options, name)) for name, work in asked.items()]
    if not asked:
        print(f"nothing asked for; name some of --{', --'.join(KINDS)}")
    if not all(sound):
        sys.exit(1)


def run(name: str, work: Callable[[Path, int, int], str], seed: int, number: int) -> bool:
    """Do one kind of work, print and note what came of it, and say whether nothing failed."""
    started, failure, details = time.monotonic(), "", ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            details = work(Path(folder), seed, number)
    except Exception as error:  # noqa: BLE001 whatever a test found is noted
        traceback.print_exc()
        failure = "; ".join([f"{type(error).__name__}: {error}"[:500], *getattr(error, "__notes__", [])])
    seconds = round(time.monotonic() - started, 1)
    print(f"{name}: {number}, seed {seed}, {seconds} s: {failure or 'nothing failed'}; {details}", flush=True)
    note("reliability", {name: number, "seed": seed}, {"seconds": seconds, "failure": failure, "details": details})
    return not failure


def kill(folder: Path, seed: int, number: int) -> str:
    """Kill runs again and again."""
    return str(import_module("learning.test_durability").kills(folder, seed, number))


def damage(folder: Path, seed: int, number: int) -> str:
    """Damage checkpoints."""
    import_module("unit.test_storage").test_damaged_checkpoints_are_found_named_and_passed_over(folder, seed, number)
    return "eight kinds of damage"


def mutate(folder: Path, seed: int, number: int) -> str:
    """Mutate pictures and annotation files, read each, and print a line for each kind."""
    tests = import_module("unit.test_fuzz")
    kinds = {"pictures": tests.test_mutated_pictures_are_read_or_refused}
    for read in (tests.train, tests.examine):
        for make in tests.MAKERS:
            work = partial(tests.test_mutated_annotations_are_read_or_refused, read=read, make=make)
            kinds[f"{read.__name__}-{make.__name__}"] = work
    failures = []
    for name, work in kinds.items():
        own, started, failure = folder / name, time.monotonic(), ""
        own.mkdir()
        try:
            with quiet():
                work(own, seed=seed, number=number)
        except Exception as error:  # noqa: BLE001 the other kinds are run all the same
            failure = f"{name}: {type(error).__name__}: {error} {getattr(error, '__notes__', '')}"[:500]
            failures.append(failure)
        print(f"  {name}: {number}, {time.monotonic() - started:.1f} s: {failure or 'nothing failed'}", flush=True)
    assert not failures, failures
    return "pictures, and three forms of annotations for two readers"


@contextmanager
def quiet() -> Iterator[None]:
    """Send nowhere what libraries of C write on standard error itself: thousands of lines on damaged pictures."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def compare(folder: Path, seed: int, number: int) -> str:
    """Evaluate random sets here and by pycocotools."""
    import_module("oracle.test_coco_cases").compare_sets(seed, number)
    return "twelve numbers each, to 1e-12"


def stop(folder: Path, seed: int, number: int) -> str:
    """Stop runs by Ctrl-C and SIGTERM."""
    return str(dict(import_module("learning.test_signals").signals(folder, seed, number)))


def plant(folder: Path, seed: int, number: int) -> str:
    """Plant numbers that are not finite."""
    return str(dict(import_module("learning.test_guards").plant_at_random(folder, seed, number)))


def repeat(folder: Path, seed: int, number: int) -> str:
    """Train again and again with one seed."""
    import_module("learning.test_run").twice(folder, seed, number)
    return "bit by bit the same"


KINDS = {
    "kills": kill,
    "damages": damage,
    "fuzz": mutate,
    "sets": compare,
    "signals": stop,
    "planted": plant,
    "seeded": repeat,
}

if __name__ == "__main__":
    main(sys.argv[1:])
