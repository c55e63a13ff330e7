"""What a run comes to in work, part by part, and how long that takes at a given pace.

Counted from options and sizes alone, before anything is known of what the model will do: answers at their full length,
no set of features short, every study that is wanted. What is not the model's (resampling, fits) is a constant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from refusalscope.inputs import prompts
from refusalscope.mechanism.direction import DEPTH
from refusalscope.pipeline.explain import HELD_OUT
from refusalscope.pipeline.job import VALUE_SHARES, Job
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.sizes import Sizes, sizes_of_run

BACKWARD = 3
"""Forward passes that take as long as one with its gradient."""
NODES = 5
"""Of the quadrature, which takes more only where they do not suffice."""
CATEGORIES, COMMON = 7, 8
"""Kinds of harm, and features that all of them share: about as many as were found."""


class Pace(NamedTuple):
    """Seconds, measured here."""

    token: float
    """Of a forward pass, per prompt token in a full batch."""
    step: float
    """Of generation, per step of a batch whatever its size."""
    row: float
    """And per row and step."""
    sae: float
    """Per SAE that is opened."""
    encoded: float
    """Per token that one layer's SAE encodes."""
    prompt: float
    """Not seconds: mean tokens of a prompt, padding included."""
    batch: int
    """Not seconds: prompts per batch."""
    answer: int | None
    """Not seconds: tokens of the longest answer, if all ended when the pace was measured; None: they may go on."""


@dataclass(frozen=True)
class Work:
    """What some part of a run comes to."""

    name: str
    prompts: int = 0
    """Forward passes of a single prompt."""
    chats: int = 0
    """The same of a prompt with its answer."""
    gradients: int = 0
    """Of a prompt, with a backward pass."""
    answers: tuple[int, ...] = ()
    """Prompts that are answered together, one number for each edit of each set."""
    saes: int = 0
    """SAEs that are opened."""
    encoded: int = 0
    """Prompts times layers whose features are all computed."""
    tokens: int = 0
    """Of an answer."""
    statistics: float = 2.0
    """Seconds for what is not the model's: resampling, fits of probes, files."""

    def seconds(self, pace: Pace) -> float:
        """What this takes, the constant part included."""
        rows = sum(self.answers)
        batches = sum(ceil(some / pace.batch) for some in self.answers)
        read = self.prompts + rows + BACKWARD * self.gradients
        length = self.tokens if pace.answer is None else min(self.tokens, pace.answer)
        forward = (read * pace.prompt + self.chats * (pace.prompt + length)) * pace.token
        generated = length * (batches * pace.step + rows * pace.row)
        opened = self.saes * pace.sae + self.encoded * pace.prompt * pace.encoded
        return forward + generated + opened + self.statistics


def counted(job: Job, layers: int) -> list[Work]:
    """The parts of a run with these options, each with its work."""
    options, sizes, saes = job.options, sizes_of_run(job.options), len(job.target.saes.names)
    made = [_direction(job, layers), _features(job, saes), _benchmark(job), _health(job, saes), _explained(job)]
    wanted = options.wanted_studies
    if {"categories", "jailbreaks", "suffixes", "probes"} & set(wanted):
        made.append(_category_sets(job, sizes, saes))
    studies: dict[str, Sequence[Work]] = {
        "categories": (_categories(job, sizes, saes), _graph(job, sizes)),
        "minimal": (_minimal(sizes, saes),),
        "jailbreaks": (_jailbreaks(job, sizes, saes),),
        "suffixes": (_suffixes(job, sizes, saes),),
        "probes": (_probes(job, sizes, saes),),
    }
    return [*made, *(work for name in wanted for work in studies[name])]


def _rows(job: Job, name: str) -> int:
    """Prompts of a fitting set; of a run without one, as many as the model's own has."""
    found = job.given.fitting.get(name)
    whole = prompts.TRAIN_COUNT if name.endswith("train") else prompts.VALIDATION_COUNT
    return whole if found is None else len(found)


def _direction(job: Job, layers: int) -> Work:
    harmful, harmless, held_harmful, held_harmless = (_rows(job, name) for name in prompts.FITTING)
    tried = 1 if job.best_layer is not None else ceil(DEPTH * layers)
    # First tokens and means; then for each layer what removing it twice and adding it do.
    held = held_harmful * (1 + 2 * tried) + held_harmless * (2 + 3 * tried)
    return Work("direction", prompts=2 * (harmful + harmless) + held)


def _features(job: Job, saes: int) -> Work:
    harmful = _rows(job, "harmful-train")
    return Work("features", prompts=3 * harmful, gradients=NODES * harmful, saes=2 * saes, encoded=harmful * saes)


def _benchmark(job: Job) -> Work:
    options, answers = job.options, []
    sets = len([m for m in options.wanted_methods if m != "random"]) * len(options.set_sizes)
    draws = options.random_draws * len(options.set_sizes) if "random" in options.wanted_methods else 0
    held = _rows(job, "harmful-validation")
    answers += [held] * (1 + sets * len(job.factors))
    harmless = _rows(job, "harmless-validation")
    for name, rows in job.given.evaluation.items():
        special = name.endswith("-unseen") or rows[0].details.get("wrapper") is not None
        adds = rows[0].label == "harmless"
        harmless = len(rows) if adds else harmless
        answers += [len(rows)] * (3 + adds + sets + (0 if special else draws))
    values = len(options.values or job.target.values or VALUE_SHARES) * (sets if options.full else 1)
    chats = 2 * (3 + sets + draws) * harmless
    tokens = job.max_new_tokens
    return Work("benchmark", answers=(*answers, *[harmless] * values), chats=chats, tokens=tokens, statistics=6.0)


