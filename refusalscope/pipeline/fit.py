"""From prompts to a direction and feature sets: the stages up to the point where something can be edited."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.types import Attribution, Direction, Feature, FeatureSet, Prompts, SaeSlice
from refusalscope.evals import judges
from refusalscope.inputs import prompts
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism import attribution, direction, features
from refusalscope.mechanism.direction import FitData
from refusalscope.pipeline.job import Job


@dataclass(frozen=True)
class Fitted:
    """A direction, the prompts it was fitted on, and what to say about that."""

    direction: Direction
    data: FitData
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """The feature sets, by the name of their artifact, and the SAE slices that edit them."""

    sets: Mapping[str, FeatureSet]
    slices: Mapping[int, SaeSlice]


def fit(job: Job) -> Fitted:
    """Find the direction on the prompts given, or, when too few of them are refused, on the model's own."""
    sources = {"given": job.sets} if job.sets.fitting else {}
    if job.options.prompts is not None and job.target.prompts is not None:
        sources["own"] = prompts.from_testbed(count=1, full=False)
    if not sources:
        raise ValueError(
            f"{job.options.prompts} holds no train split (at least 48 harmful and 48 harmless prompts are needed) and "
            f"{job.target.name} has no prompts of its own: give more prompts"
        )
    overrides = (job.options.refusal_token, job.options.best_layer, job.options.keep_unrefused)
    key = job.key("direction", {name: dict(s.fitting) for name, s in sources.items()}, overrides)
    if not (job.store.has("direction.safetensors", key) and job.store.has("fitting.json", key)):
        found, source, notes = _find(job, sources)
        job.begin()
        job.store.put("direction.safetensors", key, found)
        job.store.put("fitting.json", key, {"source": source, "notes": notes})
    how = job.store.read("fitting.json", dict)
    used = sources[how["source"]].fitting
    for name, rows in {**used, **job.sets.evaluation}.items():
        job.store.get(f"prompts/{name}.jsonl", fingerprint(rows), Prompts, partial(_same, rows))
    data = FitData(*(used[name] for name in prompts.FITTING))
    return Fitted(job.store.read("direction.safetensors", Direction), data, (*job.sets.notes, *how["notes"]))


def _same(value: Any) -> Any:
    return value


def _find(job: Job, sources: Mapping[str, prompts.PromptSets]) -> tuple[Direction, str, list[str]]:
    notes: list[str] = []
    if "given" not in sources:
        notes.append(
            f"{job.options.prompts} has no train split: direction and features come from the model's own prompts."
        )
    for name, source in sources.items():
        try:
            found = direction.find(
                job.model,
                FitData(*(source.fitting[part] for part in prompts.FITTING)),
                batch_size=job.size("direction"),
                is_refusal=lambda text: bool(judges.refused_by_phrase(text).score),
                refusal_tokens=_token_ids(job),
                best_layer=job.options.best_layer,
                keep_unrefused=job.options.keep_unrefused,
                progress=job.progress,
            )
        except direction.NoDirection as error:
            if name == list(sources)[-1]:
                raise
            notes.append(
                f"Direction and features were fitted on the model's own prompts, not on {job.options.prompts}: {error}."
            )
            continue
        return found, name, notes
    raise AssertionError("a source either fits or raises")


def _token_ids(job: Job) -> list[int]:
    ids = []
    for text in job.options.refusal_token:
        found = job.model.tokenizer(text, add_special_tokens=False).input_ids
        if len(found) != 1:
            raise ValueError(f"--refusal-token {text!r} is {len(found)} tokens of {job.target.name}, not one")
        ids.append(int(found[0]))
    return ids


def choose_features(job: Job, fitted: Fitted) -> Chosen:
    """Attribute refusal to candidates, choose every set, and write sets, table and slices."""
    key = job.key(
        "features", fitted.direction, fitted.data, job.options.sizes, job.options.random_draws, job.options.seed
    )
    if not _features_stand(job, key):
        _make_features(job, fitted, key)
    index = job.store.read("features/index.json", dict)
    sets = {name: job.store.read(f"features/{name}.json", FeatureSet) for name in index["sets"]}
    slices = {int(layer): job.store.read(f"slices/layer_{layer}.safetensors", SaeSlice) for layer in index["layers"]}
    return Chosen(sets, slices)


