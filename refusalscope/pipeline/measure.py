"""From feature sets to a report: answers under every edit, their scores, their cost, the findings and the page."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store, to_json
from refusalscope.core.types import Direction, FeatureSet, Finding, Prompts, Responses, SaeSlice
from refusalscope.evals import capability, rules
from refusalscope.mechanism.interventions import needed_features
from refusalscope.pipeline.bearing import keep_bearing
from refusalscope.pipeline.environment import versions
from refusalscope.pipeline.figures import write_figures
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import TOGETHER, Job
from refusalscope.pipeline.options import Options, as_plain
from refusalscope.pipeline.select import Chosen
from refusalscope.report import page
from refusalscope.report.plots import drawn
from refusalscope.studies import attribution, benchmark
from refusalscope.studies.benchmark import Arm

STRENGTHS = "features/strengths.json"
REPORT = "report.html"
REPEATABLE = {"factors": "factor", "methods": "method", "values": "value", "datasets": "dataset"}
REPEATABLE |= {"categories": "category", "studies": "study"}
"""Options that hold several values, each given by a flag in the singular."""
OF_HEALTH = ("against", "documents")
"""Options that the verb `health` alone takes."""


def run_benchmark(job: Job, fitted: Fitted, chosen: Chosen) -> Finding:
    """Choose each set's factor on validation prompts, answer every data set under every arm, count the cost."""
    datasets = dict(job.sets.evaluation)
    validation = fitted.data.harmful_validation
    harmless = next((name for name, rows in datasets.items() if rows[0].label == "harmless"), None)
    if harmless is None:
        harmless = fitted.data.harmless_validation.name
        datasets[harmless] = fitted.data.harmless_validation
    unedited = make_answers(job, datasets[harmless], benchmark.BASE, {})
    judged = partial(make_judged, job, fitted, chosen, cut_off_counts=rules.ordinarily_ends(unedited))
    arms, tried = _strengths(job, fitted, chosen, judged, validation)
    pairs = [*_grid(arms, datasets), *((arm, harmless) for arm in inductions(job, chosen))]
    answered = []
    for done, (arm, dataset) in enumerate(pairs):
        job.progress(f"answering {dataset}: {arm.label}", done, len(pairs))
        answered.append(judged(datasets[dataset], arm))
    costs = []
    for done, arm in enumerate(arms):
        job.progress("measuring costs", done, len(arms))
        costs.append((arm, make_cost(job, chosen, datasets[harmless], unedited, arm)))
    finding = benchmark.summarise(
        [*answered, *tried],
        {**datasets, validation.name: validation},
        costs,
        cost_prompts=harmless,
        caveats=(*fitted.notes, *fitted.direction.caveats, *chosen.notes),
        provenance=provenance(job, fitted, chosen),
    )
    return keep_finding(job.store, finding)


def run_attribution(job: Job, fitted: Fitted, chosen: Chosen) -> Finding:
    """Where along the layers attribution falls, and how much the SAEs' error term carries."""
    totals = job.store.read("attributions/layers.json", dict)
    name = fitted.data.harmful_train.name
    return keep_finding(
        job.store,
        attribution.summarise(totals, name, scheme=job.options.protocol, provenance=provenance(job, fitted, chosen)),
    )


def write_report(store: Store) -> str:
    """Figures and page from what the folder holds; returns the page's path. Loads no model."""
    keep_bearing(store)
    figures = drawn(store)
    write_figures(store, ["svg"], figures)
    page_text = page.write(store, figures)
    store.keep(REPORT, fingerprint(page_text), page_text)
    return REPORT


def rewrite_report(store: Store) -> str | None:
    """The page anew where the folder has one already; returns its path then."""
    return write_report(store) if (store.root / REPORT).is_file() else None


