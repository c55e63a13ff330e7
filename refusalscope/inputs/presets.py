"""What a model name on the command line means: a preset of the table, a Hugging Face repository, a folder on disk."""

import hashlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from refusalscope.inputs import hub, releases
from refusalscope.inputs.releases import SaeSource
from refusalscope.testbed import shipped

FACTORS = (0.5, 0.0, -0.5, -1.0, -2.0, -3.0)
MAX_NEW_TOKENS = 256
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Checkpoint(NamedTuple):
    """A model alone."""

    name: str
    model: str
    """A Hugging Face repository, or the folder of a checkpoint."""
    revision: str | None
    """The commit of the repository; None for a folder."""
    weights: str
    """Changes whenever a weight does: the commit, or a digest of the folder's files."""


@dataclass(frozen=True)
class Target:
    """A model to study, its SAEs, and the settings that belong to it."""

    name: str
    model: str
    """A Hugging Face repository, or the folder of a checkpoint."""
    requested: str | None
    """The commit, tag or branch that was asked for, by the user or the preset; None: the newest commit."""
    revision: str | None
    """The commit of the repository; None for a folder."""
    weights: str
    """As in `Checkpoint`."""
    saes: SaeSource
    prompts: str | None
    """The model's own prompt source (`testbed`), or None."""
    max_new_tokens: int
    factors: tuple[float, ...]
    published_factor: float | None
    published_skip: int
    """Leading tokens that the published token mask leaves out: BOS alone, 26 for Llama 3."""
    refusal_tokens: tuple[str, ...]
    """Published; empty: they are found."""
    best_layer: int | None
    """Published; None: it is chosen on validation prompts."""
    values: tuple[float, ...]
    """What features are set to when refusal is induced; empty: derive them from the features' activations."""
    neuronpedia: str | None
    """Neuronpedia's name of the SAEs, with {layer}."""
    identity: str
    """Sixteen digits that change whenever a weight of the model or of its SAEs does."""


def presets() -> dict[str, Any]:
    """The table of models, by name."""
    return tomllib.loads((files("refusalscope.inputs") / "presets.toml").read_text("utf-8"))


def described(preset: dict[str, Any]) -> list[str]:
    """A preset in a few lines: what it is, where it comes from, what was published of it."""
    words = {
        "refusal_tokens": "first token of refusals {0[0]!r}",
        "best_layer": "direction of layer {0}",
        "published_factor": "features scaled by {0:g}",
        "values": "features set to {0}",
    }
    lines = [preset["description"]]
    if "sae_release" in preset:
        lines.append(f"{preset['model']}, SAEs {preset['sae_release']} {preset['sae_id']}")
    if told := [text.format(preset[key]) for key, text in words.items() if key in preset]:
        lines.append(f"published: {', '.join(told)}")
    if "neuronpedia" in preset:
        lines.append(f"Neuronpedia: {preset['neuronpedia']}")
    return lines


def resolve(
    name: str,
    *,
    revision: str | None = None,
    saes: str | None = None,
    sae_release: str | None = None,
    sae_id: str | None = None,
    layers: Sequence[int] | None = None,
) -> Target:
    """The target that `name` stands for; the options override the preset's revision and SAEs, `layers` restricts them.

    Raises ValueError when there is no such model (naming near ones) or revision, no SAE fits, or an asset is damaged.
    """
    preset = presets().get(name, {})
    model = _model(name, preset)
    if revision is not None and _is_folder(model):
        raise ValueError(f"--revision {revision}: {name} is a folder, which has no revisions: leave it out")
    chosen = _saes(name, preset, saes, sae_release, sae_id)
    if layers is not None:
        chosen = chosen.only(layers)
    found = _checked(name, preset, model, revision)
    return Target(
        name=found.name,
        model=model,
        requested=revision or preset.get("revision"),
        revision=found.revision,
        weights=found.weights,
        saes=chosen,
        prompts=preset.get("prompts"),
        max_new_tokens=preset.get("max_new_tokens", MAX_NEW_TOKENS),
        factors=tuple(preset.get("factors", FACTORS)),
        published_factor=preset.get("published_factor"),
        published_skip=preset.get("published_skip", 1),
        refusal_tokens=tuple(preset.get("refusal_tokens", ())),
        best_layer=preset.get("best_layer"),
        values=tuple(preset.get("values", ())),
        neuronpedia=preset.get("neuronpedia") if (saes or sae_release or sae_id) is None else None,
        identity=hashlib.sha256(f"{found.weights}\n{chosen.identity}\n{list(chosen.names)}".encode()).hexdigest()[:16],
    )


