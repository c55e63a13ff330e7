"""The only reader and writer of results: one folder a run, every artifact keyed by what made it.

Safetensors for arrays, JSON and JSONL for the rest, all written atomically. `manifest.json` maps each artifact to its
key (a fingerprint of inputs and options) and checksum: an artifact whose key stands there with its bytes intact is not
made again, so a run that was killed at any moment resumes where it stopped.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from refusalscope.core.activations import Activations
from refusalscope.core.disk import Claim, write_atomically
from refusalscope.core.scores import Activity, Attribution, Scores, Trace
from refusalscope.core.types import (
    Direction,
    Feature,
    FeatureSet,
    Finding,
    LayerScores,
    NaN,
    Prompt,
    Prompts,
    Response,
    Responses,
    Row,
    SaeSlice,
    Verdict,
    Verdicts,
)

T = TypeVar("T")
Codec = tuple[Callable[[Any], bytes], Callable[[bytes], Any]]
Tensors = dict[str, Tensor]
MANIFEST = "manifest.json"


class Store:
    """A run folder. `get` makes an artifact once and afterwards reads it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.claim = Claim(root)
        """For whoever writes: two processes in one folder would undo each other's manifest."""
        self.made: list[str] = []
        """Paths written by this process, in order; empty after a full resume."""

    def has(self, path: str, key: str) -> bool:
        """Whether `path` was made under `key` and still has the bytes it was written with."""
        entry = self._manifest().get(path)
        file = self.root / path
        return entry is not None and entry["key"] == key and file.is_file() and _sha256(file) == entry["sha256"]

    def get(self, path: str, key: str, kind: type[T], make: Callable[[], T]) -> T:
        """The artifact at `path`: read where it stands under `key`, otherwise made, written and returned."""
        self.ensure(path, key, make)
        return self.read(path, kind)

    def ensure(self, path: str, key: str, make: Callable[[], Any]) -> None:
        """Make and write the artifact at `path` unless it stands under `key`."""
        if not self.has(path, key):
            self.put(path, key, make())

    def keep(self, path: str, key: str, value: Any) -> None:
        """Write `value` unless it stands at `path` under `key` already."""
        self.ensure(path, key, lambda: value)

    def put(self, path: str, key: str, value: Any) -> None:
        """Write `value` (a noun, bytes, text or plain JSON data) at `path`, then its key into the manifest."""
        content = to_bytes(value)
        write_atomically(self.root / path, content)
        entry = {"key": key, "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {**self._manifest(), path: entry}
        write_atomically(self.root / MANIFEST, to_json(manifest))
        self.made.append(path)

    def drop(self, folder: str) -> None:
        """Remove every artifact below `folder`, first from the manifest; the folder is there until all are gone."""
        if (self.root / folder).is_dir():
            kept = {path: entry for path, entry in self._manifest().items() if not path.startswith(f"{folder}/")}
            write_atomically(self.root / MANIFEST, to_json(kept))
            shutil.rmtree(self.root / folder)

    def keep_only(self, folder: str, paths: Collection[str]) -> None:
        """Remove the artifacts below `folder` that are not among `paths`: what an earlier command left there."""
        if left := [path for path in self.paths(folder, "") if path not in paths]:
            kept = {path: entry for path, entry in self._manifest().items() if path not in left}
            write_atomically(self.root / MANIFEST, to_json(kept))
            for path in left:
                (self.root / path).unlink(missing_ok=True)

    def read(self, path: str, kind: type[T]) -> T:
        """Read an artifact; tensors are mapped, so that what nobody looks at takes no memory.

        Raises ValueError naming the file when it is missing or does not parse as `kind`.
        """
        file = self.root / path
        try:
            return MAPPED[kind](*_mapped(file)) if kind in MAPPED else CODECS[kind][1](file.read_bytes())
        except FileNotFoundError as error:
            raise ValueError(f"{file} is missing: is {self.root} a finished run?") from error
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as {kind.__name__}: {error}") from error

    def tensor(self, path: str, name: str, column: int | None = None) -> Tensor:
        """One tensor of an artifact, or its `[:, column]`, off the memory-mapped file: the rest of it is not read."""
        with safe_open(self.root / path, "pt") as file:
            part = file.get_slice(name)
            return part[:] if column is None else part[:, column]

    def paths(self, folder: str, suffix: str) -> list[str]:
        """Artifacts of the manifest below `folder` whose name ends in `suffix`, sorted."""
        return sorted(p for p in self._manifest() if p.startswith(f"{folder}/") and p.endswith(suffix))

    def _manifest(self) -> dict[str, dict[str, str]]:
        file = self.root / MANIFEST
        if not file.is_file():
            return {}
        entries = self.read(MANIFEST, dict)
        if not all(isinstance(entry, dict) and {"key", "sha256"} <= set(entry) for entry in entries.values()):
            raise ValueError(f"{file} is damaged: delete it, and every stage is made again")
        return entries


def to_bytes(value: Any) -> bytes:
    """An artifact as it is written."""
    return write_tensors(value) if type(value) in MAPPED else CODECS[type(value)][0](value)


def to_json(value: Any) -> bytes:
    """Sorted, indented JSON; NaN is written as null, so that any JSON reader takes it."""
    return (json.dumps(_plain(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def _number(value: Any) -> Any:
    """A number as it was before `_plain`: null was NaN."""
    return NaN if value is None else value


def _read_object(content: bytes) -> dict[str, Any]:
    data = json.loads(content)
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, found {type(data).__name__}")
    return data


def _to_jsonl(head: Mapping[str, Any], rows: Iterable[Any]) -> bytes:
    lines = [head, *(asdict(row) for row in rows)]
    dumped = (json.dumps(_plain(line), sort_keys=True, ensure_ascii=False, allow_nan=False) for line in lines)
    return "".join(line + "\n" for line in dumped).encode()


def _from_jsonl(content: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    # Only \n ends a line: str.splitlines would also split at U+2028 inside a prompt.
    head, *rows = (json.loads(line) for line in content.decode().split("\n") if line)
    return head, rows


def _write_prompts(value: Prompts) -> bytes:
    return _to_jsonl({"data_set": value.name}, value.rows)


def _read_prompts(content: bytes) -> Prompts:
    head, rows = _from_jsonl(content)
    return Prompts(head["data_set"], tuple(Prompt(**row) for row in rows))


def _write_responses(value: Responses) -> bytes:
    head = {"dataset": value.dataset, "method": value.method, "setting": value.setting, "changed": value.changed}
    return _to_jsonl(head, value.rows)


def _read_responses(content: bytes) -> Responses:
    head, rows = _from_jsonl(content)
    return Responses(rows=tuple(_response(row) for row in rows), **head)


def _response(row: dict[str, Any]) -> Response:
    scores = {judge: _number(score) for judge, score in row.pop("scores").items()}
    return Response(scores=scores, **row)


def _write_verdicts(value: Verdicts) -> bytes:
    head = {item.name: getattr(value, item.name) for item in fields(value) if item.name != "rows"}
    return _to_jsonl(head, value.rows)


def _read_verdicts(content: bytes) -> Verdicts:
    head, rows = _from_jsonl(content)
    read = (row | {name: _number(row[name]) for name in ("score", "probability")} for row in rows)
    return Verdicts(rows=tuple(Verdict(**row) for row in read), **head)


def write_tensors(value: Any) -> bytes:
    """Safetensors bytes of a dataclass: tensors as such, everything else as JSON under the one metadata key."""
    parts = {item.name: getattr(value, item.name) for item in fields(value)}
    tensors = {name: part.contiguous() for name, part in sorted(parts.items()) if isinstance(part, Tensor)}
    rest = {name: _data(part) for name, part in parts.items() if not isinstance(part, Tensor)}
    # One key only: safetensors does not keep metadata keys in a fixed order.
    return save_tensors(tensors, metadata={"refusalscope": to_json(rest).decode()})


def _data(part: Any) -> Any:
    if isinstance(part, tuple) and part and isinstance(part[0], (LayerScores, Feature)):
        return [asdict(item) for item in part]
    return part


def _mapped(file: Path) -> tuple[Tensors, dict[str, Any]]:
    with safe_open(file, "pt") as stored:
        names = stored.keys()
        return {name: stored.get_tensor(name) for name in names}, json.loads(stored.metadata()["refusalscope"])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _direction(tensors: Tensors, rest: dict[str, Any]) -> Direction:
    scores = tuple(LayerScores(**{name: _number(part) for name, part in row.items()}) for row in rest.pop("scores"))
    lists = {name: tuple(rest.pop(name)) for name in ("refusal_tokens", "caveats")}
    return Direction(scores=scores, **lists, **tensors, **rest)


def _attribution(tensors: Tensors, rest: dict[str, Any]) -> Attribution:
    return Attribution(prompt_ids=tuple(rest["prompt_ids"]), dropped=tuple(rest["dropped"]), **tensors)


def _trace(tensors: Tensors, rest: dict[str, Any]) -> Trace:
    end = tensors.pop("end", None)
    return Trace(prompt_ids=tuple(rest["prompt_ids"]), layers=tuple(rest["layers"]), end=end, **tensors)


def _scores(tensors: Tensors, rest: dict[str, Any]) -> Scores:
    features = tuple(Feature(**row) for row in rest["features"])
    return Scores(rest["method"], tuple(rest["prompt_ids"]), features, tensors["values"])


def _activity(tensors: Tensors, rest: dict[str, Any]) -> Activity:
    return Activity(tuple(rest["layers"]), tuple(rest["sizes"]), tensors["mean"], rest["tokens"])


def _activations(tensors: Tensors, rest: dict[str, Any]) -> Activations:
    lists = {name: tuple(rest.pop(name)) for name in ("prompt_ids", "layers")}
    features = tuple(Feature(**row) for row in rest.pop("features"))
    return Activations(**{**lists, **rest, **tensors, "features": features})


def _slice(tensors: Tensors, rest: dict[str, Any]) -> SaeSlice:
    return SaeSlice(**{**rest, **tensors})


def _write_features(value: FeatureSet) -> bytes:
    rows = [
        {"layer": feature.layer, "index": feature.index, "score": score}
        for feature, score in zip(value.features, value.scores, strict=True)
    ]
    return to_json({"method": value.method, "parent": value.parent, "features": rows})


def _read_features(content: bytes) -> FeatureSet:
    data = _read_object(content)
    features = tuple(Feature(row["layer"], row["index"]) for row in data["features"])
    scores = tuple(_number(row["score"]) for row in data["features"])
    return FeatureSet(data["method"], features, scores, data["parent"])


FINDING_KEYS = {"study", "question", "rows", "caveats", "provenance"}


def _write_finding(value: Finding) -> bytes:
    return to_json({**asdict(value), "rows": [asdict(row) for row in value.rows]})


def _read_finding(content: bytes) -> Finding:
    """Parse and validate `findings/<study>.json`: exact keys, exact row keys, numbers that fit their n."""
    data = _read_object(content)
    if set(data) != FINDING_KEYS:
        raise ValueError(f"a finding has the keys {sorted(FINDING_KEYS)}")
    columns = {item.name for item in fields(Row)}
    for number, row in enumerate(data["rows"]):
        if not isinstance(row, dict) or set(row) != columns:
            raise ValueError(f"row {number} must have the keys {sorted(columns)}")
        if not isinstance(row["n"], int) or row["n"] < 0:
            raise ValueError(f"row {number}: n = {row['n']!r} is no count")
    if not isinstance(data["caveats"], list) or not isinstance(data["provenance"], dict):
        raise ValueError("caveats must be a list and provenance an object")
    rows = tuple(Row(**row) for row in data["rows"])
    return Finding(data["study"], data["question"], rows, tuple(data["caveats"]), data["provenance"])


MAPPED: dict[type, Callable[[Tensors, dict[str, Any]], Any]] = {
    Direction: _direction,
    Attribution: _attribution,
    Scores: _scores,
    Activity: _activity,
    Trace: _trace,
    SaeSlice: _slice,
    Activations: _activations,
}
"""What is tensors, and JSON under the one metadata key, in safetensors."""
CODECS: dict[type, Codec] = {
    Prompts: (_write_prompts, _read_prompts),
    Responses: (_write_responses, _read_responses),
    Verdicts: (_write_verdicts, _read_verdicts),
    FeatureSet: (_write_features, _read_features),
    Finding: (_write_finding, _read_finding),
    dict: (to_json, _read_object),
    str: (str.encode, bytes.decode),
    bytes: (bytes, bytes),
}
