"""A run folder of made-up nouns in the real formats, hostile strings included: what the report's tests are tried on."""

from dataclasses import replace

import torch

from refusalscope.core.store import Store
from refusalscope.core.types import Direction, Finding, LayerScores, NaN, Prompt, Prompts, Response, Responses, Row
from refusalscope.report.benchmark_plots import COSTS
from refusalscope.report.drawing import OUTCOMES
from refusalscope.report.health_plots import QUALITIES
from refusalscope.report.tables import DIFFERENCES

ATTACK = (
    "<script>alert('x')</script></details><img src=http://evil.example/x.png onerror=\"alert(1)\"> \u202e& {{ 7*7 }}"
)
EDIT = "scale c=-1 k=20"


def rate(dataset, method, metric, setting, estimate, n=50, coverage=1.0, width=0.05):
    if estimate is None:
        return Row(dataset, method, metric, setting, 0, None, None, None, 0.0)
    return Row(dataset, method, metric, setting, n, estimate, estimate - width, estimate + width, coverage)


def outcomes(dataset, method, setting, refused, answered, **details):
    shares = {"refused": refused, "answered": answered, "incoherent": 1 - refused - answered}
    return [rate(dataset, method, metric, setting, share, **details) for metric, share in shares.items()]


def benchmark_rows():
    rows = outcomes("harmful", "base", "", 0.94, 0.06)
    rows += [*outcomes("harmful", "cosine+attribution", EDIT, 0.1, 0.8)]
    rows += [rate("harmful", "cosine+attribution", "refused_change", EDIT, -0.84)]
    for draw in (0, 1):
        rows += outcomes("harmful", "random", f"{EDIT} draw={draw}", 0.9, 0.1)
    rows += outcomes("harmful", "random", f"{EDIT} mean", 0.9, 0.1, n=100)
    rows += outcomes("harmless", "base", "", 0.0, 1.0)
    rows += outcomes("harmless", "a new <method>", "", 0.02, 0.9, coverage=0.62)
    rows += [rate("never heard of", "base", metric, "", None) for metric in OUTCOMES]
    rows += outcomes("harmful-validation", "base", "", 0.95, 0.05)
    for factor, refused in ((0.5, 0.9), (-1, 0.1)):
        rows += outcomes("harmful-validation", "cosine+attribution", f"scale c={factor:g} k=20", refused, 1 - refused)
    rows += [rate("harmless", "cosine+attribution", metric, EDIT, 0.031, width=0.004) for metric in COSTS]
    return tuple(rows)


def health_rows():
    metrics = (*QUALITIES, "l0")
    return tuple(rate("harmless", "sae", m, f"layer={layer}", 0.9 - layer / 10) for layer in (0, 1) for m in metrics)


def answered(dataset, method, setting, text):
    scores, reasons = {"refused": 0.0, "answered": 1.0, "incoherent": 0.0}, {"answered": f"because {ATTACK}"}
    row = Response("p0", text, 1, 5, "length", scores, reasons)
    unscored = Response("p1", "nothing to see", None, 0, "end", dict.fromkeys(scores, NaN))
    return Responses(dataset, method, setting, (row, unscored), changed=1)