def _health(job: Job, saes: int) -> Work:
    held, kinds = _rows(job, "harmless-validation"), 2 + (job.target.prompts is not None)
    rows = held * kinds
    return Work(
        "SAE health",
        prompts=2 * (_rows(job, "harmful-train") + _rows(job, "harmless-train")),
        chats=rows * (1 + 3 * saes),
        answers=(held,),
        saes=saes,
        encoded=rows * saes,
        tokens=job.max_new_tokens,
    )


def _explained(job: Job) -> Work:
    sets = sum(method != "random" for method in job.options.wanted_methods)
    alone = sets * sum(job.options.set_sizes) * HELD_OUT
    fitting = _rows(job, "harmful-train") + _rows(job, "harmless-train")
    return Work("explanations", prompts=fitting + alone, gradients=HELD_OUT)


def _asked(options: Options, count: int) -> int:
    return options.limit or count


def _kinds(job: Job, sizes: Sizes) -> tuple[int, int]:
    """Kinds of harm, and prompts of each."""
    named = job.options.categories
    return CATEGORIES if named is None else len(named), _asked(job.options, sizes.category_prompts)


def _category_sets(job: Job, sizes: Sizes, saes: int) -> Work:
    kinds, count = _kinds(job, sizes)
    each = 4 * count + 2 * _rows(job, "harmless-train")
    return Work(
        "features of kinds of harm",
        prompts=kinds * each,
        gradients=kinds * count * NODES,
        saes=(kinds + 1) * saes,
        encoded=kinds * count * saes,
    )


def _categories(job: Job, sizes: Sizes, saes: int) -> Work:
    kinds, count = _kinds(job, sizes)
    # All, three subsets and two of every other kind, held and free; three controls a draw.
    edits = 7 + 4 * (kinds - 1) + 3 * sizes.edit_draws
    answered = 8 + 2 * sizes.answered_draws + (kinds - 1 if sizes.answered_transfers else 0)
    return Work(
        "kinds of harm",
        prompts=kinds * count * (edits + 8),
        answers=(count,) * (kinds * answered),
        saes=saes,
        tokens=job.max_new_tokens,
        statistics=8.0,
    )


def _graph(job: Job, sizes: Sizes) -> Work:
    kinds, count = _kinds(job, sizes)
    factors = len({0.0, *(job.options.factors or (job.target.published_factor or 0.0,))[:1]})
    driven = kinds * count * (1 + 3 * sizes.drive_draws) * factors
    edges = sizes.edge_prompts * 2 * job.options.nodes * factors
    return Work("graph", prompts=driven + edges, gradients=sizes.edge_prompts * job.options.nodes, statistics=6.0)


def _minimal(sizes: Sizes, saes: int) -> Work:
    count = sizes.minimal_prompts
    # About sixty sets of each prompt are tried while pruning, a few hundred more where all are enumerated.
    tried = count * (60 + 2 * sizes.woken_draws) + 300 * sizes.enumerated
    return Work(
        "minimal sets",
        prompts=tried,
        gradients=count * NODES,
        answers=(count,) * 26,
        saes=2 * saes,
        encoded=count * saes,
        tokens=20,
    )


def _jailbreaks(job: Job, sizes: Sizes, saes: int) -> Work:
    pairs = _asked(job.options, sizes.pairs)
    kinds = 4 if job.target.prompts is not None and job.options.pairs is None else 1
    arms = 3 + COMMON + 3 * sizes.restored_draws
    return Work(
        "attacks",
        prompts=(2 + kinds) * pairs + _rows(job, "harmless-train") + arms * sizes.restored,
        answers=(pairs, kinds * pairs, *[sizes.restored] * arms),
        saes=saes,
        tokens=job.max_new_tokens,
        statistics=15.0,
    )


def _suffixes(job: Job, sizes: Sizes, saes: int) -> Work:
    goals = _asked(job.options, sizes.goals)
    # Some suffixes and shams a goal; those that turn it are read word by word, with and without each word.
    return Work(
        "suffixes",
        prompts=64 * goals,
        gradients=NODES * goals,
        answers=(goals, 4 * goals, 3 * goals),
        saes=saes,
        tokens=job.max_new_tokens,
    )


def _probes(job: Job, sizes: Sizes, saes: int) -> Work:
    # Both classes to learn from, plain and adversarial; half as many to choose by, and as many to test on.
    part = _asked(job.options, sizes.probe_prompts)
    rows = 7 * part
    fits = rows / 60
    return Work(
        "probes",
        prompts=2 * rows,
        answers=(part,) * 7,
        saes=saes,
        encoded=rows,
        tokens=job.max_new_tokens,
        statistics=fits,
    )
