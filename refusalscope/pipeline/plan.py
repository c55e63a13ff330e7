"""What a run will hold in memory, stage by stage, and the batch sizes chosen from it; made before weights are read.

Counted are the weights, one layer's SAE, the next one where it is read ahead, and for each stage what it holds once and
what every prompt of a batch adds, for prompts as long as the longest. Stages that are not counted take the sizes of
the one they resemble; a stage that runs out of memory all the same is halved by `Job.run`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mode
from typing import Any, NamedTuple

from refusalscope.core.encoding import at_once
from refusalscope.core.types import Prompts
from refusalscope.evals.capability import DOCUMENT_TOKENS
from refusalscope.inputs.footprint import Footprint, is_mapped
from refusalscope.inputs.prompts import PromptSets
from refusalscope.inputs.saes import LayerSae
from refusalscope.inputs.template import ChatTemplate

LARGEST_BATCH = 64
LARGEST = {"answer": 256}
"""More where it pays: 150 answers of the testbed took .60 s at once and .69 with 64 rows (medians of five, in turn)."""
LARGEST_ON_CARD = {"features": 128}
"""More on a card, which is idle while the launches of a small batch are asked for: candidates of 100 prompts on
Gemma-2-2b (H200) took .85 s at once, 2.2 with 32 at a time and 4.7 with 16."""
SHARE = 0.7
"""Of the free memory, what a plan may fill: it counts tensors, not the workspace of operations or what others take."""
OWN = 100_000_000
"""Bytes of Python's objects and of what libraries hold: results, tables, the page and its figures."""
HEAP = 1.6
"""What the C library's heap takes for the tensors of a graph, over their own bytes: measured 1.5 (docs/memory.md)."""
FLOAT = 4
"""Bytes of a float32."""
EXPLAINED = 32
"""Prompts whose traces are in memory together while features are explained (`explain.HELD_OUT`)."""
LIKE = {
    **dict.fromkeys(("categories", "graph", "suffixes", "capture"), "direction"),
    **dict.fromkeys(("verify",), "explain"),
    **dict.fromkeys(("minimal", "restore"), "answer"),
    **dict.fromkeys(("baselines",), "cost"),
}
"""Stages of studies -> the stage that holds at least as much."""
WORDS = {
    "direction": "finding the direction",
    "features": "gradients",
    "explain": "explaining features",
    "answer": "answers",
    "cost": "costs of edits",
    "health": "health of the SAEs",
}


class Held(NamedTuple):
    """Bytes, on the device and beside it; on a CPU both are one memory."""

    device: int = 0
    host: int = 0

    def times(self, number: int) -> "Held":
        return Held(self.device * number, self.host * number)

    def plus(self, other: "Held") -> "Held":
        return Held(self.device + other.device, self.host + other.host)

    def within(self, free: "Held", *, shared: bool) -> bool:
        """Whether this fits; `shared` where device and host are one memory."""
        if shared:
            return self.device + self.host <= free.host
        return self.device <= free.device and self.host <= free.host


@dataclass(frozen=True)
class Work:
    """What a run is about to read, in numbers."""

    fitting: int
    """Tokens of the longest prompt that a direction is fitted on, template included."""
    longest: int
    """Of the longest prompt of all."""
    answer: int
    """Tokens that an answer has at most."""
    train: int
    """Prompts of the largest set that is fitted on."""
    validation: int
    most: int
    """Prompts of the largest set that is answered."""
    documents: bool
    """Whether SAEs are measured on documents too, which may be longer than any chat; the testbed's own are not."""


@dataclass(frozen=True)
class Stage:
    """One stage: what it holds once, what each prompt of a batch adds, and how many prompts there are."""

    once: Held
    each: Held
    prompts: int
    size: int = LARGEST_BATCH
    """Prompts in a batch."""

    def at(self, size: int) -> Held:
        return self.once.plus(self.each.times(min(size, self.prompts)))


