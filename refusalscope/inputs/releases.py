"""Which SAEs there are, layer by layer: a release of SAELens's registry, a Hugging Face repository or folders on disk.

SAELens reads every format. Nothing is loaded here until a layer is asked for; knows nothing of encoding.
"""

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from refusalscope.core.memory import is_out_of_memory
from refusalscope.inputs import damaged, hub, pinned

L0 = 100
"""Where ids name their average L0, the one nearest this is taken, as published."""

_ELSEWHERE = re.compile("transcoder|clt|mlp|att|hook-z|embedding|mid|lxa|lxm|temporal")
"""In the names of releases that are no SAEs on the residual stream after a layer."""

Loader = Callable[[str], Any]
"""device -> SAELens's SAE."""


@dataclass(frozen=True)
class SaeSource:
    """SAEs by layer, none of them loaded."""

    where: str
    """The release, the repository, or the last part of the folder pattern they come from."""
    names: Mapping[int, str]
    """Layer -> its id in the release, or its folder."""
    loaders: Mapping[int, Loader]
    identity: str
    """Changes whenever a weight does: commit and ids, or SHA-256 of the files."""
    repository: str | None = None
    """On the Hugging Face hub; None for folders."""
    commit: str | None = None
    """Of that repository: the one that is read."""
    neuronpedia: Mapping[int, str] = field(default_factory=dict)
    """Layer -> Neuronpedia's name of this very SAE, where SAELens or the SAE's own configuration carries it."""

    def only(self, layers: Iterable[int]) -> "SaeSource":
        """The SAEs of these layers. Raises ValueError naming the layers there are when one has none."""
        wanted = sorted(set(layers))
        if missing := [layer for layer in wanted if layer not in self.names]:
            raise ValueError(f"--layers {missing}: {self.where} has SAEs for layers {list(self.names)}")
        names = {layer: self.names[layer] for layer in wanted}
        shown = {layer: name for layer, name in self.neuronpedia.items() if layer in names}
        return replace(self, names=names, loaders={layer: self.loaders[layer] for layer in wanted}, neuronpedia=shown)


def from_folders(pattern: str) -> SaeSource:
    """Folders in SAELens's format; `pattern` holds {layer}. Raises ValueError when none fits."""
    head = _require_layer(pattern, "--saes").split("{layer}", 1)[0]
    parent = Path(head).parent if not head.endswith("/") else Path(head)
    depth = len(Path(pattern).relative_to(parent).parts)
    folders = (path for path in parent.glob("/".join("*" * depth)) if (path / "cfg.json").is_file())
    names = matching(map(str, folders), pattern)
    if not names:
        raise ValueError(f"no SAE folder (with a cfg.json) fits {pattern}")
    return SaeSource(
        where=Path(pattern).name,
        names=names,
        loaders={layer: partial(open_folder, Path(name)) for layer, name in names.items()},
        identity=digest(map(Path, names.values())),
        neuronpedia=_told_by_folders({layer: Path(name) for layer, name in names.items()}),
    )


def from_repository(text: str) -> SaeSource:
    """`repository:path`, {layer} in the path: SAELens folders in a Hugging Face repository, at its newest commit."""
    repository, path = text.split(":", 1)
    folder = hub.snapshot(repository, _require_layer(path, "--saes").replace("{layer}", "*") + "/cfg.json")
    names = matching((str(file.parent.relative_to(folder)) for file in folder.rglob("cfg.json")), path)
    if not names:
        raise ValueError(f"{repository} holds no SAE folder (with a cfg.json) that fits {path}")
    return SaeSource(
        where=text,
        names=names,
        loaders={layer: partial(_open_repository, repository, folder.name, name) for layer, name in names.items()},
        identity=f"{repository}@{folder.name}:{path}",
        repository=repository,
        commit=folder.name,
        neuronpedia=_told_by_folders({layer: folder / name for layer, name in names.items()}),
    )


