"""How healthy the SAEs are: one artifact a layer and set, so a run that is killed measures one layer again at most.

Layers are the outer loop and sets the inner one; of all SAEs one is in memory at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Finding, Prompts, Responses
from refusalscope.evals import health as measuring
from refusalscope.evals.health import Cosine, Floors, Kind, Spliced
from refusalscope.evals.likelihood import answered
from refusalscope.inputs import documents, presets
from refusalscope.inputs.saes import LayerSae, SaeBank
from refusalscope.pipeline.fit import Fitted
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.measure import keep_finding, make_answers, provenance
from refusalscope.pipeline.traces import opening_refused
from refusalscope.studies import health
from refusalscope.studies.benchmark import BASE

STAGE = "health"
DOCUMENTS = f"{STAGE}/documents.jsonl"
MOST = 200
"""Documents that are read at most: each takes a forward pass for every layer, floor and set."""
OWN = 64
"""Documents of the testbed's own: one batch, so that `run` stays quick."""
NO_DOCUMENTS = "SAE health was not measured on plain text: name some with --documents."


class Sets(NamedTuple):
    """The SAE sets that are compared."""

    banks: Mapping[str, SaeBank]
    """By name, the run's own first; none is open."""
    identities: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass
class Bench:
    """What is measured on; tokens and averages are made when the first layer asks for them."""

    job: Job
    fitted: Fitted
    answers: Responses
    plain: Prompts | None

    @property
    def size(self) -> int:
        return self.job.size(STAGE)

    @cached_property
    def chats(self) -> Prompts:
        return answered(self.fitted.data.harmless_validation, self._by_id)

    @property
    def _by_id(self) -> dict[str, Any]:
        return {row.prompt_id: row for row in self.answers.rows}

    @cached_property
    def texts(self) -> list[measuring.Texts]:
        made = measuring.chats(self.job.model, self.chats, self._by_id, batch_size=self.size)
        if self.plain is not None:
            made.append(measuring.documents(self.job.model, self.plain, batch_size=self.size))
        return [texts for texts in made if texts.batches]

    @cached_property
    def averages(self) -> dict[Kind, measuring.Averages]:
        layers = self.job.saes.layers
        return {texts.kind: measuring.averages(self.job.model, texts, layers) for texts in self.texts}

    @cached_property
    def fitting(self) -> tuple[Prompts, Prompts]:
        """The prompts that the direction was fitted on: harmful ones refused, harmless ones answered."""
        data = self.fitted.data
        if self.job.options.keep_unrefused:
            return data.harmful_train, data.harmless_train
        refused = [
            opening_refused(self.job, self.fitted, rows, size=self.size)
            for rows in (data.harmful_train, data.harmless_train)
        ]
        return refused[0], data.harmless_train.keep(set(data.harmless_train.ids) - set(refused[1].ids))

    @cached_property
    def ends(self) -> list[dict[int, Any]]:
        layers = self.job.saes.layers
        return [measuring.last_residuals(self.job.model, rows, layers, batch_size=self.size) for rows in self.fitting]

    def floors(self, layer: int) -> dict[str, Any]:
        """What no SAE enters, by kind of text."""
        made = {}
        for texts in self.texts:
            floors = measuring.floors(self.job.model, texts, layer, self.averages[texts.kind])
            ids = [name for batch in texts.batches for name in batch.prompt_ids]
            made[texts.kind] = {"ids": ids, "sums": floors._asdict()}
        return made

    def spliced(self, sae: LayerSae) -> dict[str, Any]:
        """What one SAE makes of each kind of text, and of the direction."""
        made = {texts.kind: measuring.splice(self.job.model, texts, sae)._asdict() for texts in self.texts}
        harmful, harmless = (ends[sae.layer] for ends in self.ends)
        clusters = (self.fitting[0].clusters, self.fitting[1].clusters)
        cosine = measuring.cosine(sae, harmful, harmless, clusters=clusters, seed=self.job.options.seed)
        return {"texts": made, "direction": cosine._asdict()}


def check(job: Job) -> None:
    """Raise ValueError, one line, for a second set or documents that cannot be had, before anything is made."""
    if job.options.documents is not None:
        documents.source(job.options.documents)
    sets = _sets(job)
    stands = any(path.endswith("set_1.json") for path in job.store.paths(STAGE, ".json"))
    for bank in list(sets.banks.values())[1:] if not stands else ():
        bank.check(job.model.width, job.target.name)
        bank.let_go()


