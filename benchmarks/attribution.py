"""Attribution against its published formulation: time, peak memory and equality on the same model, prompts and machine.

    python benchmarks/attribution.py --size small --json benchmarks/results/attribution.json

(a) is the formulation as published: SAEs in the graph at every layer and step, parameters with gradients, logits at all
positions. (b) is the same done well: parameters frozen, logits at the last position alone (`published.py`). Ours
attributes all features, or ten candidates a layer, by the same rule and number of nodes. Times of ours include reading
each SAE from its file, which (a) and (b) have in memory before the clock starts. Memory is the peak beyond the loaded
model, with the SAEs that are held: all of them, or the one in use and the next.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import measuring
import published
import synthetic
import torch
from measuring import MEGABYTE, bar, table
from synthetic import Bench, Shape
from torch import Tensor

from refusalscope.core.memory import give_back
from refusalscope.inputs.saes import LayerSae
from refusalscope.mechanism import attribution
from refusalscope.mechanism.attribution import Quadrature, Scheme, gauss_legendre, left_riemann
from refusalscope.mechanism.reading import Entries, layer_entries

CANDIDATES = list(range(10))
PUBLISHED, OURS = ("(a)", "(b)"), ("all features", "candidates")
LEAST = {("(a)", "candidates"): 20, ("(b)", "candidates"): 10, ("(a)", "all features"): 12, ("(b)", "all features"): 8}


class Ladder(NamedTuple):
    """The rung that is promised, with the published rule, and the others around a smaller one, with fewer nodes."""

    base: Shape
    nodes: int
    around: Shape
    axes: Mapping[str, tuple[int, ...]]
    few: int


AXES = {
    "width": (128, 512, 1024),
    "features": (2048, 8192),
    "layers": (12, 18),
    "prompts": (32, 128),
    "positions": (64, 256),
}
"""d_sae stays 16 x d_model where d_model moves, and is 8 and 32 x d_model where it moves alone."""
SIZES = {
    "toy": Ladder(Shape(3, 32, 256, 2, 8), 2, Shape(3, 32, 256, 2, 8), {"layers": (4,)}, 1),
    "small": Ladder(Shape(6, 512, 16384, 8, 64), 10, Shape(6, 256, 4096, 8, 16), AXES, 2),
    "full": Ladder(Shape(6, 512, 16384, 8, 64), 10, Shape(6, 256, 4096, 8, 64), AXES, 10),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = measuring.parser(__doc__, list(SIZES)).parse_args(argv)
    return measuring.finish("attribution", options, measure(SIZES[options.size], options.device))


def measure(ladder: Ladder, device: str) -> dict[str, Any]:
    base = rung(ladder.base, left_riemann(ladder.nodes), device, rounds=2)
    gain = {way: median(base.seconds[way]) / median(base.seconds[f"{way}, default"]) for way in OURS}
    rungs = {"promised": base, "around": rung(ladder.around, gauss_legendre(ladder.few), device)}
    for axis, values in ladder.axes.items():
        for value in values:
            rungs[f"{axis} {value}"] = rung(_moved(ladder.around, axis, value), gauss_legendre(ladder.few), device)
    ratios = {f"{name} over {way}": base.over(name, way) for name in PUBLISHED for way in OURS}
    memory = {f"memory of (a) over {way}": base.megabytes["(a)"] / base.megabytes[way] for way in OURS}
    bars = [
        bar(f"{name} takes so many times as long as {way}", base.over(name, way), least=n)
        for (name, way), n in LEAST.items()
    ]
    bars += [bar(f"peak {name}", value, least=4) for name, value in memory.items()]
    bars.append(bar("relative difference of all attributions from (a) and (b), at most", base.difference, most=1e-4))
    return {"ratios": ratios | memory, "bars": bars, "tables": [_ladder(rungs), _quadrature(base, gain)]}


def _moved(shape: Shape, axis: str, value: int) -> Shape:
    return shape._replace(**{axis: value}, **({"features": 16 * value} if axis == "width" else {}))


class Rung(NamedTuple):
    """One shape, every way."""

    shape: Shape
    nodes: int
    seconds: Mapping[str, list[float]]
    megabytes: Mapping[str, float]
    difference: float
    """Largest over both published ways of |ours - theirs| / |theirs|, where the activation moved in both."""
    apart: int
    """Activations that moved in one of the two alone: within rounding of their threshold."""

    def over(self, name: str, way: str) -> float:
        return median(self.seconds[name]) / median(self.seconds[way])


def rung(shape: Shape, rule: Quadrature, device: str, rounds: int = 1) -> Rung:
    """Ours are timed `rounds` times, before and after the published ways, which take minutes, once."""
    with TemporaryDirectory() as folder:
        bench = synthetic.load(shape, Path(folder), device)
        default = attribution.sound()
        scheme = Scheme("sound", attribution.joint(rule))
        ways = {way: _ours(bench, scheme, CANDIDATES if way == "candidates" else None) for way in OURS}
        if rounds > 1:
            ways |= {
                f"{way}, default": _ours(bench, default, CANDIDATES if way == "candidates" else None) for way in OURS
            }
        seconds = measuring.interleaved(ways, rounds, device=device)
        # What the heap keeps is a fifth of ours, and never twice the same.
        held = 2 * _sae_size(shape)
        peaks = {way: median([_peak(ways[way], device, held) for _ in range(rounds)]) for way in OURS}
        found = _dense(ways["all features"](), shape)
        difference, apart = 0.0, 0
        for name in PUBLISHED:
            whole = {layer: _in_memory(bench.saes.layer(layer)) for layer in bench.saes.layers}
            made: dict[int, Tensor] = {}

            def run(whole: Any = whole, made: Any = made, careless: bool = name == "(a)") -> None:
                model, tokens, direction = bench.model, bench.tokens, bench.direction
                made |= published.attribute(model, whole, tokens, direction, rule, careless=careless)

            with measuring.peak(device) as most:
                seconds[name] = [measuring.timed(run, device=device)]
            peaks[name] = most.megabytes + shape.layers * _sae_size(shape)
            bench.model.model.requires_grad_(False).zero_grad(set_to_none=True)
            for layer, theirs in made.items():
                both = (found[layer] != 0) & (theirs.cpu() != 0)
                off = ((found[layer] - theirs.cpu()) * both).norm() / theirs.norm().cpu()
                difference = max(difference, float(off))
                apart += int(((found[layer] != 0) ^ (theirs.cpu() != 0)).sum())
            del whole, made
            give_back()
    return Rung(shape, len(rule.nodes), seconds, peaks, difference, apart)


def _ours(bench: Bench, scheme: Scheme, features: list[int] | None) -> Callable[[], list[Entries]]:
    """One whole attribution from tokens to scores: a batch as `attribute` reads it."""
    layers = bench.saes.layers

    def run() -> list[Entries]:
        made = attribution.trace(bench.model, bench.tokens, bench.direction, layers=layers, scheme=scheme)
        return [layer_entries(sae, [made], features)[0] for sae in bench.saes.each()]

    return run


def _peak(run: Callable[[], Any], device: str, held: float) -> float:
    give_back()
    with measuring.peak(device) as most:
        run()
    return most.megabytes + held


def _sae_size(shape: Shape) -> float:
    return 2 * shape.width * shape.features * 4 / MEGABYTE


def _in_memory(sae: LayerSae) -> LayerSae:
    """Its tensors no longer mapped off the file: what a program that keeps its SAEs has."""
    for part in sae.sae.parameters():
        part.data = part.data.clone()
    return sae


def _dense(entries: list[Entries], shape: Shape) -> dict[int, Tensor]:
    made = {}
    for part in entries:
        made[part.layer] = torch.zeros(shape.prompts, shape.positions, shape.features)
        made[part.layer][part.prompt, part.position, part.feature] = part.value
    return made


def _ladder(rungs: Mapping[str, Rung]) -> dict[str, Any]:
    rows = []
    for made in rungs.values():
        shape = made.shape
        times = [f"{median(made.seconds[way]):.3g} s, {made.megabytes[way]:.0f} MB" for way in (*PUBLISHED, *OURS)]
        ratios = [made.over(name, way) for way in OURS for name in PUBLISHED]
        names = (shape.layers, shape.width, shape.features, shape.prompts, shape.positions, made.nodes)
        rows.append([*names, *times, *ratios, f"{made.difference:.0e}, {made.apart}"])
    columns = ["layers", "d_model", "d_sae", "prompts", "positions", "nodes", *PUBLISHED, *OURS]
    columns += [f"{name} over {way}" for way in OURS for name in PUBLISHED]
    note = (
        "Random Llama models in the proportions of Llama 2, random JumpReLU SAEs that fire about 50 features a token. "
        "The last column is the largest relative difference of ours from (a) and (b), and how many activations moved "
        "in one of the two alone, being within rounding of their threshold."
    )
    return table("The ladder; its first rung is the one that is promised", [*columns, "difference"], rows, note)


def _quadrature(base: Rung, gain: Mapping[str, float]) -> dict[str, Any]:
    rows = [[way, median(base.seconds[way]), median(base.seconds[f"{way}, default"]), gain[way]] for way in OURS]
    columns = [
        "",
        f"left Riemann, {base.nodes} nodes: s",
        f"Gauss-Legendre, {attribution.NODES} nodes: s",
        "saved, times",
    ]
    note = "On the first rung, besides what is compared above at equal nodes; what accuracy a rule gives stands below."
    return table("What the better quadrature saves", columns, rows, note)


if __name__ == "__main__":
    main()
