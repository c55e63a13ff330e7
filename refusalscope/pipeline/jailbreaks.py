"""What attacks silence, on matched pairs, and whether setting it back brings refusal back.

A pair counts whose plain form is refused; its attack succeeded if it is answered, and failed if it is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Direction, Feature, Finding, Prompt, Prompts, SaeSlice
from refusalscope.evals import rules
from refusalscope.inputs import neutral
from refusalscope.inputs.template import Role
from refusalscope.pipeline.attacks import Grouped, group, judge
from refusalscope.pipeline.category_sets import CategorySets
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, make_answers, provenance
from refusalscope.pipeline.restoring import restore
from refusalscope.pipeline.sizes import WHOLE, Sizes
from refusalscope.studies import benchmark, jailbreaks
from refusalscope.studies.jailbreaks import Measured, Seen

FOLDER = "jailbreaks"


def run_jailbreaks(job: Job, fitted: Fitted, sets: CategorySets, *, sizes: Sizes = WHOLE) -> Finding:
    """Measure every pair and write `findings/jailbreaks.json`.

    Raises ValueError, one line, when all categories share no feature, or no pair is left.
    """
    if not len(sets.common):
        raise ValueError("no feature is in every category's set: there is nothing to look for in attacks (try --k)")
    harmless = fitted.data.harmless_validation
    unedited = make_answers(job, harmless, benchmark.BASE, {})
    judged = judge(fitted, cut_off_counts=rules.ordinarily_ends(unedited))
    grouped = group(job, judged, sizes.pairs)
    measured = _measured(job, fitted, sets, grouped)
    answered = dict(zip(harmless.ids, judged(harmless, unedited).score("answered"), strict=True))
    plain_harmless = harmless.keep(name for name, score in answered.items() if score == 1)
    restored = restore(job, fitted, sets, grouped, plain_harmless, judged, sizes)
    finding = jailbreaks.summarise(
        measured,
        restored,
        caveats=(
            *sizes.caveats("jailbreaks", job.options),
            *(*fitted.notes, *fitted.direction.caveats, *sets.notes, *grouped.notes),
        ),
        provenance=provenance(job, fitted, None) | {"common": fingerprint(sets.common)},
    )
    told = jailbreaks.explained(restored)
    job.store.keep(f"{FOLDER}/explained.json", fingerprint(told), told)
    return keep_finding(job.store, finding)


def _measured(job: Job, fitted: Fitted, sets: CategorySets, grouped: Grouped) -> Measured:
    """What features and projection show on both sides of every pair, and on a sham as long as the attack."""
    job.progress("jailbreaks: reading features", 0, 1)
    rows = grouped.adversarial
    twins = {twin.id: twin for twin in grouped.plain.values()}
    plain = Prompts("plain", tuple(twins.values()))
    sides = {"plain": plain, "adversarial": rows, "sham": _shams(job, grouped)}
    found = {name: _read(job, fitted.direction, sets.slices, side) for name, side in sides.items()}
    harmless = _read(job, fitted.direction, sets.slices, fitted.data.harmless_train)
    baseline = _mean_projection([seen["projection"] for seen in harmless.values()])
    order = {"plain": [grouped.plain[name].id for name in rows.ids], "adversarial": rows.ids, "sham": rows.ids}
    features = tuple(Feature(layer, i) for layer, part in sets.slices.items() for i in part.features.tolist())
    return Measured(
        features=features,
        common=tuple(sets.common.features),
        harm=np.array([_harm(sets, features, row) for row in rows]),
        families=tuple(str(row.details.get("family") or "unnamed") for row in rows),
        clusters=rows.clusters,
        outcomes=tuple(grouped.outcome[name] for name in rows.ids),
        **{side: _side([found[side][name] for name in names], baseline) for side, names in order.items()},
    )


def _harm(sets: CategorySets, features: Sequence[Feature], row: Prompt) -> list[bool]:
    """Which features are harm features for a prompt: its category's, or those of any where it has none."""
    own = sets.specific.get(row.category or "")
    chosen = list(sets.specific.values()) if own is None else [own]
    wanted = {feature for made in chosen for feature in made.features}
    return [feature in wanted for feature in features]


def _shams(job: Job, grouped: Grouped) -> Prompts:
    """Each plain form behind neutral words, as long as the attack; under the attack's id."""

    def make() -> Prompts:
        def count(text: str) -> int:
            return len(job.model.template.encode(text).ids)

        rows = []
        for row in grouped.adversarial:
            twin = grouped.plain[row.id]
            rows.append(replace(twin, id=row.id, text=neutral.sham(twin.text, tokens=count(row.text), count=count)))
        return Prompts("sham", tuple(rows))

    texts = {row.id: (row.text, grouped.plain[row.id].text) for row in grouped.adversarial}
    return job.store.get("prompts/sham.jsonl", job.key("sham", texts, list(neutral.SENTENCES)), Prompts, make)


def _read(job: Job, direction: Direction, slices: Mapping[int, SaeSlice], rows: Prompts) -> dict[str, Any]:
    """Prompt id -> what it shows, batch by batch."""
    chosen = {str(layer): part.features.tolist() for layer, part in slices.items()}
    return job.in_batches(
        "jailbreaks",
        f"{FOLDER}/seen/{rows.name}.json",
        key=job.key("jailbreaks", rows, direction.vector, direction.layer, chosen),
        rows=rows,
        kind=dict,
        make=lambda batch: _seen(job, direction, slices, batch),
        join=lambda parts: {name: seen for part in parts for name, seen in part.items()},
    )


def _seen(job: Job, direction: Direction, slices: Mapping[int, SaeSlice], batch: Prompts) -> dict[str, Any]:
    tokens = job.model.tokens(batch)
    residuals = job.model.run(tokens, keep={*slices, direction.layer}).residuals
    active = torch.cat([part.encode(residuals[layer].float()) for layer, part in slices.items()], -1)
    along = residuals[direction.layer].float() @ direction.unit
    found = {}
    for row, name in enumerate(tokens.prompt_ids):
        roles = tokens.roles[row]
        closing, asked = active[row][roles == Role.CLOSING], active[row][roles == Role.INSTRUCTION]
        found[name] = {
            "closing": closing.sum(0).tolist(),
            "total": asked.sum(0).tolist(),
            "highest": (asked.amax(0) if len(asked) else closing.new_zeros(closing.shape[1])).tolist(),
            "average": active[row][roles != Role.PADDING].mean(0).tolist(),
            "projection": along[row][roles == Role.CLOSING].tolist(),
        }
    return found


def _mean_projection(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean at each closing token, the last one first."""
    longest = max(map(len, rows))
    return [float(np.mean([row[-1 - at] for row in rows if len(row) > at])) for at in range(longest)]


def _side(seen: Sequence[Mapping[str, Any]], baseline: Sequence[float]) -> Seen:
    above = [
        sum(value - zero for value, zero in zip(reversed(row["projection"]), baseline, strict=False)) for row in seen
    ]
    arrays = {name: np.array([row[name] for row in seen]) for name in ("closing", "total", "highest", "average")}
    return Seen(**arrays, projection=np.array(above))
