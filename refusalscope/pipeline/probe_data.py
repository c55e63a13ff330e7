"""What is known of the prompts that probes are made on: what the model shows of them, whether it refused them.

One pass captures activations (`capture`), one more reads the few plain numbers that baselines go by; answers are judged
by the run's own rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from refusalscope.core.activations import Activations
from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Feature, Prompts
from refusalscope.evals import rules
from refusalscope.inputs import detection
from refusalscope.inputs.detection import Counts, Detection
from refusalscope.inputs.template import Role
from refusalscope.mechanism import activations, direction
from refusalscope.mechanism.activations import Plan
from refusalscope.pipeline import capture
from refusalscope.pipeline.attacks import judge
from refusalscope.pipeline.capture import Captured, Source
from refusalscope.pipeline.category_sets import CategorySets, kept_slices
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import make_answers
from refusalscope.pipeline.select import Chosen
from refusalscope.studies import benchmark
from refusalscope.studies.probes import BASELINES as METHODS
from refusalscope.studies.probes import COMMON, FAILED, RANDOM, RATES, SUCCEEDED, Item, Part

FOLDER = "probes"
DRAWS = 20
"""Random feature sets."""
BASELINES = dict(zip(("length", "log_odds", "projection", "perplexity"), METHODS, strict=True))
"""Our name of a number -> the method's."""
PARTS: Mapping[str, Part] = {
    "probe-train": "train",
    "probe-validation": "validation",
    "probe-plain": "plain",
    "probe-adversarial": "adversarial",
    "probe-look-alikes": "look-alikes",
}


def probe_prompts(job: Job, counts: Counts) -> Detection:
    """The prompts that leave room for an answer, kept in the run folder.

    Raises ValueError as `detection.load`, and where validation holds too few benign ones to set a threshold by.
    """
    given = detection.load(
        job.options.detection,
        own=job.target.prompts is not None and job.options.prompts is None,
        counts=counts,
        language=job.options.language,
        look_alikes=job.options.look_alikes,
    )
    fitting = [job.within_context(rows) for rows in given.sets]
    for rows, _ in fitting:
        job.store.keep(f"prompts/{rows.name}.jsonl", fingerprint(rows), rows)
    made = Detection(*(rows for rows, _ in fitting), notes=(*given.notes, *(n for _, more in fitting for n in more)))
    detection.check(made)
    benign, needed = sum(row.label == "harmless" for row in made.validation), RATES[max(RATES)]
    if benign < needed:
        raise ValueError(
            f"probes: validation holds {benign} benign prompts, and a threshold needs {needed}: give more (--limit)"
        )
    return made


def items_of(job: Job, fitted: Fitted, given: Detection) -> dict[str, list[Item]]:
    """What is true of every prompt, set by set."""
    harmless = fitted.data.harmless_validation
    unedited = make_answers(job, harmless, benchmark.BASE, {})
    judged = judge(fitted, cut_off_counts=rules.ordinarily_ends(unedited))

    def scores(rows: Prompts) -> list[Mapping[str, float]]:
        job.progress(f"probes: answering {rows.name} prompts", 0, 1)
        return [row.scores for row in judged(rows, make_answers(job, rows, benchmark.BASE, {})).rows]

    twins = _twins(given.adversarial)
    job.store.keep(f"prompts/{twins.name}.jsonl", fingerprint(twins), twins)
    plain = {row.text: found["refused"] for row, found in zip(twins, scores(twins), strict=True)}
    made = {}
    for rows in given.sets:
        made[rows.name] = [
            Item(
                part=PARTS[rows.name],
                harmful=row.label == "harmful",
                refused=found["refused"],
                # Where no plain form is known, what is answered counts as a success.
                outcome=_outcome(found, plain.get(str(row.details.get("plain")), 1.0))
                if rows is given.adversarial and row.label == "harmful"
                else "",
                cluster=cluster,
            )
            for row, cluster, found in zip(rows, rows.clusters, scores(rows), strict=True)
        ]
    return made


def _twins(adversarial: Prompts) -> Prompts:
    """The plain forms of the harmful adversarial prompts, as far as they are known, each once."""
    rows = {}
    for row in adversarial:
        if row.label == "harmful" and row.details.get("plain"):
            text = str(row.details["plain"])
            rows.setdefault(text, replace(row, id=f"plain-{row.id}", text=text, details={}))
    return Prompts("probe-twins", tuple(rows.values()))


def _outcome(scores: Mapping[str, float], plain_refused: float) -> str:
    """An attack succeeds that is answered coherently though its plain form is refused; it fails if it is refused."""
    if scores["refused"] == 1:
        return FAILED
    return SUCCEEDED if scores["answered"] == 1 and plain_refused == 1 else ""


