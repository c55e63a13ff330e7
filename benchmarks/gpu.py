"""Attribution, answers and a whole chain in published shapes on a card: how fast, how near to its best, in what memory.

    python benchmarks/gpu.py --size small --device cuda --json gpu.json     # Gemma-2-2b: free, under 16 and 24 GiB
    python benchmarks/gpu.py --size full --device cuda --json gpu.json      # Llama-3.1-8B and Gemma-3-270m as well

Weights are random, in bfloat16, and made on the card; SAEs in float32, one layer at a time, of the same weights. Time
is held against what a case's matrix products alone would take at the card's own rate, memory against the plan that a
run goes by. A model under a cap is a process of its own; `toy` runs the same code on toy shapes in this process, on a
CPU if need be. Needs no more than the package's core does.
"""

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import chain
import gpu_cases
import measuring
import operations
import torch
from gpu_cases import CASES, GIBIBYTE, Case, Load, clear
from measuring import bar, table
from operations import Rates
from real_shapes import PUBLISHED, Shape

from refusalscope.core.memory import is_out_of_memory

T = TypeVar("T")
BARS_OF = "gemma-2-2b"
INFINITE = float("inf")
FITS = {None: "", True: "yes", False: "no"}
NOTE = (
    "Share: of the time, what the matrix products alone would take at the measured rates. Tokens: of the answers. "
    "Fits: by the plan, which is made before weights are read."
)
CHAIN = chain.Load(train=100, validation=24, answer=64)
SMALL = Load(("gemma-2-2b",), (0, 16, 24), prompts=100, positions=64, answer=256, chain=CHAIN, rounds=3, rows=8192)
SIZES = {
    "toy": Load(tuple(PUBLISHED), (0,), 16, 12, answer=4, chain=chain.Load(16, 8, 4, features=5), rounds=1, rows=128),
    "small": SMALL,
    "full": SMALL._replace(models=tuple(PUBLISHED)),
}


class Found(NamedTuple):
    """One model under one cap."""

    model: str
    cap: int
    fits: bool | None
    """By the plan; None where there is none."""
    rates: Rates
    cases: Sequence[Case]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measuring.parser(__doc__, tuple(SIZES))
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "CAP"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    load, toy = SIZES[options.size], options.size == "toy"
    if options.child is not None:
        found = measure(options.child[0], int(options.child[1]), load, options.device, PUBLISHED[options.child[0]])
        json.dump(found, sys.stdout)
        return {}
    if not toy and not options.device.startswith("cuda"):
        parser.error(f"--size {options.size} needs a card: add --device cuda")
    pairs = [(name, cap) for name in load.models for cap in load.caps]
    if toy:
        made = [measure(name, cap, load, options.device, PUBLISHED[name].toy()) for name, cap in pairs]
    else:
        made = [apart(name, cap, options.size, options.device) for name, cap in pairs]
    return measuring.finish("gpu", options, result(made))


def apart(name: str, cap: int, size: str, device: str) -> Found:
    """One model under one cap, in a process of its own; where that breaks off, a failure of every case."""
    print(f"{name} under {cap or 'all'} GiB", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--size", size, "--device", device, "--child", name, str(cap)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        broken = [Case(case, f"the process ended with code {done.returncode}") for case in CASES]
        return Found(name, cap, None, Rates(0, 0, 0), broken)
    # Whatever ends the others, this is known.
    print(done.stdout, file=sys.stderr, flush=True)
    return parsed(done.stdout)


def parsed(text: str) -> Found:
    """What a process of its own has printed."""
    model, cap, fits, rates, cases = json.loads(text)
    return Found(model, cap, fits, Rates(*rates), [Case(*case) for case in cases])


def measure(name: str, cap: int, load: Load, device: str, shape: Shape) -> Found:
    """Every case of one model."""
    rates, plan = operations.rates(load.rows, device), gpu_cases.planned(shape, load, device, cap)
    clear(device)
    if cap:
        whole = torch.cuda.get_device_properties(device).total_memory
        # Of the current device: `cuda` names none by number.
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIBIBYTE / whole))
        load = load._replace(rounds=1)
    rig, why = attempt(lambda: gpu_cases.rigged(shape, load, device, plan))
    cases = []
    for case, do in CASES.items():
        clear(device)
        if rig is None:
            cases.append(Case(case, f"loading: {why}"))
            continue
        made, failed = attempt(lambda do=do: do(rig, rates))
        cases.append(made or Case(case, failed))
        rig.saes.let_go()
    return Found(name, cap, plan.fits, rates, cases)


