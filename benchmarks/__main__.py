"""Run a benchmark with its options: python -m benchmarks NAME [options]; without a name all short ones.

python -m benchmarks table fills the tables of docs/performance.md from what was measured.
"""

import sys
from importlib import import_module

SHORT = ("inference", "training", "plain", "peaks", "parts", "growth", "large_data", "service", "recording")
LONG = ("time_to_ap", "reliability", "service_soak", "exports")  # hours
NAMES = (*SHORT, *LONG, "busy", "table")  # busy asks for a GPU
WITHOUT_OPTIONS = ("recording",)


def main(arguments: list[str]) -> None:
    """Run what the command line names."""
    from lucidetr.errors import InputError

    name, *options = arguments or [""]
    if name and name not in NAMES:
        sys.exit(f"unknown benchmark {name}; known: {', '.join(NAMES)}")
    if options and name in WITHOUT_OPTIONS:
        sys.exit(f"{name} has no options")
    try:
        for each in [name] if name else SHORT:
            module = import_module(f"benchmarks.{each}")
            module.main(options) if options else module.main()
    except InputError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