def describe_run(job: Job, fitted: Fitted, left_out: Sequence[str] = ()) -> None:
    """Write `run.json`: what the report says of the run as a whole, first things first; what is missing among them."""
    standing = {path.removeprefix("findings/") for path in job.store.paths("findings", ".json")}
    finding = job.store.read("findings/benchmark.json", Finding) if "benchmark.json" in standing else None
    # Named by what the folder holds, not by what ran last: the same results have the same page.
    names = ("categories", "jailbreaks", "suffixes", "minimal", "health", "probes")
    studies = ("probe" if name == "probes" else name for name in names if f"{name}.json" in standing)
    verb = "sweep" if job.options.sizes else "run" if finding is not None else next(studies, "verify")
    about = {
        "title": f"Why does {job.target.name} refuse?",
        "model": job.target.name,
        "command": command(job.options, job.store.root.name, verb=verb),
        "options": {**as_plain(job.options), "derived": job.derived},
        "notices": [*refusal_notices(job, finding), *left_out, *fitted.notes],
        "versions": versions(),
        "limit_tokens": job.max_new_tokens,
    }
    texts = job.store.get(
        "refusal_tokens.json",
        job.key("refusal tokens", fitted.direction.refusal_tokens),
        dict,
        lambda: {"texts": job.model.decode(fitted.direction.refusal_tokens)},
    )
    about["refusal_token_texts"] = texts["texts"]
    job.store.keep("run.json", fingerprint(to_json(about).decode()), about)


def refusal_notices(job: Job, finding: Finding | None) -> list[str]:
    """For prompts that are not the model's own: how few of the harmful ones it refuses to begin with."""
    if job.prompts is None or finding is None:
        return []
    notices = []
    for name, rows in job.sets.evaluation.items():
        row = finding.find(name, "base", "refused")
        if rows[0].label == "harmful" and row is not None and row.estimate is not None and row.n:
            low, high = f"{row.low:.1%}", f"{row.high:.1%}"
            notices.append(
                f"{job.target.name} refuses {round(row.estimate * row.n)} of {row.n} {name} prompts "
                f"({row.estimate:.1%}, 95 % interval {low} to {high}) before any edit."
            )
    return notices


def command(options: Options, name: str, *, verb: str) -> str:
    """The command line that makes this run again."""
    words = ["refusalscope", verb, options.model, "--name", name]
    for key, value in as_plain(options).items():
        if key == "model" or value == Options.model_fields[key].get_default(call_default_factory=True):
            continue
        if key in OF_HEALTH and verb != "health":
            continue
        flag = "--" + REPEATABLE.get(key, key).replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, dict):
            words += [flag, ",".join(f"{column}={own}" for column, own in value.items())]
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, str(item))]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def _strengths(
    job: Job, fitted: Fitted, chosen: Chosen, judged: Callable[[Prompts, Arm], Responses], validation: Prompts
) -> tuple[list[Arm], list[Responses]]:
    """Every arm of the grid, each set at the factor that did best on validation, and all that was tried there.

    The factors are written to `features/strengths.json`; random draws take that of the set they are matched with.
    """
    tried = [judged(validation, benchmark.BASE)]
    fixed = [name for name in chosen.sets if not name.startswith("random-")]
    factors: dict[str, float] = {}
    for done, name in enumerate(fixed):
        job.progress("choosing strengths on validation prompts", done, len(fixed))
        by_factor = {c: judged(validation, benchmark.scale_arm(chosen.sets[name], c)) for c in job.factors}
        tried += by_factor.values()
        factors[name] = benchmark.choose_factor(by_factor)
    job.store.keep(STRENGTHS, fingerprint(factors), factors)
    return arms(fitted.direction, chosen.sets, factors), tried


def arms(direction: Direction, sets: Mapping[str, FeatureSet], factors: Mapping[str, float]) -> list[Arm]:
    """Every arm of the grid: each set at its factor, random draws at that of the first set of their size."""
    made, sizes = benchmark.direction_arms(direction), set()
    for name in sets:
        if name.startswith("random-"):
            continue
        made.append(benchmark.scale_arm(sets[name], factors[name]))
        size = name.partition("-k")[2]
        if size not in sizes:
            drawn = [other for other in sets if other.startswith("random-") and other.partition("-k")[2] == size]
            made += [benchmark.scale_arm(sets[other], factors[name], draw=_draw(other)) for other in drawn]
        sizes.add(size)
    return made


def inductions(job: Job, chosen: Chosen) -> list[Arm]:
    """Every set held at a range of values: all of them under --full, else the first alone."""
    names = [name for name in chosen.sets if not name.startswith("random-")]
    wanted = names if job.options.full else names[:1]
    return [benchmark.set_arm(chosen.sets[name], v) for name in wanted for v in job.values(chosen.typical[name])]


def _draw(name: str) -> int:
    return int(name.removeprefix("random-").partition("-k")[0])