def _features_stand(job: Job, key: str) -> bool:
    if not job.store.has("features/index.json", key):
        return False
    index = job.store.read("features/index.json", dict)
    paths = [f"features/{name}.json" for name in (*index["sets"], "table")]
    paths += [f"slices/layer_{layer}.safetensors" for layer in index["layers"]]
    return all(job.store.has(path, key) for path in paths)


def _make_features(job: Job, fitted: Fitted, key: str) -> None:
    refused = fitted.data.harmful_train.keep(_refused_ids(job, fitted))
    keep = max(features.PER_LAYER, *job.options.sizes)
    size = job.size("features")
    surveys = features.survey(
        job.model, job.saes, refused, fitted.direction, keep=keep, batch_size=size, progress=job.progress
    )
    wanted = features.candidates(surveys)
    scored = job.store.get(
        "attributions/candidates.safetensors",
        key,
        Attribution,
        lambda: attribution.attribute(
            job.model,
            job.saes,
            refused,
            fitted.direction,
            candidates=wanted,
            batch_size=size,
            progress=job.progress,
        ),
    )
    listed, scores = features.prompt_scores(scored)
    sets: dict[str, FeatureSet] = {}
    table: list[dict[str, Any]] = []
    excluded = {Feature(layer, index) for layer, indices in wanted.items() for index in indices}
    for k in job.options.sizes:
        best = features.choose("cosine+attribution", listed, scores, k, seed=job.options.seed)
        plain = features.cosine(surveys, k)
        named = {"cosine+attribution": best.features, "cosine": plain}
        excluded |= set(plain.features)
        for draw in range(job.options.random_draws):
            seed = job.options.seed + draw
            named[f"random-{draw}"] = features.random_like(best.features, surveys, excluded, seed=seed)
        suffix = "" if k == job.options.k else f"-k{k}"
        sets |= {f"{name}{suffix}": chosen for name, chosen in named.items()}
        label = f" (K* = {k})" if suffix else ""
        table += _table_rows(best.features, label, best.chosen, best.stability) + _table_rows(plain, label)
    slices = job.saes.slices(_union(sets.values()))
    _describe(job.model, table, slices)
    for layer, part in slices.items():
        job.store.put(f"slices/layer_{layer}.safetensors", key, part)
    for name, chosen in sets.items():
        job.store.put(f"features/{name}.json", key, chosen)
    job.store.put("features/table.json", key, {"rows": table})
    # The index comes last: while it is missing, a killed stage is made again.
    job.store.put("features/index.json", key, {"sets": list(sets), "layers": list(slices)})


def _refused_ids(job: Job, fitted: Fitted) -> list[str]:
    if job.options.keep_unrefused:
        return list(fitted.data.harmful_train.ids)
    size = job.size("features")
    first = direction.first_tokens(job.model, fitted.data.harmful_train, batch_size=size).argmax.tolist()
    pairs = zip(fitted.data.harmful_train.ids, first, strict=True)
    return [prompt for prompt, token in pairs if token in fitted.direction.refusal_tokens]


def _union(sets: Iterable[FeatureSet]) -> dict[int, list[int]]:
    layers: dict[int, set[int]] = {}
    for chosen in sets:
        for layer, indices in chosen.by_layer().items():
            layers.setdefault(layer, set()).update(indices)
    return {layer: sorted(indices) for layer, indices in sorted(layers.items())}


def _table_rows(
    chosen: FeatureSet,
    label: str,
    share: Sequence[float] | None = None,
    stability: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    return [
        {
            "method": f"{chosen.method}{label}",
            "rank": rank + 1,
            "layer": feature.layer,
            "index": feature.index,
            "score": chosen.scores[rank],
            "chosen": None if share is None else share[rank],
            "stability": None if stability is None else stability[rank],
        }
        for rank, feature in enumerate(chosen.features)
    ]


def _describe(model: ChatModel, table: list[dict[str, Any]], slices: Mapping[int, SaeSlice]) -> None:
    """Add to each row the tokens that its decoder row promotes and suppresses through the unembedding."""
    for row in table:
        vector = slices[row["layer"]].take([row["index"]]).decoder
        row["promoted"] = model.promoted(vector, 8)[0]
        row["suppressed"] = model.promoted(-vector, 8)[0]