def attempt(do: Callable[[], T]) -> tuple[T | None, str]:
    """What it returns, or why it failed: a card's time is dear, and the other cases stand by themselves."""
    try:
        return do(), ""
    except Exception as error:
        if is_out_of_memory(error):
            return None, "out of memory"
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"


def result(made: Sequence[Found]) -> dict[str, Any]:
    """Bars of one model with the card to itself; ratios; tables of all cases, the chain's stages, the rates."""
    cases = {(found.model, found.cap, case.name): case for found in made for case in found.cases}
    by_rate = {f"{_called(*key[:2])}: {key[2]}, share of the measured rates": case.share for key, case in cases.items()}
    pairs = {
        _called(*key): (cases[*key, "answers, unedited"].seconds, cases[*key, "answers under feature edits"].seconds)
        for key in dict.fromkeys(key[:2] for key in cases)
    }
    slowed = {
        f"{called}: answers a second, edited over unedited": plain / under
        for called, (plain, under) in pairs.items()
        if plain and under
    }
    return {
        "ratios": {name: ratio for name, ratio in (by_rate | slowed).items() if ratio},
        "bars": bars(cases),
        "tables": [_cases(made), _stages(cases), _rates(made)],
    }


def bars(cases: Mapping[tuple[str, int, str], Case]) -> list[dict[str, Any]]:
    """What is promised of a card of the H200's class, in Gemma-2-2b's shape with SAEs of 65536 features."""

    def seconds(name: str) -> float:
        case = cases[BARS_OF, 0, name]
        return INFINITE if case.failed else case.seconds

    caps = {cap for model, cap, _ in cases if model == BARS_OF}
    small = cases[BARS_OF, 16 if 16 in caps else 0, "whole chain"]
    return [
        bar(f"{BARS_OF}: seconds for candidates of 100 prompts of 64 tokens", seconds("candidates"), most=2.5),
        bar(f"{BARS_OF}: the same, share of the card's rate", cases[BARS_OF, 0, "candidates"].share, least=0.45),
        bar(f"{BARS_OF}: seconds for all features of these prompts", seconds("all features"), most=8.0),
        bar(
            f"{BARS_OF}: seconds for 100 edited answers of 256 tokens", seconds("answers under feature edits"), most=9.0
        ),
        bar(f"{BARS_OF}: GiB of the whole chain", INFINITE if small.failed else small.megabytes / 1024, most=16.0),
    ]


def _called(model: str, cap: int) -> str:
    return f"{model} under {cap} GiB" if cap else model


def _cases(made: Sequence[Found]) -> dict[str, Any]:
    rows = [
        [
            *(_called(found.model, found.cap), case.name, case.failed or case.batch, case.seconds, case.share),
            *(case.tokens, case.megabytes, case.planned, FITS[found.fits]),
        ]
        for found in made
        for case in found.cases
    ]
    columns = ["model", "case", "batch", "seconds", "share of the rates", "tokens", "peak MiB", "planned MiB", "fits"]
    return table("Cases", columns, rows, NOTE)


def _stages(cases: Mapping[tuple[str, int, str], Case]) -> dict[str, Any]:
    chains = {_called(*key[:2]): case.stages for key, case in cases.items() if case.stages}
    names = list(dict.fromkeys(name for stages in chains.values() for name in stages))
    rows = [[called, *(stages[name] for name in names)] for called, stages in chains.items()]
    return table("The whole chain by stage, in seconds", ["model", *names], rows)


def _rates(made: Sequence[Found]) -> dict[str, Any]:
    rows = [
        [_called(found.model, found.cap), *(rate / 1e12 for rate in found.rates[:2]), found.rates.moving / 1e9]
        for found in made
    ]
    columns = ["model", "bfloat16, 10^12 operations/s", "float32, the same", "host to device, GB/s"]
    return table("The card's own rates", columns, rows, "An SAE that is read from a disk is moved to the card besides.")


if __name__ == "__main__":
    main()
