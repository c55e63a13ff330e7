"""How far each quadrature rule is from the mean gradient, pass by pass: what the default number of nodes rests on.

    python benchmarks/quadrature.py --size small --json benchmarks/results/quadrature.json

Left Riemann (published), midpoint and Gauss-Legendre (default) are held to 256 Gauss-Legendre nodes on two paths: the
testbed's, from refused prompts to its own refusal direction removed, and that of a random model with large weights,
whose largest direction is removed: no run of it ever came near the points on the way. A pass is one forward and one
backward. Sums over nodes are taken in float64, so that what is left where errors stop falling is the model's own
float32; the same in float64 shows it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import measuring
import synthetic
import torch
from jaxtyping import Float64
from measuring import bar, curve, table
from synthetic import Shape
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from refusalscope.core.scores import Trace
from refusalscope.core.types import Direction, Prompts
from refusalscope.evals import rules
from refusalscope.inputs import prompts as sources
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import LayerSae, SaeBank
from refusalscope.mechanism import attribution, direction, features, reading
from refusalscope.mechanism.attribution import Metric, Quadrature
from refusalscope.testbed.shipped import ASSETS

TOLERANCES = (0.02, 0.01, 0.001)
SHOWN = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20)
K = 20
PUBLISHED = ("left Riemann", 10)
DEFAULT = ("Gauss-Legendre", attribution.NODES)


class Size(NamedTuple):
    """Prompts attributed, those of a class that the direction is fitted on, passes of each rule, of the reference.

    And how many layers the random model has.
    """

    prompts: int
    fitted: int
    counts: tuple[int, ...]
    reference: int
    layers: int


SIZES = {
    "toy": Size(2, 24, (1, 5, 10), 12, 2),
    "small": Size(5, 128, tuple(range(1, 21)), 256, 6),
    "full": Size(64, 128, tuple(range(1, 21)), 256, 6),
}


def midpoint(count: int) -> Quadrature:
    """Nodes in the middle of equal steps, with equal weights; its error falls as 1/count^2."""
    return Quadrature(tuple((k + 0.5) / count for k in range(count)), (1 / count,) * count)


RULES: dict[str, Callable[[int], Quadrature]] = {
    "left Riemann": attribution.left_riemann,
    "midpoint": midpoint,
    "Gauss-Legendre": attribution.gauss_legendre,
}


class Path(NamedTuple):
    """What is integrated along: from prompts as they are to a direction removed; with SAEs, scores are compared too."""

    name: str
    model: ChatModel
    prompts: Prompts
    direction: Direction
    saes: tuple[LayerSae, ...] = ()


class Exact(NamedTuple):
    """A path's ends and metric, and what the reference makes of them."""

    trace: Trace
    gradient: Float64[Tensor, "layer token d_model"]
    scores: Float64[Tensor, "feature"]


class Error(NamedTuple):
    """Relative to the reference, by norms; `shared` counts the reference's `K` best features among the rule's."""

    gradient: float
    scores: float
    shared: int


Errors = Mapping[tuple[str, int], Error]
"""(rule, passes) -> error."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser(__doc__, tuple(SIZES)).parse_args(argv)
    return measuring.finish("quadrature", options, result(SIZES[options.size]))


def result(size: Size) -> dict[str, Any]:
    """Every rule on both paths in float32, and the default rule on the testbed's in float64."""
    counts = list(product(RULES, size.counts))
    paths = [on_testbed(size), off_manifold(size)]
    exact = {path.name: exactly(path, size.reference) for path in paths}
    found = {path.name: errors(path, exact[path.name], counts) for path in paths}
    alone = [(rule, count) for rule, count in counts if rule == DEFAULT[0]]
    double = in_float64(paths[0])
    finer = errors(double, exactly(double, size.reference), alone)
    taken = [run_takes(path, exact[path.name]) for path in paths]
    tables = [error_table(path, found[path.name]) for path in paths]
    return {
        "ratios": ratios(found),
        "bars": bars(found["testbed"], taken),
        "tables": [*tables, fewest_table(found, size.counts[-1]), taken_table(paths, taken)],
        "curves": [drawn(path, found[path.name], finer if path is paths[0] else {}) for path in paths],
    }


