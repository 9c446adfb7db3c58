"""Run the short benchmarks: python -m benchmarks; or some by name: python -m benchmarks detr_r50 time_to_ap."""

import sys
from importlib import import_module

SHORT = ("detr_r50", "recording")
BENCHMARKS = (*SHORT, "time_to_ap")  # time_to_ap takes hours; python -m benchmarks.time_to_ap --help lists its options

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(SHORT)
    if unknown := set(chosen) - set(BENCHMARKS):
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    for name in chosen:
        import_module(f"benchmarks.{name}").main()