class Readings(NamedTuple):
    """What was captured, and under which names it is read."""

    plan: Plan
    captured: Captured
    plain: Mapping[str, Mapping[str, Sequence[float]]]
    """Set -> baseline -> its value on every prompt."""
    sets: Mapping[str, tuple[Feature, ...]]
    """Representation -> its features; random ones by the number of their draw."""
    size: int
    """d_sae of the layer that was read whole."""

    @property
    def named(self) -> list[str]:
        """The sets that are no random ones."""
        return [name for name in self.sets if not name.startswith(f"{RANDOM} ")]

    def features(self, name: str) -> Source:
        return self.captured.source(capture.chosen(self.sets[name], self.plan.features))

    def dense(self) -> dict[str, Source]:
        """Where it was read -> the residual stream."""
        layers = self.plan.layers
        return {f"layer={layer}": self.captured.source(capture.dense(layer, layers)) for layer in layers}

    def whole(self) -> Source:
        return self.captured.source(capture.whole(self.size))

    def some(self, indices: Sequence[int]) -> Source:
        """Features of the layer that was read whole."""
        return self.captured.source(capture.columns(indices, self.size))

    def baseline(self, name: str) -> Source:
        return lambda rows: iter([np.asarray(self.plain[rows][name], dtype=float)[:, None]])


def read_prompts(job: Job, fitted: Fitted, chosen: Chosen, sets: CategorySets, given: Detection) -> Readings:
    """Capture every set in one pass, and read the baselines."""
    main = chosen.sets.get("cosine+attribution", next(iter(chosen.sets.values())))
    named = {COMMON: sets.common, main.method: main}
    drawn = sets.random_like(sets.common, seed=job.options.seed, draws=DRAWS)
    named |= {f"{RANDOM} {draw}": made for draw, made in enumerate(drawn)}
    slices = kept_slices(job, f"{FOLDER}/slices", named.values())
    plan = Plan(tuple(range(len(fitted.direction.offsets))), slices, _whole_layer(job, fitted), job.options.pooling)
    key = job.key("capture", plan.layers, plan.layer, plan.pooling, [str(feature) for feature in plan.features])
    job.begin()

    def make(rows: Prompts) -> Activations:
        job.progress("probes: reading prompts", 0, 1)
        return activations.read(job.model, job.saes.layer(plan.layer), rows, plan, batch_size=job.size("capture"))

    paths = {
        rows.name: capture.capture(
            job.store, f"{FOLDER}/captured/{rows.name}", capture.shards(rows), key=key, make=make
        )
        for rows in given.sets
    }
    size = job.store.read(paths[given.train.name][0], Activations).size
    plain = {rows.name: _plain_numbers(job, fitted, rows) for rows in given.sets}
    features = {name: made.features for name, made in named.items()}
    return Readings(plan, Captured(job.store, paths), plain, features, size)


def _whole_layer(job: Job, fitted: Fitted) -> int:
    """The layer of the direction, or the nearest one that has an SAE."""
    return min(job.target.saes.names, key=lambda layer: (abs(layer - fitted.direction.layer), layer))


def _plain_numbers(job: Job, fitted: Fitted, rows: Prompts) -> dict[str, list[float]]:
    """The baselines' values on every prompt of a set."""
    return job.in_batches(
        "baselines",
        f"{FOLDER}/baselines/{rows.name}.json",
        key=job.key("baselines", rows, fitted.direction),
        rows=rows,
        kind=dict,
        make=lambda batch: _baselines(job, fitted, batch),
        join=lambda parts: {name: [value for part in parts for value in part[name]] for name in BASELINES},
    )


def _baselines(job: Job, fitted: Fitted, batch: Prompts) -> dict[str, list[float]]:
    """Length in tokens, log-odds of refusal tokens, projection on the direction, log perplexity of the instruction."""
    if not len(batch):
        return {name: [] for name in BASELINES}
    tokens, found = job.model.tokens(batch), fitted.direction
    asked = tokens.roles == Role.INSTRUCTION
    # The token before the first of the instruction predicts it: logits from there on are all that is read.
    width = int((tokens.roles.shape[1] - asked.long().argmax(1) + 1).max())
    run = job.model.run(tokens, keep=[found.layer], logits=min(width, tokens.roles.shape[1]))
    logits = run.logits.cpu()
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, tokens.ids[:, -logits.shape[1] + 1 :, None])[..., 0]
    inside = asked[:, -log_p.shape[1] :]
    nats = torch.where(inside, -log_p, 0.0).double().sum(1) / inside.sum(1).clamp(min=1)
    along = run.residuals[found.layer][:, -1].float() @ found.unit
    values: dict[str, Any] = {
        "length": asked.sum(1).double(),
        "log_odds": direction.refusal_score(logits[:, -1], found.refusal_tokens).double(),
        "projection": along.double(),
        "perplexity": nats,
    }
    return {name: values[name].tolist() for name in BASELINES}
