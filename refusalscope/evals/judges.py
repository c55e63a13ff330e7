"""Who says whether an answer refuses, harms or is coherent: one function type, and a table of those that are known.

A judge answers exactly one question about exchanges (a prompt and its answer) and never raises for one of them: what it
cannot score comes back unscored, with the reason. Knows nothing of files.
"""

import hashlib
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from refusalscope.core.types import NaN, Prompt, Question, Response, Verdict
from refusalscope.evals import rules
from refusalscope.inputs.releases import did_you_mean

BATCH = 8
TOGETHER = 32
"""Exchanges per call where a server or vLLM makes the batches."""


class Exchange(NamedTuple):
    """What a judge sees."""

    prompt: Prompt
    response: Response


Score = Callable[[Sequence[Exchange]], list[Verdict]]
"""One verdict per exchange, in order."""


@dataclass(frozen=True)
class Judge:
    """One question, and who answers it."""

    name: str
    """Fit for a file name."""
    question: Question
    about: Mapping[str, Any]
    """All that its verdicts depend on (model, revision, template, engine): part of their key, shown in the report."""
    batch_size: int
    """Exchanges per call of `score`: the unit that a killed run repeats."""
    score: Score
    """Loads what it needs when it is first called."""


@dataclass(frozen=True)
class Settings:
    """How judges are run; what a judge has no use for is left aside."""

    url: str | None = None
    """An OpenAI-compatible server, with or without a trailing `/v1`; None: in this process."""
    model: str | None = None
    """The name the server knows its model by; in this process a checkpoint in place of the judge's own."""
    revision: str | None = None
    template: Path | None = None
    """A text file in place of the template in the judge's model card."""
    engine: Literal["transformers", "vllm"] = "transformers"
    question: Question = "harmful"
    """What the rubric is asked, and a user's function that does not say."""
    device: str = "auto"
    dtype: str = "auto"
    """`auto` is float32 on the CPU and bfloat16 elsewhere."""
    batch_size: int | None = None


@dataclass(frozen=True)
class Known:
    """A row of `judges.toml`, where the fields are explained."""

    name: str
    question: str
    """A question, or `any`."""
    kind: str
    what: str
    """What it measures."""
    repository: str = ""
    memory: float | None = None
    licence: str = ""
    fields: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    tokens: int = 1
    line: str = ""
    clip: int | None = None
    template: str | None = None
    hint: str = ""
    """Where its template is to be had, where no card holds it."""


def known() -> list[Known]:
    """The judges that are models or code; those that are rules stand in `rules.RULES`."""
    table = tomllib.loads((files("refusalscope.evals") / "judges.toml").read_text("utf-8"))
    return [Known(name=name, **{key: _frozen(value) for key, value in row.items()}) for name, row in table.items()]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def opened(names: Sequence[str], settings: Settings) -> Iterator[Judge]:
    """The judges of these names, in order. Weights are loaded when one is first asked, and gone before the next.

    `wildguard` and `wildguard-refused` share their model and its replies. Raises ValueError, one line, before any is
    yielded, for a name that is not known, and for a checkpoint, template or package that is not there.
    """
    wanted = [row for row in known() if row.name in names and row.repository]
    _check_one_model(wanted, settings)
    asked = Counter(row.repository for row in wanted)
    machines = _Machines({}, {repository for repository, count in asked.items() if count > 1})
    return _in_turn([_opened(name, settings, machines) for name in names])


def _check_one_model(wanted: Sequence[Known], settings: Settings) -> None:
    """Judges that differ in their models are no two judges where one model answers for both."""
    # What is no chat model has a complaint of its own coming.
    own = sorted({row.repository for row in wanted if settings.url is None or row.kind != "labels"})
    if len(own) > 1 and settings.url is not None:
        raise ValueError(
            f"--judge-url gives one model, and would take the place of {' and of '.join(own)}: ask in turn"
        )
    if len(own) > 1 and settings.model is not None:
        raise ValueError(f"--judge-model is one checkpoint, and would take the place of {' and of '.join(own)}")


class _Machines(NamedTuple):
    """What judges run on, by the checkpoint and the kind of model it is."""

    made: dict[tuple[str, bool], Any]
    shared: Collection[str]
    """Repositories that several of the judges read."""

    def take(self, key: tuple[str, bool], repository: str, make: Callable[[], Any]) -> Any:
        """The machine of this key, made once; one whose replies several judges read remembers them."""
        from refusalscope.evals import classifiers

        if key not in self.made:
            self.made[key] = classifiers.Remembering(make()) if repository in self.shared else make()
        return self.made[key]


class _Opened(NamedTuple):
    judge: Judge
    machine: Any = None
    """What holds its weights; None where nothing does."""


def _in_turn(judges: Sequence[_Opened]) -> Iterator[Judge]:
    held: Any = None
    try:
        for judge, machine in judges:
            if held is not None and held is not machine:
                held.release()
            held = machine
            yield judge
    finally:
        if held is not None:
            held.release()


def _opened(name: str, settings: Settings, machines: _Machines) -> _Opened:
    table = {row.name: row for row in known()}
    if ":" in name.strip(":"):
        return _Opened(_function(name, settings))
    if name not in table:
        raise ValueError(f"unknown judge {name!r}: {did_you_mean(name, table)}Known are {', '.join(table)}")
    if table[name].kind == "rubric":
        return _Opened(_rubric(settings))
    if settings.url is not None:
        return _Opened(_served(table[name], settings, settings.url, machines))
    return _in_process(table[name], settings, machines)