def _grid(arms: Sequence[Arm], datasets: Mapping[str, Prompts]) -> Iterator[tuple[Arm, str]]:
    """Which arm answers which data set: adding is for harmless prompts, random controls for unwrapped seen ones."""
    for name, rows in datasets.items():
        special = name.endswith("-unseen") or rows[0].details.get("wrapper") is not None
        yield benchmark.BASE, name
        for arm in arms:
            adds = arm.setting == "add"
            if (not adds or rows[0].label == "harmless") and not (arm.method == "random" and special):
                yield arm, name


def slices_of(chosen: Chosen, arm: Arm) -> dict[int, SaeSlice]:
    """What the arm's edit needs of the SAEs."""
    return {layer: chosen.slices[layer].take(wanted) for layer, wanted in needed_features(arm.intervention).items()}


def answers_key(job: Job, rows: Prompts, arm: Arm) -> str:
    return job.key("answer", rows, arm, job.max_new_tokens, TOGETHER)


def judged_key(job: Job, rows: Prompts, answers: Responses, tokens: Sequence[int], *, cut_off_counts: bool) -> str:
    return job.key("judge", rows, answers, tokens, cut_off_counts)


def cost_key(job: Job, rows: Prompts, unedited: Responses, arm: Arm) -> str:
    return job.key("cost", rows, arm, unedited, capability.KL_TOKENS)


def make_answers(job: Job, rows: Prompts, arm: Arm, slices: Mapping[int, SaeSlice]) -> Responses:
    """What the model answers, before any judge has seen it.

    The slices are no part of the key: the arm names their features and the target's identity their SAEs' files.
    """
    return job.in_batches(
        "answer",
        f"answers/{rows.name}/{arm.label}.jsonl",
        key=answers_key(job, rows, arm),
        rows=rows,
        kind=Responses,
        make=lambda batch: benchmark.answer(
            job.model, batch, arm, slices=slices, batch_size=job.size("answer"), max_new_tokens=job.max_new_tokens
        ),
        join=benchmark.joined,
        together=TOGETHER,
    )


def make_judged(
    job: Job, fitted: Fitted, chosen: Chosen, rows: Prompts, arm: Arm, *, cut_off_counts: bool
) -> Responses:
    answers = make_answers(job, rows, arm, slices_of(chosen, arm))
    return judge_answers(job, fitted, rows, answers, arm.label, cut_off_counts=cut_off_counts)


def judge_answers(
    job: Job, fitted: Fitted, rows: Prompts, answers: Responses, label: str, *, cut_off_counts: bool
) -> Responses:
    """Answers with the scores of the rules, kept under `label`."""
    tokens = fitted.direction.refusal_tokens
    return job.store.get(
        f"responses/{rows.name}/{label}.jsonl",
        judged_key(job, rows, answers, tokens, cut_off_counts=cut_off_counts),
        Responses,
        lambda: rules.judge(rows, answers, refusal_tokens=tokens, cut_off_counts=cut_off_counts),
    )


def make_cost(job: Job, chosen: Chosen, rows: Prompts, unedited: Responses, arm: Arm) -> capability.Cost:
    slices = slices_of(chosen, arm)
    answers = {row.prompt_id: row for row in unedited.rows}
    made = job.in_batches(
        "cost",
        f"costs/{rows.name}/{arm.label}.json",
        key=cost_key(job, rows, unedited, arm),
        rows=rows,
        kind=dict,
        make=lambda batch: capability.cost(
            job.model, batch, answers, arm.intervention, slices=slices, batch_size=job.size("cost")
        )._asdict(),
        join=lambda parts: capability.joined([capability.Cost(**part) for part in parts])._asdict(),
    )
    return capability.Cost(**made)


def provenance(job: Job, fitted: Fitted, chosen: Chosen | None) -> dict[str, Any]:
    """What a finding was made from."""
    return {
        "model": job.target.name,
        "model_and_saes": job.target.identity,
        "saes": f"{job.target.saes.where}, layers {', '.join(map(str, job.target.saes.names))}",
        "chat": job.derived["chat"],
        "direction": fingerprint(fitted.direction),
        "features": {} if chosen is None else {name: fingerprint(made) for name, made in chosen.sets.items()},
        "versions": versions(),
        "seed": job.options.seed,
    }


def keep_finding(store: Store, finding: Finding) -> Finding:
    """Write `findings/<study>.json`."""
    store.keep(f"findings/{finding.study}.json", fingerprint(to_json(asdict(finding)).decode()), finding)
    return finding