def on_testbed(size: Size) -> Path:
    """Refused prompts of the grammar, the testbed's fitted direction, its SAEs."""
    model = ChatModel.load(ASSETS / "model", name="testbed", identity="testbed", device="cpu")
    sets = sources.from_testbed(count=1, full=False, train=size.fitted, validation=size.fitted // 2)
    fitted = direction.find(
        *(model, direction.FitData(*(sets.fitting[name] for name in sources.FITTING))),
        batch_size=64,
        is_refusal=lambda text: bool(rules.refused_by_phrase(text).score),
    )
    asked = sets.fitting["harmful-train"]
    first = direction.first_tokens(model, asked, batch_size=64).argmax.tolist()
    refused = [name for name, token in zip(asked.ids, first, strict=True) if token in fitted.refusal_tokens]
    bank = SaeBank.from_folders({n: ASSETS / f"saes/layer_{n}" for n in range(len(model.layers))}, identity="testbed")
    saes = tuple(bank.layer(layer) for layer in bank.layers)
    return Path("testbed", model, asked.keep(refused[: size.prompts]), fitted, saes)


def off_manifold(size: Size) -> Path:
    """A random Llama with weights 15 times the usual, and the mean residual of its middle layer as the direction."""
    torch.manual_seed(0)
    model = synthetic.llama(Shape(size.layers, 128), initializer_range=0.3)
    asked, middle = synthetic.asked(model, size.prompts), size.layers // 2
    mean = model.run(model.tokens(asked), keep=[middle]).residuals[middle][:, -1].mean(0)
    return Path("off the manifold", model, asked, Direction(mean, middle, torch.zeros(size.layers), (0,), (), {}))


def in_float64(path: Path) -> Path:
    """The same in float64 throughout: transformers takes its norms in float32 whatever the model's type."""
    path.model.model.double()
    for part in path.model.model.modules():
        if isinstance(part, LlamaRMSNorm):

            def forward(z: Tensor, norm: LlamaRMSNorm = part) -> Tensor:
                return norm.weight * z * (z.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

            part.forward = forward  # type: ignore[method-assign]
    return path._replace(name=f"{path.name}, float64", saes=())


def exactly(path: Path, nodes: int) -> Exact:
    layers = range(len(path.model.layers))
    tokens = path.model.tokens(path.prompts)
    trace = attribution.trace(path.model, tokens, path.direction, layers=layers, scheme=attribution.gradient())
    gradient = mean_gradient(path, trace, attribution.gauss_legendre(nodes))
    return Exact(trace, gradient[:, tokens.mask], scores_of(path, trace, gradient))


def errors(path: Path, exact: Exact, counts: Sequence[tuple[str, int]]) -> Errors:
    """Each rule at each count against the reference."""
    best = set(exact.scores.topk(min(K, len(exact.scores))).indices.tolist())
    found = {}
    for rule, count in counts:
        gradient = mean_gradient(path, exact.trace, RULES[rule](count))
        scores = scores_of(path, exact.trace, gradient)
        shared = len(best.intersection(scores.topk(min(K, len(scores))).indices.tolist()))
        apart = relative(gradient[:, exact.trace.roles != 0], exact.gradient)
        found[rule, count] = Error(apart, relative(scores, exact.scores), shared)
    return found


def relative(one: Tensor, exact: Tensor) -> float:
    return float((one - exact).norm() / exact.norm().clamp(min=1e-30))


def mean_gradient(path: Path, trace: Trace, rule: Quadrature) -> Float64[Tensor, "layer prompt position d_model"]:
    """`joint`'s, node by node, summed in float64."""
    tokens = path.model.tokens(path.prompts)
    clean, ends = (dict(zip(trace.layers, part, strict=True)) for part in (trace.clean, trace.patched))
    metric = Metric(trace.answer, trace.refusal, trace.metric_clean, trace.metric_patched, trace.flipped)
    total = torch.zeros(trace.clean.shape, dtype=torch.float64)
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        at = attribution.joint(Quadrature((node,), (1.0,)))
        at_node = at(path.model, tokens, clean, ends, metric, len(tokens.ids))
        total += weight * torch.stack([at_node[layer] for layer in trace.layers])
    return total


def scores_of(path: Path, trace: Trace, gradient: Tensor) -> Float64[Tensor, "feature"]:
    """Mean attribution of every feature that moves, all layers' one after the other; none without SAEs."""
    if not path.saes:
        return torch.zeros(0, dtype=torch.float64)
    whole = [replace(trace, gradient=gradient.float())]
    entries = [reading.layer_entries(sae, whole, None)[0] for sae in path.saes]
    made = features.prompt_scores(reading.assemble(whole, entries), method="attribution")
    found = torch.zeros(len(path.saes), path.saes[0].size, dtype=torch.float64)
    for feature, score in zip(made.features, made.values.double().mean(0), strict=True):
        found[feature.layer, feature.index] = score
    return found.flatten()


class Taken(NamedTuple):
    """What a run would do on a path: the nodes that its own check ends with, and how far off these are."""

    nodes: int
    change: float
    error: float


def run_takes(path: Path, exact: Exact) -> Taken:
    check = attribution.enough_nodes(path.model, path.prompts, path.direction, layers=exact.trace.layers)[-1]
    gradient = mean_gradient(path, exact.trace, attribution.gauss_legendre(check.nodes))
    return Taken(check.nodes, check.change, relative(gradient[:, exact.trace.roles != 0], exact.gradient))


def fewest(found: Errors, rule: str, tolerance: float) -> int | None:
    """Passes from which on the error stays within the tolerance, as far as was tried."""
    counts = sorted(count for name, count in found if name == rule)
    last = max((count for count in counts if found[rule, count].gradient > tolerance), default=0)
    return min((count for count in counts if count > last), default=None)


def ratios(found: Mapping[str, Errors]) -> dict[str, float]:
    """How much closer the default comes than the published rule, at half its passes."""
    testbed = found["testbed"]
    return {"error of published over default, testbed": testbed[PUBLISHED].gradient / testbed[DEFAULT].gradient}


def bars(testbed: Errors, taken: Sequence[Taken]) -> list[dict[str, Any]]:
    default = testbed[DEFAULT]
    return [
        bar("error of the default rule's mean gradient, testbed", default.gradient, most=0.001),
        bar("error of the default rule's scores, testbed", default.scores, most=0.001),
        bar(f"of the {K} features chosen, those that the reference chooses too, testbed", default.shared, least=K),
        *(
            bar(f"error at the nodes that a run's check ends with, {name}", one.error, most=attribution.NODE_TOLERANCE)
            for name, one in zip(("testbed", "off the manifold"), taken, strict=True)
        ),
    ]


def error_table(path: Path, found: Errors) -> dict[str, Any]:
    """Rules side by side; scores and chosen sets too where there are SAEs."""
    counts = [count for count in SHOWN if (DEFAULT[0], count) in found]
    parts = ["gradient", "scores", "shared"] if path.saes else ["gradient"]
    named = {"gradient": "gradient", "scores": "scores", "shared": f"of {K}"}
    columns = ["passes", *(f"{rule}: {named[part]}" for rule, part in product(RULES, parts))]
    rows = [[count, *(getattr(found[rule, count], part) for rule, part in product(RULES, parts))] for count in counts]
    note = "Norm of the difference over the norm of the reference, over all layers and tokens."
    if path.saes:
        note += f" Scores: of every feature of all layers, means over prompts; of {K}: of the reference's {K} best."
    return table(f"Error of the mean gradient: {path.name}", columns, rows, note)


def fewest_table(found: Mapping[str, Errors], most: int) -> dict[str, Any]:
    rows = []
    for (name, part), rule in product(found.items(), RULES):
        needed = [fewest(part, rule, tolerance) for tolerance in TOLERANCES]
        rows.append([name, rule, *(f"more than {most}" if count is None else count for count in needed)])
    columns = ["path", "rule", *(f"{100 * tolerance:g} %" for tolerance in TOLERANCES)]
    return table("Fewest passes for an error of the mean gradient within", columns, rows)


def taken_table(paths: Sequence[Path], taken: Sequence[Taken]) -> dict[str, Any]:
    rows = [[path.name, one.nodes, one.change, one.error] for path, one in zip(paths, taken, strict=True)]
    columns = ["path", "nodes", "change when doubled, four prompts", "error, all prompts"]
    note = f"It doubles the nodes from {attribution.NODES} while that moves the gradient by more than 2 %."
    return table("Where a run's own check of the nodes ends", columns, rows, note)


def drawn(path: Path, found: Errors, finer: Errors) -> dict[str, Any]:
    def points(part: Errors, rule: str) -> list[tuple[float, float]]:
        return [(count, error.gradient) for (name, count), error in part.items() if name == rule]

    series = {rule: points(found, rule) for rule in RULES}
    if finer:
        series[f"{DEFAULT[0]}, float64"] = points(finer, DEFAULT[0])
    return curve(f"Error of the mean gradient: {path.name}", "passes", "relative error", series)


if __name__ == "__main__":
    main()
