"""By which way do a category's own features act on refusal? Past the common ones, and past normalisation; prints JSON.

    python benchmarks/category_paths.py runs/testbed

The run folder is one of `refusalscope categories`, whose options and sets are read. Each category's held-out prompts
meet the features of its own (F_H, as many as the study compares) scaled by the study's factor, and those of every other
category. The mean change of m under its own minus that under the others' is given four ways: common features (F_R) free
or held at their clean values, and every RMS norm computed anew or with the denominators of the clean run. What holding
takes away acts through the common features; what freezing adds was hidden by the residual stream's growing shorter.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refusalscope.core import stats
from refusalscope.core.types import SaeSlice, layers_of
from refusalscope.inputs.categories import slug
from refusalscope.mechanism.effects import contrast, metric_under
from refusalscope.mechanism.interventions import HoldFeatures, ScaleFeatures, Together, editor, record
from refusalscope.pipeline import category_sets, fit
from refusalscope.pipeline.category_sets import CategorySets, strength
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import RUN_FILE, make
from refusalscope.pipeline.traces import opening_refused

BATCH = 64
WAYS = tuple(product(("free", "held"), ("own", "kept")))


class Norms:
    """The RMS norms of a Llama model, whose denominators can be kept and used again."""

    def __init__(self, model: nn.Module) -> None:
        self.kept: dict[int, Tensor] = {}
        self.mode = "own"
        norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]
        if not norms:
            raise SystemExit(f"{type(model).__name__} has no LlamaRMSNorm: only Llama models can be measured")
        for module in norms:
            module.forward = self._forward(module)

    def _forward(self, module: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
            if self.mode == "keep":
                self.kept[id(module)] = scale
            elif self.mode == "kept":
                scale = self.kept[id(module)]
            return module.weight * (x.float() * scale).to(x.dtype)

        return forward

    @contextmanager
    def under(self, mode: str) -> Iterator[None]:
        """`keep` the denominators of what runs inside, or use those `kept`."""
        self.mode = mode
        try:
            yield
        finally:
            self.mode = "own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run
    torch.set_num_threads(1)
    job = Job(make({}, folder / RUN_FILE), folder)
    fitted = job.run(fit.fit)
    sets = job.run(lambda job: category_sets.choose_category_sets(job, fitted))
    print(json.dumps(report(job, fitted, sets), indent=1))


def report(job: Job, fitted: Fitted, sets: CategorySets) -> dict[str, Any]:
    """Way -> category -> own minus transfer, with Holm's correction over the categories."""
    norms = Norms(job.model.model)
    slices = job.saes.slices(layers_of(list(sets.whole.values())))
    found: dict[str, dict[str, Any]] = {}
    for name in sets.whole:
        clusters, changes = measure(job, fitted, sets, name, slices, norms)
        for way, sides in changes.items():
            own, others = sides[name], np.mean([side for other, side in sides.items() if other != name], 0).tolist()
            estimate = stats.mean([a - b for a, b in zip(own, others, strict=True)], clusters)
            found.setdefault(way, {})[slug(name)] = {
                "own": float(np.mean(own)),
                "own minus transfer": estimate.estimate,
                "interval": (estimate.low, estimate.high),
                "p": stats.paired_p(own, others, clusters),
                "prompts": len(own),
                "intents": len(set(clusters)),
            }
    for rows in found.values():
        for row, corrected in zip(rows.values(), stats.holm([row["p"] for row in rows.values()]), strict=True):
            row["p holm"] = corrected
    return found


def measure(
    job: Job, fitted: Fitted, sets: CategorySets, name: str, slices: Mapping[int, SaeSlice], norms: Norms
) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """Clusters of a category's usable prompts; way -> whose set is scaled -> the change of m, prompt by prompt."""
    clusters: list[str] = []
    changes = {f"F_R {rest}, norms {norm}": {other: [] for other in sets.whole} for rest, norm in WAYS}
    refused = opening_refused(job, fitted, sets.prompts.test[name], size=BATCH)
    common = {layer: slices[layer].take(indices) for layer, indices in sets.common.by_layer().items()}
    for batch, tokens in job.model.batches(refused, BATCH):
        seen = contrast(job.model, tokens, fitted.direction)
        with norms.under("keep"):
            job.model.run(tokens, logits=1)
        held = HoldFeatures(sets.common, record(job.model, batch, common, batch_size=BATCH))
        usable = seen.flipped.tolist()
        clusters += [cluster for cluster, keep in zip(batch.clusters, usable, strict=True) if keep]
        for other, (rest, norm) in product(sets.whole, WAYS):
            scaled = ScaleFeatures(sets.specific[other].top(sets.size), strength(job))
            edit = Together((scaled, held)) if rest == "held" else scaled
            edits = editor(edit, layers=len(job.model.layers), slices=slices).edits
            with norms.under(norm):
                moved = metric_under(job.model, seen, edits).metric - seen.clean
            changes[f"F_R {rest}, norms {norm}"][other] += moved[seen.flipped].tolist()
    return clusters, changes


if __name__ == "__main__":
    main()