def make_run(folder, benchmark, health):
    store = Store(folder)
    options = {
        "model": "tiny",
        "prompts": "/home/ada lovelace/secret/p.csv",
        "limit": None,
        "derived": {"batch_size": 8},
    }
    about = {
        "model": f"tiny {ATTACK}",
        "title": f"Why does tiny refuse? {ATTACK}",
        "command": "refusalscope run tiny --prompts '/home/ada lovelace/secret/p.csv'",
        "options": options,
        "notices": ["tiny refuses 3 of 50 of /home/ada lovelace/secret/p.csv."],
        "versions": {"torch": "2.9"},
        "limit_tokens": 64,
        "refusal_token_texts": [" I", "</code>"],
    }
    store.put("run.json", "", about)
    store.put("findings/benchmark.json", "", benchmark)
    store.put("findings/health.json", "", health)
    scores = (LayerScores(1, 0.02, -3.5, 2.0, 0.01, -3.0), LayerScores(2, 0.5, 1.0, -1.0, 0.4, 1.5))
    direction = Direction(torch.ones(4), 1, torch.zeros(2), (7,), scores, {"harmful_train": 20}, ("Few prompts.",))
    store.put("direction.safetensors", "", direction)
    feature = {"layer": 1, "index": 9, "rank": 1, "score": 0.5, "promoted": [" sorry", ATTACK], "suppressed": []}
    chosen = {**feature, "method": "cosine+attribution", "chosen": 0.75, "stability": 1.0}
    plain = {**feature, "method": "cosine", "chosen": None, "stability": None}
    store.put("features/table.json", "", {"rows": [chosen, plain]})
    for dataset in ("harmful", "harmless"):
        rows = tuple(Prompt(f"p{i}", f"{dataset} prompt {i} {ATTACK}", dataset) for i in range(6))
        store.put(f"prompts/{dataset}.jsonl", "", Prompts(dataset, rows))
    for name, arm in {"base": ("base", ""), "edit": ("cosine+attribution", EDIT)}.items():
        store.put(f"responses/harmful/{name}.jsonl", "", answered("harmful", *arm, f"{name} said {ATTACK}"))
    return store


def new_benchmark_rows():
    """Methods compared in pairs, and refusal induced by setting features to a value."""
    pair = "cosine+attribution vs random"
    tested = {"p": 0.004, "family": "refused: cosine+attribution against every other method", "p_holm": 0.024}
    rows = [replace(rate("harmful", pair, metric, "k=20", 0.3, width=0.1), **tested) for metric in DIFFERENCES]
    rows += [rate("harmful", "any", "smallest_difference", "comparisons=6 discordant=8", 8 / 150, n=150, width=0)]
    rows += [rate("harmful", "any", "smallest_change", "comparisons=9", None)]
    rows += [rate("harmless", "direction", metric, "add", share) for metric, share in INDUCED.items()]
    for method, slope in (("cosine+attribution", 0.4), ("random", 0.02)):
        for value in (0.25, 0.5, 1, 2):
            shares = {"refused": min(0.95, slope * value), "coherent": 0.98 - 0.1 * value, "incoherent": 0.1 * value}
            setting = f"set v={value:g} k=20" + (" mean" if method == "random" else "")
            rows += [rate("harmless", method, metric, setting, share, width=0.04) for metric, share in shares.items()]
    return tuple(rows)


INDUCED = {"refused": 0.9, "coherent": 0.85}


def attribution_rows():
    terms = {"features": 1.0, "candidates": 0.8, "error": 0.3}
    return tuple(
        rate("harmful", "sound", metric, f"layer={layer}", scale * layer * (2 if metric == "error" else 1), width=0.1)
        for layer in (1, 2, 3)
        for metric, scale in terms.items()
    )


def verification_rows(**changes):
    """Every claim holds, unless a metric's estimates are changed: metric -> estimate."""

    def row(method, metric, setting, estimate, width):
        return rate("harmful-unseen", method, metric, setting, changes.get(metric, estimate), width=width)

    rows = [row("sound", "factored_error", f"layer={layer}", 3e-6 * layer, 1e-6) for layer in (1, 2)]
    rows += [row("layerwise", "completeness_error", f"layer={layer} nodes=16", 2e-4 * layer, 1e-4) for layer in (1, 2)]
    rows += [row("layerwise", "riemann_error", f"nodes={nodes}", 0.5 / nodes, 0.1 / nodes) for nodes in (4, 8, 16, 32)]
    rows += [row("sound", "node_error", "nodes=5", 0.011, 0.002)]
    alone = {"gradient": 0.97, "layerwise": 0.9, "sound": 0.8, "paper": 0.7}
    rows += [row(method, "alone_correlation", "", value, 0.02) for method, value in alone.items()]
    marginal = {"gradient": 0.8, "sound": 0.97, "paper": 0.96}
    return (*rows, *(row(method, "marginal_correlation", "", value, 0.02) for method, value in marginal.items()))