def other_saes(target: Target, text: str) -> tuple[str, SaeSource]:
    """A second SAE set for a target's model, and what it is called; layers that the first set lacks are left out.

    `text` is a set that the preset names, another preset of the same model, a folder or repository pattern with
    {layer}, or a release of SAELens, `release:id` where it holds several SAEs a layer. Raises ValueError, one line,
    for anything else.
    """
    try:
        name, source = _other(target, text)
    except ValueError as error:
        raise ValueError(f"--against {text}: {str(error).replace('--sae-id', f'--against {text}:ID')}") from error
    shared = sorted(set(source.names) & set(target.saes.names))
    if not shared:
        raise ValueError(
            f"--against {text}: it has SAEs for layers {list(source.names)}, the first set for "
            f"{list(target.saes.names)}: none is in both"
        )
    return name, source.only(shared)


def _other(target: Target, text: str) -> tuple[str, SaeSource]:
    table = presets()
    own = table.get(target.name, {}).get("sae_sets", {})
    same = [name for name, preset in table.items() if _path(preset["model"]) == target.model and name != target.name]
    if text in own:
        return text, _from_pattern(_path(own[text]))
    if text in same:
        return text, _saes(text, table[text], None, None, None)
    release, colon, pattern = text.partition(":")
    if "{layer}" in text and not (colon and "/" not in release):
        return Path(text).parent.name or text, _from_pattern(text)
    try:
        return release, releases.from_release(release, pattern if colon else None)
    except ValueError as error:
        known = f"; {target.name} has the further sets {', '.join([*own, *same])}" if own or same else ""
        raise ValueError(f"{error}{known}") from error


def checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """The model that `name` stands for, without SAEs; of a repository at `revision`, else at the preset's.

    Raises ValueError as `resolve`.
    """
    preset = presets().get(name, {})
    return _checked(name, preset, _model(name, preset), revision)


def _checked(name: str, preset: dict[str, Any], model: str, revision: str | None) -> Checkpoint:
    if not _is_folder(model):
        commit = _commit(name, model, revision or preset.get("revision"))
        return Checkpoint(name, model, commit, commit)
    if Path(model).is_relative_to(shipped.ASSETS):
        shipped.verify()
    return Checkpoint(name if preset else Path(model).resolve().name, model, None, releases.digest([Path(model)]))


def _model(name: str, preset: dict[str, Any]) -> str:
    if preset:
        return _path(preset["model"])
    if _is_folder(name) or (_REPOSITORY.fullmatch(name) and not Path(name).exists()):
        return name
    table = presets()
    raise ValueError(
        f"unknown model {name!r}: {releases.did_you_mean(name, table)}Known are {', '.join(table)}; "
        "or give a Hugging Face repository (owner/name) or the folder of a checkpoint (with a config.json), and its "
        "SAEs with --sae-release or --saes"
    )


def _commit(name: str, repository: str, revision: str | None) -> str:
    try:
        return hub.snapshot(repository, "config.json", revision=revision, choice="with --revision").name
    except ValueError as error:
        nor = f"; nor is there a folder {name} with a config.json" if name == repository else ""
        raise ValueError(f"{error}{nor}") from error


def _saes(
    name: str, preset: dict[str, Any], saes: str | None, sae_release: str | None, sae_id: str | None
) -> SaeSource:
    if saes is not None:
        return _from_pattern(saes)
    if sae_release is not None:
        return releases.from_release(sae_release, sae_id)
    if "saes" in preset:
        return _from_pattern(_path(preset["saes"]))
    if "sae_release" in preset:
        pattern, pin = sae_id or preset.get("sae_id"), preset.get("sae_revision")
        return releases.from_release(preset["sae_release"], pattern, revision=pin)
    raise ValueError(
        f"model {name}: name its SAEs with --saes FOLDER, {{layer}} where the layer's number stands, or with "
        f"--sae-release{_known_saes(name)}"
    )


def _known_saes(name: str) -> str:
    """Presets and releases for a repository, in words; empty for a folder, and where none is known."""
    same = [preset for preset, settings in presets().items() if settings["model"] == name]
    known = [] if _is_folder(name) else releases.releases_for(name)
    shown = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
    return (f"; it is the model of the preset {' and of '.join(same)}" if same else "") + (
        f"; SAELens knows {shown} for it" if known else ""
    )


def _from_pattern(text: str) -> SaeSource:
    repository, colon, _ = text.partition(":")
    if colon and _REPOSITORY.fullmatch(repository):
        return releases.from_repository(text)
    return releases.from_folders(text)


def _is_folder(model: str) -> bool:
    return (Path(model) / "config.json").is_file()


def _path(text: str) -> str:
    inside = text.removeprefix("package:")
    return str(files("refusalscope")) + "/" + inside if inside != text else text