def from_release(release: str, pattern: str | None, *, revision: str | None = None) -> SaeSource:
    """A release of SAELens's registry. `pattern` is an id with {layer}, and {l0} where ids name an average L0.

    Without a pattern, the ids must differ in their layer alone. Files are read at the commit `revision` of the
    repository, by default its newest. Raises ValueError naming near releases, or ids.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    registry = get_pretrained_saes_directory()
    if release not in registry:
        raise ValueError(f"SAELens knows no release {release!r}: {did_you_mean(release, registry)}See `docs/models.md`")
    entry = registry[release]
    ids = list(entry.saes_map)
    names = matching(ids, _only_pattern(release, ids) if pattern is None else _require_layer(pattern, "--sae-id"))
    if not names:
        raise ValueError(f"--sae-id {pattern}: no id of {release} fits; there are {_some(ids)}")
    newest = f"by --sae-release {release}, which takes the newest"
    commit = hub.snapshot(entry.repo_id, "README.md", revision=revision, choice=newest).name
    return SaeSource(
        where=release,
        names=names,
        loaders={layer: partial(_open_release, release, name, commit) for layer, name in names.items()},
        identity=f"{entry.repo_id}@{commit}:{json.dumps(names)}",
        repository=entry.repo_id,
        commit=commit,
        neuronpedia=_told_by_registry(registry, release, names),
    )


def _told_by_registry(registry: Mapping[str, Any], release: str, names: Mapping[int, str]) -> dict[int, str]:
    """What the registry calls these SAEs on Neuronpedia: the release itself, else another that lists the same file."""
    own = registry[release]
    told = {
        (entry.repo_id, entry.saes_map[name]): shown
        for entry in (*registry.values(), own)
        if entry.repo_id == own.repo_id
        for name, shown in entry.neuronpedia_id.items()
        if shown and name in entry.saes_map
    }
    files = {layer: (own.repo_id, own.saes_map[name]) for layer, name in names.items()}
    return {layer: told[file] for layer, file in files.items() if file in told}


def _told_by_folders(folders: Mapping[int, Path]) -> dict[int, str]:
    """What the configurations of SAELens folders call their SAEs on Neuronpedia, where they do."""
    told = {}
    for layer, folder in folders.items():
        with suppress(OSError, ValueError, TypeError, AttributeError):
            shown = json.loads((folder / "cfg.json").read_bytes()).get("metadata", {}).get("neuronpedia_id")
            if isinstance(shown, str):
                told[layer] = shown
    return told


def releases_for(model: str) -> list[str]:
    """Residual releases of SAELens's registry for a model's repository name: its own, then those of its base model."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    wanted = model.split("/")[-1].casefold()
    base = re.sub("-(it|instruct|chat)$", "", wanted)
    found: dict[str, list[str]] = {wanted: [], base: []}
    for name, entry in get_pretrained_saes_directory().items():
        if not _ELSEWHERE.search(name):
            found.get(entry.model.split("/")[-1].casefold(), []).append(name)
    return [name for names in found.values() for name in names]


def matching(ids: Iterable[str], pattern: str) -> dict[int, str]:
    """Layer -> the id that fits `pattern`; of several, the one whose average L0 is nearest 100, then the smaller."""
    shape = _regex(pattern)
    best: dict[int, tuple[float, float, str]] = {}
    for name in ids:
        if match := shape.fullmatch(name):
            l0 = float(match.groupdict().get("l0") or L0)
            layer, rank = int(match["layer"]), (abs(l0 - L0), l0, name)
            best[layer] = min(best.get(layer, rank), rank)
    return {layer: name for layer, (_, _, name) in sorted(best.items())}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names nearest to `name`, as a question; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}? " if near else ""


def digest(folders: Iterable[Path]) -> str:
    """SHA-256 over all files of some folders, their names included."""
    total = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            total.update(f"{file.relative_to(folder)}\0".encode())
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def _regex(pattern: str) -> re.Pattern[str]:
    """{layer}, however often it stands in the pattern, is one number; {l0} is another."""
    shape = re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)", 1).replace(r"\{layer\}", r"(?P=layer)")
    return re.compile(shape.replace(r"\{l0\}", r"(?P<l0>\d+(?:\.\d+)?)", 1))


def _require_layer(pattern: str, flag: str) -> str:
    if "{layer}" not in pattern:
        raise ValueError(f"{flag} {pattern}: write {{layer}} where the layer's number stands")
    return pattern