@dataclass(frozen=True)
class Plan:
    """What will be needed, what there is, and what was chosen from it."""

    name: str
    device: str
    free: Held
    fixed: Held
    """What is held whatever the stage."""
    weights: int
    sae: int
    """Bytes of one layer's SAE in float32."""
    mapped: int
    """Of these, bytes that are read off their files as they are used: memory that can be let go, in no other sum."""
    read_ahead: bool
    stages: Mapping[str, Stage]
    given: int | None
    """The batch size that was asked for; None: each stage has its own."""

    @property
    def shared(self) -> bool:
        """Whether device and host are one memory."""
        return not self.device.startswith("cuda")

    @property
    def peak(self) -> Held:
        """The most that will be held on either side."""
        held = [self.fixed.plus(stage.at(stage.size)) for stage in self.stages.values()]
        if self.shared:
            return max(held, key=sum)
        return Held(max(one.device for one in held), max(one.host for one in held))

    @property
    def fits(self) -> bool:
        return self.peak.plus(Held(host=self.mapped)).within(self.free, shared=self.shared)

    @property
    def chosen(self) -> dict[str, Any]:
        """What a run goes by: the commonest batch size, those of stages that have another, what is not read ahead."""
        own = {name: stage.size for name, stage in self.stages.items() if stage.each != Held()}
        own |= {name: own[like] for name, like in LIKE.items()}
        size = self.given or mode(sorted(own.values(), reverse=True))
        others = {name: batch for name, batch in sorted(own.items()) if batch != size}
        ahead = {} if self.read_ahead else {"read_ahead": False}
        return {"batch_size": size, **({"batch_sizes": others} if others else {}), **ahead}

    def lines(self) -> list[str]:
        """The plan for people: what is needed and at which batch sizes, what there is, what to do if it is too much."""
        ahead = ", the next one read ahead" if self.read_ahead else ""
        mapped = f"; {_bytes(self.mapped)} of it mapped off files" if self.mapped else ""
        made = [
            f"memory for {self.name} on {self.device}: weights {_bytes(self.weights)}, one SAE {_bytes(self.sae)}"
            f"{ahead}{mapped}"
        ]
        made += [
            f"  {WORDS[name]}: {min(stage.size, stage.prompts)} prompts at once, {self._sides(stage.at(stage.size))}, "
            f"of it {self._sides(stage.each)} a prompt"
            for name, stage in self.stages.items()
            if name in WORDS
        ]
        made.append(f"  at most {self._sides(self.peak)} held at a time; free {self._sides(self.free)}")
        return made if self.fits else [*made, f"  this may not fit: {self.advice}"]

    @property
    def advice(self) -> str:
        """What would need less."""
        ahead = "--no-read-ahead, " if self.read_ahead else ""
        return f"try {ahead}--dtype bfloat16, --quantize 8bit, --device-map auto or a smaller --batch-size"

    def plain(self) -> dict[str, Any]:
        """For the record, in bytes."""
        return {
            "weights": self.weights,
            "sae": self.sae,
            "mapped": self.mapped,
            "read_ahead": self.read_ahead,
            "batch_sizes": {name: min(stage.size, stage.prompts) for name, stage in self.stages.items()},
            "peak": {"device": int(self.peak.device), "host": int(self.peak.host)},
            "free": {"device": int(self.free.device), "host": int(self.free.host)},
        }

    def _sides(self, held: Held) -> str:
        if self.shared:
            return _bytes(held.device if held is self.free else sum(held))
        return f"{_bytes(held.device)} and {_bytes(held.host)} on the host"


def work_of(sets: PromptSets, template: ChatTemplate, *, answer: int, documents: bool) -> Work:
    """How much a run reads, from its prompts."""
    fitted, validated = (
        [rows for name, rows in {**sets.fitting, **sets.validation}.items() if name.endswith(part)]
        for part in ("train", "validation")
    )

    def longest(every: Iterable[Prompts]) -> int:
        return max((template.length(prompt.text) for rows in every for prompt in rows), default=template.length(""))

    def most(every: Iterable[Prompts]) -> int:
        return max((len(rows) for rows in every), default=LARGEST_BATCH)

    fitting = longest([*fitted, *validated])
    return Work(
        fitting,
        max(fitting, longest(sets.evaluation.values())),
        answer,
        train=most(fitted),
        validation=most(validated),
        most=most([*sets.evaluation.values(), *validated]),
        documents=documents,
    )


