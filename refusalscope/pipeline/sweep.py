"""Every set size and factor on validation prompts, and the one to use written down; the test prompts stay untouched."""

import textwrap
from functools import partial
from typing import Any

import tomli_w

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import FeatureSet, Finding
from refusalscope.evals import rules
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, make_answers, make_cost, make_judged, provenance
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.select import Chosen
from refusalscope.report import strength
from refusalscope.report.settings import factor, value_set
from refusalscope.studies import benchmark, sweep
from refusalscope.studies.sweep import Cell

CHOSEN = "chosen.toml"
"""Options for a run at the chosen strength."""


def run_sweep(job: Job, fitted: Fitted, chosen: Chosen) -> Finding:
    """Answer, judge and cost every cell, and write `findings/sweep.json`.

    Scaling is judged on harmful validation prompts, setting on harmless ones, costs are read on the latter's answers.
    """
    harmful, harmless = (fitted.validation[f"{label}-validation"] for label in ("harmful", "harmless"))
    unedited = make_answers(job, harmless, benchmark.BASE, {})
    judged = partial(make_judged, job, fitted, chosen, cut_off_counts=rules.ordinarily_ends(unedited))
    base = {rows.name: judged(rows, benchmark.BASE) for rows in (harmful, harmless)}
    sets = _sets(job.options, chosen)
    main = chosen.sets[(name := job.options.wanted_methods[0])]
    tried = [(harmful, made, c, benchmark.scale_arm(made, c)) for made in sets for c in dict.fromkeys(job.factors)]
    tried += [(harmless, main, v, benchmark.set_arm(main, v)) for v in dict.fromkeys(job.values(chosen.typical[name]))]
    cells: dict[str, list[Cell]] = {harmful.name: [], harmless.name: []}
    for done, (rows, made, amount, arm) in enumerate(tried):
        job.progress(f"sweep: {arm.label}", done, len(tried))
        answers, cost = judged(rows, arm), make_cost(job, chosen, harmless, unedited, arm)
        cells[rows.name].append(Cell(len(made), amount, answers, cost))
    finding = sweep.summarise(
        cells[harmful.name],
        cells[harmless.name],
        base,
        {rows.name: rows for rows in (harmful, harmless)},
        cost_prompts=harmless.name,
        caveats=(*fitted.notes, *fitted.direction.caveats, *chosen.notes),
        provenance=provenance(job, fitted, chosen),
    )
    return keep_finding(job.store, finding)


def _sets(options: Options, chosen: Chosen) -> list[FeatureSet]:
    """The best features of every size; sizes that the set cannot fill are one."""
    largest = chosen.sets[options.set_name(options.wanted_methods[0], max(options.sizes or (options.k,)))]
    sizes = sorted({min(size, len(largest)) for size in options.sizes or ()})
    return [largest.top(size) for size in sizes]


def write_choice(job: Job) -> None:
    """Write the chosen strength, and all else that a run shares with this sweep, to `chosen.toml`.

    Raises ValueError, one line, when no strength does anything.
    """
    finding = job.store.read("findings/sweep.json", Finding)
    found = finding.provenance["chosen"]
    scale = factor(found["scale"]["setting"]) if "scale" in found else None
    if scale is None:
        raise ValueError(f"{strength.sentences(finding)[0]} There is nothing to choose: try other --factor or --sizes")
    shared = job.options.model_dump(mode="json", exclude_defaults=True, exclude={"sizes"})
    asked = {"k": int(scale[1]), "factors": [scale[0]], "methods": [job.options.wanted_methods[0], "random"]}
    # A value belongs to the set that it was tried on.
    value = value_set(found["set"]["setting"]) if "set" in found else None
    value = value if value is not None and value[1] == scale[1] else None
    options: dict[str, Any] = {"model": job.options.model, **shared, **asked}
    options |= {} if value is None else {"values": [value[0]]}
    why = [line for sentence in strength.sentences(finding) for line in textwrap.wrap(sentence, 116)]
    comment = "".join(f"# {line}\n" for line in why)
    text = comment + tomli_w.dumps(options)
    job.store.keep(CHOSEN, fingerprint(text), text)