def _only_pattern(release: str, ids: list[str]) -> str:
    """The one way to read all ids of a release as one SAE a layer."""
    first = ids[0]
    tried = [f"{first[: n.start()]}{{layer}}{first[n.end() :]}" for n in re.finditer(r"\d+", first)]
    fits = [pattern for pattern in tried if len(matching(ids, pattern)) == len(ids)]
    if len(fits) != 1:
        raise ValueError(
            f"release {release} holds several SAEs a layer, such as {_some(ids)}: choose with --sae-id, writing "
            "{layer} where the layer's number stands (and {l0} for an average L0: the one nearest 100 is taken)"
        )
    return fits[0]


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:3]) + (f" ... {ids[-1]}" if len(ids) > 3 else "")


def open_folder(folder: Path, device: str) -> Any:
    """The SAE of a folder in SAELens's format. Raises ValueError, one line, when it cannot be read."""
    from sae_lens import SAE

    # float32 whatever the file holds: a threshold rounded to bfloat16 moves features on and off.
    return _opened(str(folder), lambda: SAE.load_from_disk(folder, device=device, dtype="float32"), folder)


def _open_repository(repository: str, commit: str, path: str, device: str) -> Any:
    return open_folder(hub.snapshot(repository, f"{path}/*", revision=commit) / path, device)


def _open_release(release: str, name: str, commit: str, device: str) -> Any:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name, get_repo_id_and_folder_name

    kind = get_conversion_loader_name(release)
    # SAELens's own reader of these files asks the hub for their shapes even where they are cached.
    reader = partial(gemma_scope_2, revision=commit) if kind == "gemma_3" else pinned.reader(kind, commit)
    repository, path = get_repo_id_and_folder_name(release, name)
    asked = hub.Asked(repository, commit)
    return _opened(
        f"{name} of {release}",
        lambda: SAE.from_pretrained(release, name, device=device, dtype="float32", converter=reader),
        (hub.cached(asked) or Path()) / path,
        asked,
    )


def _opened(what: str, load: Callable[[], Any], place: Path, asked: hub.Asked | None = None) -> Any:
    """The SAE, or ValueError in one line: `place` is looked at for a file that is not whole.

    Running out of memory is no fault of the file and passes through.
    """
    try:
        with warnings.catch_warnings():
            # The SAE's own note says so where it matters.
            warnings.filterwarnings("ignore", message="norm_scaling_factor not found")
            return load()
    except Exception as error:
        # Each format's reader fails in its own way: a key, a shape, a zip file cut short, a pickle that is no tensor.
        if is_out_of_memory(error):
            raise
        reason = (asked and hub.explained(error, asked)) or damaged.described(place)
        reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"cannot load an SAE from {what}: {reason}") from error


class Read(NamedTuple):
    """What SAELens asks of a reader."""

    config: dict[str, Any]
    weights: dict[str, Any]
    sparsity: None


def gemma_scope_2(
    repo_id: str,
    folder_name: str,
    device: str,
    force_download: bool,
    cfg_overrides: dict[str, Any] | None,
    revision: str | None = None,
) -> Read:
    """Reader of Gemma Scope 2's residual SAEs (`params.safetensors`: w_enc, w_dec, b_enc, b_dec, threshold).

    Shapes come from the file itself, so it works offline. Raises ValueError for a site that is no residual stream.
    """
    from huggingface_hub import hf_hub_download

    layer = re.search(r"layer_(\d+)", folder_name)
    if "resid_post" not in folder_name or layer is None:
        raise ValueError(f"{folder_name} is no SAE on the residual stream after a layer: choose a resid_post one")
    name = f"{folder_name}/params.safetensors"
    file = hf_hub_download(repo_id, name, revision=revision, force_download=force_download)
    with safe_open(file, framework="pt", device=device) as stored:
        weights = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
    weights["W_enc"], weights["W_dec"] = weights.pop("w_enc"), weights.pop("w_dec")
    config = {
        "architecture": "jumprelu",
        "d_in": weights["W_enc"].shape[0],
        "d_sae": weights["W_enc"].shape[1],
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "model_name": repo_id.replace("gemma-scope-2", "gemma-3"),
        "hook_name": f"blocks.{layer[1]}.hook_resid_post",
        **(cfg_overrides or {}),
    }
    return Read(config, weights, None)