def _in_process(known: Known, settings: Settings, machines: _Machines) -> _Opened:
    from refusalscope.evals import checkpoints
    from refusalscope.evals.local import Local, Sequences
    from refusalscope.evals.local_vllm import Vllm

    checkpoint = checkpoints.find(settings.model or known.repository, settings.revision)
    template = _template(known, settings, checkpoint.card)
    vllm = settings.engine == "vllm" and known.kind != "labels"
    size = settings.batch_size or (TOGETHER if vllm else BATCH)

    def make() -> Any:
        if vllm:
            return Vllm(checkpoint, dtype=settings.dtype)
        kind = Sequences if known.kind == "labels" else Local
        return kind(checkpoint, device=settings.device, dtype=settings.dtype, batch_size=size)

    machine = machines.take((checkpoint.source, known.kind == "labels"), known.repository, make)
    return _Opened(_classifier(known, machine, template, machine.reader, machine.about, size), machine)


def _served(known: Known, settings: Settings, url: str, machines: _Machines) -> Judge:
    from refusalscope.evals import checkpoints, classifiers
    from refusalscope.evals.server import Server

    if known.kind == "labels":
        raise ValueError(f"{known.name} is a sequence classifier, which a chat server cannot serve: omit --judge-url")
    checkpoint = reader = None
    missing = ""
    try:
        # A judge under its model's own chat template has none to fill and nothing to cut.
        checkpoint = checkpoints.find(known.repository, settings.revision) if known.fields else None
        reader = None if checkpoint is None else checkpoints.Reader.load(checkpoint)
    except ValueError as error:
        # The weights are elsewhere; what is missing here may not be needed.
        missing = str(error)
    if missing and checkpoint is None and settings.template is None:
        raise ValueError(f"{missing}; or give the template of {known.name} by --judge-template")
    if known.clip and reader is None:
        raise ValueError(f"{known.name} is shown {known.clip} tokens of an answer, counted by its tokenizer: {missing}")
    template = _template(known, settings, None if checkpoint is None else checkpoint.card)
    server = Server(url, settings.model)
    about: dict[str, Any] = {"model": server.model, "engine": "server"}
    if reader is not None and checkpoint is not None:
        about["cut_by"] = checkpoint.about
    machine = machines.take((known.repository, False), known.repository, lambda: classifiers.Served(server, reader))
    return _classifier(known, machine, template, reader, about, settings.batch_size or TOGETHER)


def _template(known: Known, settings: Settings, card: Path | None) -> Any:
    """The template of a judge that has one: its own, a file's, or its card's."""
    from refusalscope.evals import cards

    if not known.fields:
        return None
    if known.template is not None:
        return cards.from_text(known.template, known.fields, name=known.name)
    if settings.template is not None or card is None:
        return cards.from_file(settings.template or Path(), known.fields)
    try:
        return cards.from_card(card, known.fields, name=known.repository)
    except ValueError as error:
        raise ValueError(f"{error}{known.hint and f'; {known.hint}'}") from error


def _classifier(known: Known, machine: Any, template: Any, reader: Any, about: Mapping[str, Any], size: int) -> Judge:
    from refusalscope.evals import classifiers

    score = classifiers.KINDS[known.kind](machine, known, template)
    more: dict[str, Any] = {} if template is None else {"template": template.digest}
    if reader is not None:
        score = classifiers.apart(score, reader)
        if known.clip:
            score = classifiers.clipped(score, reader, known.clip)
            more["clip"] = known.clip
    if about["model"] != known.repository:
        more["in_place_of"] = known.repository
    return Judge(known.name, _question(known.question), {**about, **more}, size, finished(score))


def _rubric(settings: Settings) -> Judge:
    from refusalscope.evals import rubric
    from refusalscope.evals.server import Server

    if settings.url is None:
        raise ValueError("rubric asks a chat model behind a server: give its address by --judge-url")
    server, question = Server(settings.url, settings.model), settings.question
    digest = hashlib.sha256(rubric.template(question).encode()).hexdigest()
    about = {"model": server.model, "engine": "server", "template": digest}
    score = finished(rubric.rubric(server, question))
    return Judge(f"rubric-{question}", question, about, settings.batch_size or TOGETHER, score)


def _function(name: str, settings: Settings) -> Judge:
    from refusalscope.evals import functions

    found = functions.find(name)
    question = _question(getattr(found.function, "question", settings.question), name)
    about = {**found.about, "question": question}
    score = finished(functions.score(found))
    return Judge(name.replace(":", "."), question, about, settings.batch_size or BATCH, score)


def _question(text: str, name: str = "") -> Question:
    for question in get_args(Question):
        if text == question:
            return question
    raise ValueError(f"{name}: its question {text!r} is none of {', '.join(get_args(Question))}")


def finished(score: Score) -> Score:
    """The judge asked about answers alone: one that is still reasoning at the limit is unscored."""

    def scored(exchanges: Sequence[Exchange]) -> list[Verdict]:
        asked = [exchange for exchange in exchanges if not rules.still_reasoning(exchange.response)]
        verdicts = iter(score(asked) if asked else [])
        return [
            Verdict(exchange.prompt.id, NaN, reason=rules.STILL_REASONING)
            if rules.still_reasoning(exchange.response)
            else next(verdicts)
            for exchange in exchanges
        ]

    return scored
