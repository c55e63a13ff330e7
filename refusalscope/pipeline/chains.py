"""What each verb does: one line an arrow, each arrow one artifact or a few, read where they stand."""

from collections.abc import Callable, Mapping

from refusalscope.pipeline import explain, fit, measure, select, sweep, verify
from refusalscope.pipeline.job import Job


def run_chain(job: Job) -> str:
    """The whole job: each line one arrow. Returns the page's path in the run folder."""
    fitted = fit.fit(job)
    chosen = select.choose_features(job, fitted)
    measure.run_benchmark(job, fitted, chosen)
    measure.run_health(job, fitted)
    measure.run_attribution(job, fitted, chosen)
    explain.explain_features(job, fitted, chosen)
    explain.explain_prompts(job, fitted, chosen)
    if job.options.full:
        verify.run_verification(job, fitted)
    measure.describe_run(job, fitted)
    return measure.write_report(job.store)


def features_chain(job: Job) -> str:
    """The first half: a direction and feature sets."""
    select.choose_features(job, fit.fit(job))
    return "features/table.json"


def benchmark_chain(job: Job) -> str:
    """As `run`, without the health of the SAEs and the page."""
    fitted = fit.fit(job)
    measure.run_benchmark(job, fitted, select.choose_features(job, fitted))
    measure.describe_run(job, fitted)
    return "findings/benchmark.json"


def verify_chain(job: Job) -> str:
    """Hold the attributions of this model to their oracles."""
    fitted = fit.fit(job)
    verify.run_verification(job, fitted)
    measure.describe_run(job, fitted)
    return measure.write_report(job.store)


def sweep_chain(job: Job) -> str:
    """Every set size and factor on validation prompts."""
    fitted = fit.fit(job)
    sweep.run_sweep(job, fitted, select.choose_features(job, fitted))
    measure.describe_run(job, fitted)
    return measure.write_report(job.store)


def choosing_chain(job: Job) -> str:
    """As `sweep`, and the chosen strength becomes options for a run."""
    page = sweep_chain(job)
    sweep.write_choice(job)
    return page


CHAINS: Mapping[str, Callable[[Job], str]] = {
    "run": run_chain,
    "features": features_chain,
    "verify": verify_chain,
    "benchmark": benchmark_chain,
    "sweep": sweep_chain,
    "choose": choosing_chain,
}
"""Each makes what it makes in the run folder and returns the path of what to look at."""
