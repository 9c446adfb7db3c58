"""Run every benchmark: python -m benchmarks (or one: python -m benchmarks detr_r50)."""

import sys
from importlib import import_module

BENCHMARKS = ("detr_r50",)

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(BENCHMARKS)
    if unknown := set(chosen) - set(BENCHMARKS):
        sys.exit(f"unknown benchmark {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    for name in chosen:
        import_module(f"benchmarks.{name}").main()
