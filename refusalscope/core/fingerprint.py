"""What a value is, as sixteen digits: the hash by which cache keys and provenance name nouns and options."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def fingerprint(*values: Any) -> str:
    """Sixteen hexadecimal digits of SHA-256 over the content of `values`.

    Accepts nested dataclasses, mappings (order ignored), sequences, tensors, strings, numbers and None.
    Raises TypeError for anything else, rather than hashing an address.
    """
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        digest.update(f"{type(value).__name__}(".encode())
        for item in fields(value):
            digest.update(f"{item.name}=".encode())
            _feed(digest, getattr(value, item.name))
    elif isinstance(value, Mapping):
        digest.update(f"map {len(value)};".encode())
        for key in sorted(value, key=lambda key: (str(key), type(key).__name__)):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, (str, int, float, bool)):
        digest.update(f"{type(value).__name__} {json.dumps(value)};".encode())
    else:
        raise TypeError(f"cannot fingerprint a {type(value).__name__}")
