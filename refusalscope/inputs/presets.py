"""What a model name on the command line means: a preset of the table, or a folder on disk."""

import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from refusalscope.testbed import shipped

FACTORS = (0.5, 0.0, -0.5, -1.0, -2.0, -3.0)
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Target:
    """A model to study, its SAEs, and the settings that belong to it."""

    name: str
    model: Path
    sae_folders: dict[int, Path]
    prompts: str | None
    """The model's own prompt source (`testbed`), or None."""
    max_new_tokens: int
    factors: tuple[float, ...]
    published_skip: int
    """Leading tokens that the published token mask leaves out: BOS alone, 26 for Llama 3."""
    values: tuple[float, ...]
    """What features are set to when refusal is induced; empty: derive them from the features' activations."""
    identity: str
    """SHA-256 over the model's and the SAEs' files: it changes whenever a weight does."""


def presets() -> dict[str, Any]:
    """The table of models, by name."""
    return tomllib.loads((files("refusalscope.inputs") / "presets.toml").read_text("utf-8"))


def resolve(name: str, saes: str | None) -> Target:
    """The target that `name` stands for; `saes` is a folder pattern with {layer} and overrides the preset's.

    Raises ValueError when there is no such model (naming near ones), or no SAE folder fits, or an asset is damaged.
    """
    table = presets()
    preset = table.get(name)
    if preset is None and not (Path(name) / "config.json").is_file():
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"unknown model {name!r}: {hint}Known are {', '.join(table)}; "
            "or give the folder of a Hugging Face checkpoint (with a config.json) and --saes"
        )
    model = Path(name) if preset is None else _path(preset["model"])
    pattern = saes or (None if preset is None else preset["saes"])
    if pattern is None:
        raise ValueError(
            f"model {name}: name its SAEs with --saes FOLDER, with {{layer}} where the layer's number stands"
        )
    if model.is_relative_to(shipped.ASSETS):
        shipped.verify()
    folders = _sae_folders(str(_path(pattern)))
    settings = preset or {}
    return Target(
        name=name if preset is not None else model.resolve().name,
        model=model,
        sae_folders=folders,
        prompts=settings.get("prompts"),
        max_new_tokens=settings.get("max_new_tokens", MAX_NEW_TOKENS),
        factors=tuple(settings.get("factors", FACTORS)),
        published_skip=settings.get("published_skip", 1),
        values=tuple(settings.get("values", ())),
        identity=_digest([model, *folders.values()]),
    )


def _path(text: str) -> Path:
    inside = text.removeprefix("package:")
    return Path(str(files("refusalscope"))) / inside if inside != text else Path(text)


def _sae_folders(pattern: str) -> dict[int, Path]:
    if "{layer}" not in pattern:
        raise ValueError(f"--saes {pattern}: write {{layer}} where the layer's number stands in the folder names")
    head, tail = pattern.split("{layer}", 1)
    shape = re.compile(re.escape(head) + r"(\d+)" + re.escape(tail))
    parent = Path(head).parent if not head.endswith("/") else Path(head)
    depth = len(Path(pattern).relative_to(parent).parts)
    matches = ((shape.fullmatch(str(path)), path) for path in parent.glob("/".join("*" * depth)))
    found = {int(match[1]): path for match, path in matches if match and (path / "cfg.json").is_file()}
    if not found:
        raise ValueError(f"no SAE folder (with a cfg.json) fits {pattern}")
    return dict(sorted(found.items()))


def _digest(folders: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder)}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
