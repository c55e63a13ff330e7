"""Where the embedded assets lie, and the check that they are whole.

Knows file names and checksums, nothing of models.
"""

import hashlib
import json
from pathlib import Path

ASSETS = Path(__file__).with_name("assets")
CHECKSUMS = "checksums.json"
REMEDY = "restore the file, or build the assets anew with `refusalscope testbed build`"


def verify(path: Path = ASSETS) -> None:
    """Raise ValueError, naming the first file that is missing or altered, unless every checksum agrees."""
    listing = Path(path) / CHECKSUMS
    if not listing.is_file():
        raise ValueError(f"no testbed assets at {path}: {CHECKSUMS} is missing; {REMEDY}")
    expected: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))
    for name, wanted in expected.items():
        file = Path(path) / name
        found = _sha256(file) if file.is_file() else "no file"
        if found != wanted:
            raise ValueError(
                f"testbed asset {file} is damaged: expected sha256 {wanted[:12]}, found {found[:12]}; {REMEDY}"
            )


def checksums(path: Path) -> dict[str, str]:
    """The sha256 of every file below `path` except the listing itself, by relative path, sorted."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    return {file.relative_to(path).as_posix(): _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
