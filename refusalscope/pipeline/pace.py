"""How long a run will take here: this model's pace on a few prompts, times the work that its options ask for.

Meant to be right within a factor of two. The work is counted in `workload`.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from refusalscope.core.types import Feature, FeatureSet, Prompts
from refusalscope.inputs.chat import ChatModel, Edits
from refusalscope.mechanism.interventions import ScaleFeatures, editor
from refusalscope.pipeline.patient import Patient
from refusalscope.pipeline.workload import Pace, Work

STEPS = (8, 32, 128)
"""Answer tokens that a pace is measured on, more of them as long as it takes less than ..."""
ENOUGH = 0.5
"""... seconds."""
TRIES = 3
"""Of what takes less, the least time of so many tries counts."""
PAGE = 7.0
"""Seconds for the page with its figures."""


def measure(patient: Patient) -> Pace:
    """This model's pace under an edit of every layer, as most of a run is under edits."""
    model, rows = patient.model, _cycled(patient)
    features = [Feature(n, int(i)) for n, opened in patient.opened.items() for i in opened.slice.features]
    edit = ScaleFeatures(FeatureSet("identity", tuple(features), (0.0,) * len(features)), 1.0)
    slices = {layer: opened.slice for layer, opened in patient.opened.items()}
    edits = editor(edit, layers=len(model.layers), slices=slices).edits

    few, many = max(1, len(rows) // 8), len(rows)
    patient.job.progress("measuring the pace", 0, 1)
    most = patient.job.max_new_tokens
    short, long = (_stepped(model, some, edits, most) for some in (rows[:few], rows))
    row = max(long.seconds - short.seconds, 0.0) / max(1, many - few)
    tokens = model.tokens(rows)
    forward = _timed(lambda: model.run(tokens, edits=edits, logits=1).logits.cpu()).seconds
    opened = [one.seconds for one in patient.opened.values()]
    return Pace(
        token=forward / tokens.ids.numel(),
        step=max(long.seconds - many * row, 0.0),
        row=row,
        sae=median(opened) if opened else 0.0,
        encoded=patient.encoding,
        prompt=tokens.ids.numel() / many,
        batch=many,
        answer=long.answer,
    )


class _Stepped(NamedTuple):
    """How answering one batch went."""

    seconds: float
    """Per step, the prompt's own aside."""
    answer: int | None
    """Tokens of the longest answer, if all of them came to an end."""


def _stepped(model: ChatModel, rows: Prompts, edits: Edits, most: int) -> _Stepped:
    """Answer a batch at ever greater length, `most` at most, until its steps can be told from its prompt."""
    tokens, answers, seconds = model.tokens(rows), (), 0.0
    prompt = _timed(lambda: model.generate(tokens, edits=edits, max_new_tokens=1, recordable=True)).seconds
    for limit in (min(step, most) for step in STEPS):
        found = _timed(
            lambda limit=limit: model.generate(tokens, edits=edits, max_new_tokens=1 + limit, recordable=True)
        )
        answers, seconds = found.made, found.seconds - prompt
        if seconds > ENOUGH or all(answer.finish == "end" for answer in answers):
            break
    steps = max(answer.tokens for answer in answers)
    ended = all(answer.finish == "end" for answer in answers)
    return _Stepped(max(seconds, 0.0) / max(1, steps - 1), steps if ended else None)


def _cycled(patient: Patient) -> Prompts:
    """One full batch of the few prompts, repeated where they do not fill it."""
    data = patient.trials[0]
    pool = [*data.harmful_train, *data.harmless_train]
    return Prompts("pace", tuple(pool[at % len(pool)] for at in range(patient.batch)))


class _Timed(NamedTuple):
    seconds: float
    made: Any


def _timed(do: Callable[[], Any]) -> _Timed:
    """What is quick is done again, and the least time counts: the first time is slower, and so is a busy machine."""
    tries: list[_Timed] = []
    while not tries or (len(tries) < TRIES and sum(one.seconds for one in tries) < ENOUGH):
        started = time.monotonic()
        made = do()
        tries.append(_Timed(time.monotonic() - started, made))
    return min(tries, key=lambda one: one.seconds)


def seconds(works: Sequence[Work], pace: Pace) -> float:
    """What all of them take together, and the page."""
    return PAGE + sum(work.seconds(pace) for work in works)


def told(works: Sequence[Work], pace: Pace) -> tuple[str, ...]:
    """A line for every part, and one for the pace."""
    lines = []
    for work in works:
        kinds = {
            "answers": sum(work.answers),
            "forward passes": work.prompts + work.chats,
            "gradients": work.gradients,
            "SAEs opened": work.saes,
        }
        said = ", ".join(f"{count:,.0f} {kind}" for kind, count in kinds.items() if count)
        lines.append(f"{work.name:26}{work.seconds(pace) / 60:6.1f} min  {said}")
    step = pace.step + pace.batch * pace.row
    rates = f"{1 / pace.token:,.0f} prompt tokens/s, {pace.batch / max(step, 1e-9):,.0f} answer tokens/s"
    lines.append(f"pace: {rates} in batches of {pace.batch}; {pace.sae:.1f} s to open an SAE")
    return tuple(lines)