def findings():
    """The findings on the attributions themselves."""
    return (
        Finding("attribution", "How much do the features of each layer carry?", attribution_rows(), (), {}),
        Finding("verification", "Do the scores predict effects?", verification_rows(), (), {"dtype": "float32"}),
    )


LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
TOKENS = [
    "<bos>",
    "user",
    "\n",
    " How",
    " do",
    "\n\n",
    ATTACK,
    " ",
    "مرحبا",
    " \u202etxt",
    LONG,
    "<end>",
    "model",
    "\n",
]
ROLES = [*["header"] * 3, *["instruction"] * 8, *["closing"] * 3]


def strongest(place, label):
    activations = [0.0, 0.0, 0.0, 1.5, 0.0, 0.2, 3.0 + place, 0.0, 0.7, 0.1, 6.0, None, 0.0, 2.0]
    rows = {"tokens": TOKENS, "roles": ROLES, "activations": activations}
    return {"id": f"p{place}", "dataset": label, "label": label, **rows}


def detail(layer, index):
    chosen = {"method": "cosine+attribution", "k": 20, "rank": index, "score": 0.123, "chosen": 0.5, "stability": None}
    alone = {"factor": -1.0, "n": 40, "metric_change": [0.5, 0.3, 0.7], "flipped": [0.05, 0.01, 0.12]}
    return {
        "layer": layer,
        "index": index,
        "sets": [chosen, {**chosen, "method": "cosine", "chosen": None}] if index % 3 else [],
        "promoted": [" sorry", "\n", ATTACK, LONG] if index % 2 else [],
        "suppressed": [" Sure", "\u202e"],
        "active": {"harmful": 0.9, "harmless": 0.1},
        "strongest": [strongest(place, label) for place, label in enumerate(("harmful", "harmless", "look-alike"))],
        "alone": alone if index % 2 else None,
    }


def why(place, label):
    values = [0.0, 0.01, 0.0, 0.8, -0.3, 0.0, 1.4, 0.001, 0.2, 0.0, -0.6, 0.0, 0.4, 0.9]
    held = [
        {"layer": 1, "index": 9 + n, "values": [v / (n + 1) for v in values], "total": sum(values) / (n + 1)}
        for n in range(10)
    ]
    edits = [
        {"edit": "cosine+attribution, c = −1, k = 20", "metric": 2.5, "first_token": " Sure", "refused": False},
        {"edit": f"1/9 alone {ATTACK}", "metric": -1.5, "first_token": "\n", "refused": True},
    ]
    return {
        "id": f"p{place}",
        "dataset": label,
        "label": label,
        "tokens": TOKENS,
        "roles": ROLES,
        "refusal_token": " I",
        "answer_token": " Sure",
        "metric_clean": -3.25,
        "metric_removed": 2.125,
        "features": held,
        "rest": [v / 9 for v in values],
        "edits": edits if label == "harmful" else [],
    }


def add_new_rows(benchmark):
    """A benchmark finding with the rows of `new_benchmark_rows` as well."""
    return replace(benchmark, rows=(*benchmark.rows, *new_benchmark_rows()))


def add_close_up(store, features=44):
    """Into a run folder: features and prompts one by one, and the findings on the attributions."""
    pairs = [(1 + n // 16, 9 + n) for n in range(features)]
    store.put("features/details.json", "", {"features": [detail(*pair) for pair in pairs]})
    labels = ("harmful", "look-alike", "harmless")
    store.put("prompts/why.json", "", {"prompts": [why(place, label) for place, label in enumerate(labels)]})
    for finding in findings():
        store.put(f"findings/{finding.study}.json", "", finding)
    return store
