"""Ask a service very often, rightly and wrongly, and keep what came of it: answers by status, and memory.

    python -m benchmarks.service_soak --requests 100000 --fuzz 10000

Each number is of requests of its kind; what is not named is not asked. The model and its pictures are small: 64 pixels.
"""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from benchmarks.measure import note

TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Options:
    """Ask as often as told; memory is counted from a tenth of the requests on."""

    requests: int = 0
    """Pictures; each must be answered."""
    fuzz: int = 0
    """Random requests, most of them nearly right; each must be answered or refused, none by 500."""
    seed: int = 1
    """Of the random requests."""


def main(arguments: list[str] | None = None) -> None:
    """Do what is asked for, append a line to results.jsonl for each kind, and end with 1 where anything failed."""
    options = tyro.cli(Options, args=arguments or [], prog="python -m benchmarks.service_soak")
    sys.path.insert(0, str(TESTS))
    tools = import_module("service_tools")
    kinds: dict[str, Callable] = {
        "requests": tools.check_soak,
        "fuzz": lambda server, pictures, count: tools.check_fuzz(server, pictures, count, options.seed),
    }
    asked = {kind: number for kind in kinds if (number := getattr(options, kind))}
    sound = True
    for kind, number in asked.items():
        measured = measure(tools, kinds[kind], number)
        print(f"{kind}: {number}: {measured}", flush=True)
        note("service soak", {kind: number, "seed": options.seed}, measured)
        sound &= not measured["failure"]
    if not asked:
        print("nothing asked for; name --requests or --fuzz")
    if not sound:
        sys.exit(1)


def measure(tools: Any, check: Callable, number: int) -> dict[str, Any]:
    """Start a service, ask it, stop it; return what was measured, and what failed."""
    statuses, memory, failure, started = {}, {}, "", time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        server = tools.Server(tools.untrained_run(Path(folder) / "run"), *tools.OPTIONS)
        try:
            statuses, memory = check(server, tools.scenes(), number)
        except Exception as error:  # noqa: BLE001 whatever a check found is noted
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"[:500]
        finally:
            status = server.stop()
    return {
        "seconds": round(time.monotonic() - started, 1),
        "statuses": {str(each): statuses[each] for each in sorted(statuses)},
        "memory_mb": memory,
        "growth_mb": round(tools.growth(memory), 1) if memory else None,
        "exit_status": status,
        "failure": failure,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