def run_health(job: Job, fitted: Fitted) -> Finding:
    """Reconstruction of the SAEs layer by layer: harmless prompts with the model's own answers, and plain text."""
    sets = _sets(job)
    plain, notes = _plain_text(job)
    rows = fitted.data.harmless_validation
    bench = Bench(job, fitted, make_answers(job, rows, BASE, {}), plain)
    layers = job.saes.layers if len(bench.chats) else ()
    if not layers:
        notes = (*notes, f"SAE health was not measured: the answers to all {rows.name} prompts are empty.")
    made = []
    for done, layer in enumerate(layers):
        job.progress("SAE health", done, len(layers))
        made.append(_layer(bench, sets, layer))
    about = provenance(job, fitted, None)
    if job.options.against is not None:
        about |= {"against": dict(list(sets.identities.items())[1:])}
    return keep_finding(job.store, health.summarise(made, caveats=(*sets.notes, *notes), provenance=about))


def _sets(job: Job) -> Sets:
    if job.options.against is None:
        return Sets({health.FIRST: job.saes}, {health.FIRST: job.target.identity}, ())
    name, source = presets.other_saes(job.target, job.options.against)
    name = f"{name} (second)" if name == health.FIRST else name
    other = SaeBank.from_source(source, device=job.device)
    missing = [str(layer) for layer in job.target.saes.names if layer not in source.names]
    notes = (f"The set {name} has no SAE for layers {', '.join(missing)}: not compared there.",) if missing else ()
    identities = {health.FIRST: job.target.identity, name: source.identity}
    return Sets({health.FIRST: job.saes, name: other}, identities, notes)


def _plain_text(job: Job) -> tuple[Prompts | None, tuple[str, ...]]:
    """The documents of the options, else the testbed's own, kept in the run folder; or none, and a note."""
    if job.options.documents is not None:
        where = documents.source(job.options.documents)
        key = fingerprint(STAGE, documents.identity(where), MOST)
        return job.store.get(DOCUMENTS, key, Prompts, lambda: documents.read(where)[:MOST]), ()
    if job.target.prompts is None:
        return None, (NO_DOCUMENTS,)
    rows = documents.from_testbed(OWN)
    job.store.keep(DOCUMENTS, fingerprint(rows), rows)
    return rows, ()


def _layer(bench: Bench, sets: Sets, layer: int) -> health.Layer:
    """All that is known of a layer, made where it does not stand."""
    job, folder = bench.job, f"{STAGE}/layer_{layer:02d}"
    data = bench.fitted.data
    inputs = (layer, bench.answers, bench.chats, bench.plain, data.harmful_train, data.harmless_train)
    key = job.key(STAGE, *inputs, bench.fitted.direction, job.options.keep_unrefused, job.options.seed)
    floors = job.store.get(f"{folder}/floors.json", key, dict, partial(bench.floors, layer))
    found = {}
    for place, (name, bank) in enumerate(sets.banks.items()):
        if layer in bank.layers:
            made = partial(_measure, bench, sets, name, layer)
            path, own = f"{folder}/set_{place}.json", fingerprint(key, name, sets.identities[name])
            found[name] = job.store.get(path, own, dict, made)
    return health.Layer(
        layer,
        _texts(bench, floors, {name: part["texts"] for name, part in found.items()}),
        {name: Cosine(**part["direction"]) for name, part in found.items()},
    )


def _measure(bench: Bench, sets: Sets, name: str, layer: int) -> dict[str, Any]:
    for other, bank in sets.banks.items():
        if other != name:
            bank.let_go()
    return bench.spliced(sets.banks[name].layer(layer))


def _texts(bench: Bench, floors: Mapping[str, Any], spliced: Mapping[str, Any]) -> Sequence[health.Measured]:
    """Every kind of text under the name that the finding has for it."""
    chats = bench.chats
    known: dict[Kind, tuple[str, Prompts]] = {"chats": (chats.name, chats), "template": (health.TEMPLATE, chats)}
    if bench.plain is not None:
        known["documents"] = (bench.plain.name, bench.plain)
    return [
        health.Measured(
            name,
            kind,
            rows.keep(floors[kind]["ids"]).clusters,
            Floors(**floors[kind]["sums"]),
            {own: Spliced(**parts[kind]) for own, parts in spliced.items()},
        )
        for kind, (name, rows) in known.items()
        if kind in floors
    ]
