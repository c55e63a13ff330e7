"""What each verb does: one line an arrow, each arrow one artifact or a few, read where they stand."""

from collections.abc import Callable, Mapping
from pathlib import Path

from refusalscope.inputs import detection, sources
from refusalscope.pipeline import (
    categories,
    category_sets,
    explain,
    feature_labels,
    fit,
    graph,
    health,
    jailbreaks,
    measure,
    minimal,
    probes,
    select,
    suffixes,
    sweep,
    verify,
    whole,
)
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import Options


def _reported(job: Job, fitted: Fitted, *done: str) -> str:
    """Describe what the run folder now holds, look up its features' labels and write its page; the page's path.

    Studies that are done are no longer left out.
    """
    whole.keep_reasons(job.store, dict.fromkeys(done))
    measure.describe_run(job, fitted, whole.left_out(job.store))
    feature_labels.keep_labels(job)
    return measure.write_report(job.store)


def run_chain(job: Job) -> str:
    """The whole job: each line one arrow. Returns the page's path in the run folder."""
    fitted = fit.fit(job)
    chosen = select.choose_features(job, fitted)
    measure.run_benchmark(job, fitted, chosen)
    health.run_health(job, fitted)
    measure.run_attribution(job, fitted, chosen)
    explain.explain_features(job, fitted, chosen)
    explain.explain_prompts(job, fitted, chosen)
    if job.options.full:
        verify.run_verification(job, fitted)
    whole.run_studies(job, fitted, chosen)
    return _reported(job, fitted)


def features_chain(job: Job) -> str:
    """The first half: a direction and feature sets."""
    select.choose_features(job, fit.fit(job))
    return "features/table.json"


def benchmark_chain(job: Job) -> str:
    """As `run`, without the health of the SAEs and the page."""
    fitted = fit.fit(job)
    measure.run_benchmark(job, fitted, select.choose_features(job, fitted))
    measure.describe_run(job, fitted, whole.left_out(job.store))
    return "findings/benchmark.json"


def verify_chain(job: Job) -> str:
    """Hold the attributions of this model to their oracles."""
    fitted = fit.fit(job)
    verify.run_verification(job, fitted)
    return _reported(job, fitted)


def sweep_chain(job: Job) -> str:
    """Every set size and factor on validation prompts."""
    fitted = fit.fit(job)
    sweep.run_sweep(job, fitted, select.choose_features(job, fitted))
    return _reported(job, fitted)


def choosing_chain(job: Job) -> str:
    """As `sweep`, and the chosen strength becomes options for a run."""
    page = sweep_chain(job)
    sweep.write_choice(job)
    return page


def categories_chain(job: Job) -> str:
    """Features by kind of harm, what each does, and which drive which."""
    fitted = fit.fit(job)
    sets = category_sets.choose_category_sets(job, fitted)
    categories.run_categories(job, fitted, sets)
    graph.run_graph(job, fitted, sets)
    return _reported(job, fitted, "categories", "graph")


def minimal_chain(job: Job) -> str:
    """The fewest features that flip each prompt, and those that wake up."""
    fitted = fit.fit(job)
    minimal.run_minimal(job, fitted, select.choose_features(job, fitted))
    return _reported(job, fitted, "minimal")


def jailbreaks_chain(job: Job) -> str:
    """What attacks silence, on matched pairs."""
    fitted = fit.fit(job)
    jailbreaks.run_jailbreaks(job, fitted, category_sets.choose_category_sets(job, fitted))
    return _reported(job, fitted, "jailbreaks")


def health_chain(job: Job) -> str:
    """What the SAEs keep of this model, against a second set if one is named."""
    health.check(job)
    fitted = fit.fit(job)
    health.run_health(job, fitted)
    return _reported(job, fitted)


def suffixes_chain(job: Job) -> str:
    """What each word of a suffix silences."""
    fitted = fit.fit(job)
    suffixes.run_suffixes(job, fitted, category_sets.choose_category_sets(job, fitted))
    return _reported(job, fitted, "suffixes")


def probes_chain(job: Job) -> str:
    """Which representation tells harmful prompts from benign ones, in any form; and a guard."""
    fitted = fit.fit(job)
    chosen = select.choose_features(job, fitted)
    probes.run_probes(job, fitted, chosen, category_sets.choose_category_sets(job, fitted))
    return _reported(job, fitted, "probes")


CHAINS: Mapping[str, Callable[[Job], str]] = {
    "run": run_chain,
    "features": features_chain,
    "verify": verify_chain,
    "benchmark": benchmark_chain,
    "categories": categories_chain,
    "minimal": minimal_chain,
    "jailbreaks": jailbreaks_chain,
    "suffixes": suffixes_chain,
    "probe": probes_chain,
    "health": health_chain,
    "sweep": sweep_chain,
    "choose": choosing_chain,
}
"""Each makes what it makes in the run folder and returns the path of what to look at."""
STUDIES = ("categories", "minimal", "jailbreaks", "suffixes", "probe")
"""Those that go beyond the benchmark."""


def check(verb: str, options: Options) -> None:
    """Raise ValueError for options that a verb cannot honour, before anything is made."""
    for name in ("category_prompts", "pairs", "suffixes", "detection", "look_alikes"):
        named = getattr(options, name)
        if name == "detection" and named is not None and Path(named).is_dir():
            detection.check_folder(Path(named))
        elif named is not None:
            sources.local(str(named), option=f"--{name.replace('_', '-')}")
    if verb in STUDIES and options.protocol == "paper":
        raise ValueError(
            f"--protocol paper reproduces the published benchmark alone: leave it out of `{verb}`, or use `run`"
        )