def make(
    known: Footprint,
    work: Work,
    *,
    name: str,
    device: str,
    free: Held,
    sae: LayerSae,
    read_ahead: bool,
    given: int | None = None,
) -> Plan:
    """The plan for SAEs like `sae`: the next one is read ahead where `read_ahead` and it fits.

    Each stage takes the largest power of two, at most 64 (256 for answers, 128 for gradients on a card), with which
    everything fills no more than `SHARE` of what is free, unless a size is `given`.
    """
    size, shared = 2 * sae.width * sae.size * FLOAT, not device.startswith("cuda")
    maps = is_mapped(sae.decoder)
    # A release's file is read whole, and its largest tensor twice before the SAE stands.
    own = 0 if maps else size
    held = Held(0 if known.is_mapped else known.weights).plus(Held(own, OWN + own // 2))
    mapped = (known.weights if known.is_mapped else 0) + (size if maps else 0)
    room = Held(int(SHARE * free.device), int(SHARE * free.host) - mapped)
    stages = _stages(known, work, sae.size, shared=shared)

    def fits(fixed: Held, stage: Stage, batch: int) -> bool:
        return fixed.plus(stage.at(batch)).within(room, shared=shared)

    both = held.plus(Held(host=own))
    ahead = read_ahead and all(fits(both, stage, 1) for stage in stages.values())
    fixed = both if ahead else held
    largest = LARGEST | LARGEST_ON_CARD if device.startswith("cuda") else LARGEST
    for called, stage in stages.items():
        batch = given or largest.get(called, LARGEST_BATCH)
        while given is None and batch > 1 and not fits(fixed, stage, batch):
            batch //= 2
        stages[called] = replace(stage, size=batch)
    return Plan(name, device, free, fixed, known.weights, size, mapped, ahead, stages, given)


def _stages(known: Footprint, work: Work, size: int, *, shared: bool) -> dict[str, Stage]:
    """Stage -> what it holds. The factors are counted off the functions that are named."""
    vocabulary = known.vocabulary * FLOAT
    whole = work.longest + work.answer
    chat = known.forward(whole)
    asked, fit = (chat.shorter(tokens, whole) for tokens in (work.longest, work.fitting))
    scored = max(work.answer + 1, DOCUMENT_TOKENS if work.documents else 0)
    trace = known.layers * work.fitting * known.width * FLOAT
    # Encoding a layer whole (`reading`, `features`): two sets of activations, their difference, two products.
    reading = 5 * at_once(size, "cpu" if shared else "cuda") * size * FLOAT
    # `attribution.trace`: the graph; clean and patched residuals and the mean gradient, on a card and then off it.
    graph = int((HEAP if shared else 1) * known.gradient(work.fitting).peak)
    gradients = Held(graph + 3 * vocabulary + (0 if shared else 3 * trace), 3 * trace)
    return {
        # `direction.find`: last logits of the validation prompts, unedited and edited, and what KL makes of them.
        "direction": Stage(
            Held(host=7 * work.validation * vocabulary),
            Held(fit.peak + 2 * vocabulary, known.residuals(work.fitting)),
            work.train,
        ),
        "features": Stage(Held(), gradients, work.train),
        "reading": Stage(Held(reading, 3 * trace), Held(), 0),
        "explain": Stage(Held(host=EXPLAINED * 3 * trace), gradients, min(EXPLAINED, work.validation)),
        "answer": Stage(Held(), Held(asked.peak + chat.left + 3 * vocabulary), work.most),
        # `capability.cost`: log-probabilities before and after, and what the later ones are made from.
        "cost": Stage(Held(), Held(chat.peak + 4 * (work.answer + 1) * vocabulary), work.most),
        "health": Stage(
            Held(reading), Held(chat.peak + 3 * scored * vocabulary, known.residuals(work.fitting)), work.validation
        ),
    }


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.{0 if number >= 1e7 else 1}f} MB"
