"""Which file of a model or an SAE is not whole: looked for only when reading has failed, since it costs reading them.

Knows how files are laid out, nothing of what they mean.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from refusalscope.inputs.hub import first_line

INDEX = "*.safetensors.index.json"


def described(place: Path) -> str | None:
    """The first file of a folder, or of files whose path begins with `place`, that is not whole, in one line.

    The line names the file, its size, what is wrong and what to do. None where nothing is wrong with any of them.
    """
    for file in _files(place):
        if wrong := _wrong(file):
            size = file.stat().st_size
            return f"{file} is damaged ({size:,} bytes; {wrong}): {_advice(file)}"
    return None


def lacking(folder: Path) -> str:
    """The shards that an index of weights names and that are not there, in words; empty where all are."""
    names: dict[str, None] = {}
    for index in sorted(folder.glob(INDEX)):
        try:
            names |= dict.fromkeys(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError):
            # An index that is damaged itself is found as such.
            continue
    missing = [name for name in names if not (folder / name).is_file()]
    return ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")


def _files(place: Path) -> Iterator[Path]:
    """Files before weights: what is quickly read is looked at first."""
    found = place.rglob("*") if place.is_dir() else place.parent.glob(f"{place.name}*")
    yield from sorted((file for file in found if file.is_file()), key=lambda file: (file.stat().st_size, file))


def _wrong(file: Path) -> str | None:
    """What is wrong with a file: its size, else its layout, else its content; None where nothing is."""
    if not file.stat().st_size:
        return "it is empty"
    check = LAYOUTS.get(file.suffix)
    if check is None:
        return _altered(file)
    try:
        return check(file)
    except (ValueError, LookupError, TypeError, zipfile.BadZipFile, RecursionError) as error:
        return f"no {file.suffix} file: {first_line(error)}"


def _json(file: Path) -> None:
    json.loads(file.read_bytes())


def _safetensors(file: Path) -> str | None:
    """Eight bytes for the header's length, the header, then as many bytes as its last tensor ends at."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > size:
            return "it ends within its header"
        header = json.loads(stream.read(length))
    ends = [part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"]
    whole = 8 + length + max(ends, default=0)
    return None if whole == size else f"its header says {whole:,}"


def _zip(file: Path) -> str | None:
    """Every part of an archive carries a checksum. What torch saved long ago is no archive."""
    with file.open("rb") as stream:
        archive = stream.read(2) == b"PK"
    if not archive and file.suffix != ".npz":
        return _altered(file)
    with zipfile.ZipFile(file) as parts:
        broken = parts.testzip()
    return None if broken is None else f"its part {broken} has another checksum"


LAYOUTS: dict[str, Callable[[Path], str | None]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    **dict.fromkeys((".npz", ".pt", ".pth", ".bin"), _zip),
}
"""Layouts that prove themselves. The hub's own checksum proves the rest, where there is one."""


def _altered(file: Path) -> str | None:
    """Large files of the hub are stored under their SHA-256."""
    stored = _stored(file)
    if stored is None or not re.fullmatch("[0-9a-f]{64}", stored.name):
        return None
    with file.open("rb") as stream:
        same = hashlib.file_digest(stream, "sha256").hexdigest() == stored.name
    return None if same else "its SHA-256 is not that of the hub's file"


def _stored(file: Path) -> Path | None:
    """Where the hub's cache keeps the content of a file; None for a file that is no link to there."""
    if not file.is_symlink():
        return None
    stored = Path(os.path.normpath(file.parent / os.readlink(file)))
    return stored if stored.parent.name == "blobs" else None


def _advice(file: Path) -> str:
    if "snapshots" not in file.parts:
        return "copy or download it again"
    stored = _stored(file)
    also = "" if stored is None else f" and {stored}"
    return f"delete it{also}, then run the same command again with a network"
