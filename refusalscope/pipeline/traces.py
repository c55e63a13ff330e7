"""Which prompts a model refuses, and their traces under one scheme: kept on disk batch by batch, or in memory."""

from refusalscope.core.scores import Trace
from refusalscope.core.types import Prompts
from refusalscope.mechanism import attribution, direction
from refusalscope.mechanism.attribution import Scheme
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job

TRACES = "attributions"
"""Where kept traces lie in a run folder."""


def refused_prompts(job: Job, fitted: Fitted, rows: Prompts, *, size: int) -> Prompts:
    """The prompts whose first token refuses; all of them under --keep-unrefused."""
    return rows if job.options.keep_unrefused else opening_refused(job, fitted, rows, size=size)


def opening_refused(job: Job, fitted: Fitted, rows: Prompts, *, size: int) -> Prompts:
    """The prompts whose first token refuses."""
    first = direction.first_tokens(job.model, rows, batch_size=size).argmax.tolist()
    return rows.keep(
        prompt for prompt, token in zip(rows.ids, first, strict=True) if token in fitted.direction.refusal_tokens
    )


def kept_traces(job: Job, fitted: Fitted, rows: Prompts, scheme: Scheme, key: str) -> list[Trace]:
    """Traces of all prompts under one scheme, each batch kept on disk until the feature sets are written."""

    def make(part: Prompts) -> Trace:
        job.progress(f"attribution: gradients ({scheme.name})", rows.ids.index(part.ids[0]), len(rows))
        return trace_of(job, fitted, part, scheme)

    path = f"{TRACES}/{scheme.name}"
    parts = job.parts("features", path, key=key, rows=rows, kind=Trace, make=make)
    return [job.store.read(part, Trace) for part in parts]


def trace_of(job: Job, fitted: Fitted, rows: Prompts, scheme: Scheme) -> Trace:
    """The trace of one batch."""
    tokens = job.model.tokens(rows).to(job.model.device)
    return attribution.trace(job.model, tokens, fitted.direction, layers=job.saes.layers, scheme=scheme)


def make_traces(job: Job, fitted: Fitted, rows: Prompts, scheme: Scheme, *, size: int) -> list[Trace]:
    """Traces of a few prompts, batch by batch, in memory alone."""
    starts = range(0, len(rows), size)
    made = []
    for start in starts:
        job.progress(f"attribution: gradients ({scheme.name})", start, len(rows))
        made.append(trace_of(job, fitted, rows[start : start + size], scheme))
    return made
