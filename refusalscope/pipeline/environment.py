"""What a run was made on: versions, commit, hardware. Times stand here and in logs, nowhere else."""

import datetime
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from refusalscope import __version__
from refusalscope.inputs.presets import Target

PACKAGES = ("torch", "transformers", "sae-lens", "numpy", "scipy", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    return {"refusalscope": __version__, **{package: _version(package) for package in PACKAGES}}


@cache
def _version(package: str) -> str:
    # Every cache key asks for it, and to look it up takes a search of all that is installed.
    return version(package)


def describe(*, device: str, seed: int, seconds: float) -> dict[str, Any]:
    """The content of `environment.json`."""
    import torch

    return {
        "versions": versions(),
        "python": platform.python_version(),
        "commit": commit(),
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "device": device,
        "seed": seed,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def origin(target: Target, trust_remote_code: bool) -> dict[str, Any]:
    """The part of `environment.json` that says which weights these are, and whether code came with them."""
    saes = target.saes
    return {
        "model": {"source": target.model, "requested": target.requested, "commit": target.revision},
        "saes": {
            "source": saes.where,
            "repository": saes.repository,
            "commit": saes.commit,
            "layers": list(saes.names),
        },
        "trust_remote_code": trust_remote_code,
    }


def commit() -> str | None:
    """The source checkout's git commit, or None when the package runs from anywhere else."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
