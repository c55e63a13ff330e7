"""Compares the ratios of two sets of results: what fell by more than a fifth fails.

    python benchmarks/check.py NEW                # a folder of results, against those that are committed

Ratios are taken within one run, the larger the better, so they can be compared between runs; times are never compared.
A benchmark without new results is left out; a ratio that is new or gone is named and fails nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import document
from document import Results

LEAST = 0.8
"""How much of a ratio must be left."""


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 1 where a ratio fell, 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, help="a folder of results")
    parser.add_argument("--committed", type=Path, default=document.RESULTS, help="the results to hold them to")
    options = parser.parse_args(argv)
    committed, new = document.read(options.committed), document.read(options.new)
    shared = committed.keys() & new.keys()
    if not shared:
        print(f"{options.new} and {options.committed} hold no result of the same benchmark", file=sys.stderr)
        sys.exit(2)
    for name in sorted(shared):
        if committed[name]["command"] != new[name]["command"]:
            print(f"{name}: {new[name]['command']!r} is not {committed[name]['command']!r}", file=sys.stderr)
            sys.exit(2)
    lines, fell = compare({name: committed[name] for name in shared}, {name: new[name] for name in shared})
    print("\n".join(lines))
    sys.exit(1 if fell else 0)


def compare(committed: Results, new: Results) -> tuple[list[str], bool]:
    """A line per ratio, and whether any fell."""
    before, after = ratios(committed), ratios(new)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            lines.append(f"new   {name}: {after[name]:.3g}")
        elif name not in after:
            lines.append(f"gone  {name}: was {before[name]:.3g}")
        else:
            word = "FELL" if after[name] < LEAST * before[name] else "held"
            lines.append(f"{word}  {name}: {after[name]:.3g}, was {before[name]:.3g}")
    return lines, any(line.startswith("FELL") for line in lines)


def ratios(results: Results) -> dict[str, float]:
    return {f"{name}: {ratio}": value for name, result in results.items() for ratio, value in result["ratios"].items()}


if __name__ == "__main__":
    main()
