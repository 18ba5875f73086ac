"""Benchmarks: `python -m bench NAME [--json]`. What each measures and its targets: docs/benchmarks.md.

Both sides of a comparison run in turn in one call, and the result is the median ratio. Exit status 0 when every target
is met, 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module

from bench.measure import Benchmark, Result, to_stderr

# name -> module with a `BENCHMARK`; imported when it is asked for, because most pull in heavy libraries.
MODULES = {
    "pipeline": "bench.pipeline",
    "quantize": "bench.quantize",
    "footprint": "bench.footprint",
    "llm": "bench.llm",
    "store": "bench.store",
    "calibration": "bench.calibration",
    "link": "bench.link",
    "swap": "bench.swap",
    "delivery": "bench.delivery",
    "labels": "bench.labels",
    "loop": "bench.loop",
    "fleet": "bench.fleet",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(MODULES))
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: the keys, the facts, what was missed"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, to try the benchmark itself")
    options = parser.parse_args(arguments)
    benchmark: Benchmark = import_module(MODULES[options.name]).BENCHMARK
    result = benchmark.run(options.quick, to_stderr)
    missed = [key for key, target in benchmark.targets.items() if not target.met(result.keys.get(key, float("nan")))]
    if options.json:
        print(json.dumps({**result.keys, "missed": missed, "facts": result.facts}, indent=2))
    else:
        _show(benchmark, result, missed)
    return 1 if missed else 0


def _show(benchmark: Benchmark, result: Result, missed: list[str]) -> None:
    print(f"{benchmark.name}: {benchmark.text}\n")
    for key, value in result.keys.items():
        target = benchmark.targets.get(key)
        verdict = "" if target is None else f"  {target.sense} {target.value:g}  {'MISSED' if key in missed else 'met'}"
        print(f"  {key:<32} {value:>10.4g}{verdict}")
    for key in missed:
        if key not in result.keys:
            print(f"  {key:<32} not measured  MISSED")
    print()
    for name, fact in result.facts.items():
        print(f"  {name}: {fact}")


if __name__ == "__main__":
    sys.exit(main())
