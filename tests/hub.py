"""A local Hugging Face cache, filled with real names and file formats, and a server that answers as the hub does.

The contents are invented: `tests.hub_models` makes the models, this file the SAEs and the prompts.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from refusalscope.inputs import presets
from tests import hub_models

WIDTHS = {"16k": 16384, "65k": 65536}
SMALL_FILES = (".json", ".jinja", ".md")
SMALL = 128
"""d_sae where SAELens reads it from the file."""
THRESHOLDS = (0.5, 1.0, 2.0)
"""Of features in turn: about the residual stream's scale in the middle layers, so that some are active anywhere."""
LLAMA_THRESHOLD = 1.0


class Served(NamedTuple):
    """What a preset asks the hub for: a model, a release of SAEs, and the id of the one SAE that is there."""

    model: str
    release: str
    sae_id: str
    layer: int


def _gemma_3(size: str, layer: int) -> Served:
    return Served(
        f"google/gemma-3-{size}-it", f"gemma-scope-2-{size}-it-res-all", f"layer_{layer}_width_16k_l0_small", layer
    )


GEMMA_2_9B, LLAMA = "google/gemma-2-9b-it", "meta-llama/Llama-3.1-8B-Instruct"
PRESETS = {
    # Of the SAEs of that layer and width, the one whose l0 is nearest to 100.
    "gemma-2-2b": Served("google/gemma-2-2b-it", "gemma-scope-2b-pt-res", "layer_15/width_65k/average_l0_127", 15),
    "gemma-2-9b": Served(GEMMA_2_9B, "gemma-scope-9b-pt-res", "layer_21/width_16k/average_l0_129", 21),
    "gemma-2-9b-it-saes": Served(GEMMA_2_9B, "gemma-scope-9b-it-res", "layer_20/width_16k/average_l0_91", 20),
    "llama-3.1-8b": Served(LLAMA, "llama_scope_lxr_8x", "l15r_8x", 15),
    "llama-3.1-8b-andyrdt": Served(LLAMA, "llama-3.1-8b-instruct-andyrdt", "resid_post_layer_15_trainer_1", 15),
    "gemma-3-270m": _gemma_3("270m", 9),
    "gemma-3-1b": _gemma_3("1b", 13),
    "gemma-3-4b": _gemma_3("4b", 17),
    "gemma-3-12b": _gemma_3("12b", 24),
    "gemma-3-27b": _gemma_3("27b", 31),
    "qwen-2.5-7b": Served(
        "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct-andyrdt", "resid_post_layer_15_trainer_1", 15
    ),
    "qwen-3.5-27b": Served("Qwen/Qwen3.5-27B", "qwen-scope-3.5-27b-w80k-l50", "layer32", 32),
}


def fill(cache: Path, served: Served) -> None:
    """Put the model and the SAE that a preset asks for into the hub cache folder `cache`."""
    model(cache, served.model)
    sae(cache, served.release, served.sae_id, width=hub_models.REPOSITORIES[served.model].width)


def model(cache: Path, name: str) -> None:
    """Put the model repository `name` into `cache`, unless it is there."""
    folder = snapshot(cache, name, pinned("model", name, "revision"))
    if not (folder / "config.json").exists():
        hub_models.save(name, folder)


def sae(cache: Path, release: str, sae_id: str, *, width: int) -> None:
    """Put the files of one SAE of SAELens's registry into `cache`, unless they are there."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory()[release]
    path = entry.saes_map[sae_id]
    folder = snapshot(cache, entry.repo_id, pinned("sae_release", release, "sae_revision"))
    if not (folder / path).exists():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        factor = entry.norm_scaling_factor.get(sae_id)
        WRITERS[str(entry.conversion_func)](folder / path, width=width, factor=factor)


def pinned(key: str, value: str, pin: str) -> str | None:
    """The commit that the presets whose `key` is `value` name as their `pin`; None where they name none."""
    found = {preset.get(pin) for preset in presets.presets().values() if preset.get(key) == value}
    assert len(found) < 2, f"{value} is pinned twice"
    return next(iter(found), None)


def snapshot(cache: Path, repository: str, commit: str | None = None) -> Path:
    """The folder that holds the files of `repository` at its one commit, made if it is not there."""
    home = cache / f"models--{repository.replace('/', '--')}"
    commit = commit or hashlib.sha1(repository.encode()).hexdigest()
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    return folder


def dataset(cache: Path, repository: str, commit: str, files: Mapping[str, str]) -> None:
    """Put a data set repository with these files (path -> content) at a commit into `cache`; `main` is that commit."""
    home = cache / f"datasets--{repository.replace('/', '--')}"
    for name, content in files.items():
        file = home / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode())
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)


def _random(width: int) -> tuple[Float[Tensor, "d_sae d_model"], Float[Tensor, "d_sae"]]:
    """Unit rows, and thresholds."""
    rows = torch.randn(SMALL, width, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True), torch.tensor(THRESHOLDS).repeat(SMALL)[:SMALL]


def _gemma_scope(folder: Path, *, width: int, factor: float | None) -> None:
    # Each feature reads two dimensions, no two the same: nearly all zeros, so that such large files are written fast.
    size = next(size for name, size in WIDTHS.items() if f"width_{name}" in str(folder))
    feature = np.arange(size)
    decoder = np.zeros((size, width), np.float32)
    turn = feature // width
    decoder[feature, feature % width] = np.where(turn % 2, -0.8, 0.8)
    decoder[feature, (feature + 1 + 7 * turn) % width] = 0.6
    folder.mkdir()
    arrays = {"W_enc": np.ascontiguousarray(decoder.T), "W_dec": decoder, "b_enc": np.zeros(size, np.float32)}
    arrays |= {
        "b_dec": np.zeros(width, np.float32),
        "threshold": np.array(THRESHOLDS, np.float32)[turn % len(THRESHOLDS)],
    }
    # As np.savez_compressed, at the level that is written and read twice as fast.
    with ZipFile(folder / "params.npz", "w", ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array)


def _gemma_scope_2(folder: Path, *, width: int, factor: float | None) -> None:
    rows, threshold = _random(width)
    folder.mkdir()
    tensors = {"w_enc": rows.T.contiguous(), "w_dec": rows, "b_enc": torch.zeros(SMALL), "b_dec": torch.zeros(width)}
    save_file({**tensors, "threshold": threshold}, folder / "params.safetensors")
    model_name = str(folder).split("models--")[1].split("/")[0].replace("--", "/").replace("scope-2", "3")
    if "270m" not in model_name:
        # Some repositories have no config.json: SAELens then reads the folder's name.
        hook = re.sub(r".*layer_(\d+)_.*", r"model.layers.\1.output", folder.name)
        about = {"architecture": "jump_relu", "model_name": model_name, "hf_hook_point_in": hook}
        (folder / "config.json").write_text(json.dumps({**about, "width": SMALL, "l0": 20, "type": "sae"}))


def _llama_scope(folder: Path, *, width: int, factor: float | None) -> None:
    assert factor is not None
    rows, _ = _random(width)
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {"encoder.weight": rows, "decoder.weight": rows.T.contiguous()}
    tensors |= {"encoder.bias": torch.zeros(SMALL), "decoder.bias": torch.zeros(width)}
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
        folder / "checkpoints" / "final.safetensors",
    )
    hook = re.sub(r".*-L(\d+)R-.*", r"blocks.\1.hook_resid_post", folder.name)
    norm = width**0.5 / factor
    about = {"d_model": width, "d_sae": SMALL, "expansion_factor": 8, "hook_point_in": hook, "hook_point_out": hook}
    about |= {"dataset_average_activation_norm": {"in": norm, "out": norm}, "jump_relu_threshold": LLAMA_THRESHOLD}
    (folder / "hyperparams.json").write_text(json.dumps({**about, "act_fn": "jumprelu", "dtype": "torch.bfloat16"}))


def _dictionary_learning(folder: Path, *, width: int, factor: float | None) -> None:
    rows, _ = _random(width)
    folder.mkdir()
    tensors = {"encoder.weight": rows, "decoder.weight": rows.T.contiguous(), "encoder.bias": torch.zeros(SMALL)}
    tensors |= {"b_dec": torch.zeros(width), "k": torch.tensor(64), "threshold": torch.tensor(THRESHOLDS[0])}
    torch.save(tensors, folder / "ae.pt")
    repository = str(folder).split("models--andyrdt--saes-")[1].split("/")[0]
    name = next(name for name in hub_models.REPOSITORIES if name.lower().endswith(repository))
    trainer = {"trainer_class": "BatchTopKTrainer", "dict_class": "BatchTopKSAE", "k": 64, "lm_name": name}
    trainer |= {"layer": int(folder.parent.name.rsplit("_", 1)[1]), "activation_dim": width, "dict_size": SMALL}
    buffer = {"d_submodule": width, "io": "out", "ctx_len": 1024, "refresh_batch_size": 256, "out_batch_size": 2048}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))


def _qwen_scope(file: Path, *, width: int, factor: float | None) -> None:
    size = 1024 * int(re.sub(r".*-W(\d+)K-.*", r"\1", str(file)))
    # Row i is base[i : i + width]: all rows differ, and the file holds `base` alone.
    base = torch.randn(size + width, generator=torch.Generator().manual_seed(0)) / width**0.5
    encoder, decoder = base.as_strided((size, width), (1, 1)), base.as_strided((width, size), (1, 1))
    torch.save({"W_enc": encoder, "W_dec": decoder, "b_enc": torch.zeros(size), "b_dec": torch.zeros(width)}, file)


WRITERS: dict[str, Callable[..., None]] = {
    "gemma_2": _gemma_scope,
    "gemma_3": _gemma_scope_2,
    "llama_scope": _llama_scope,
    "dictionary_learning_1": _dictionary_learning,
    "qwen_scope": _qwen_scope,
}


EXPIRED = "hf_expired"
"""A token that the server does not know."""


@contextmanager
def served(cache: Path, *, gated: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server that gives out the repositories in `cache` as the hub does.

    The files of `gated` ones it gives to no one: their terms were not accepted.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, cache, frozenset(gated))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Hub(BaseHTTPRequestHandler):
    """Files at /NAME/resolve/REVISION/PATH, whole or by range; what there is at /api/models/NAME."""

    def __init__(self, cache: Path, gated: frozenset[str], *connection: Any) -> None:
        self.cache, self.gated = cache, gated
        super().__init__(*connection)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        api = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(?:/(tree|revision)/([^/?]+)/?([^?]*))?(\?.*)?", self.path)
        named = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        found = named or api
        home = self.cache / f"models--{found[1].replace('/', '--')}" if found else self.cache / "none"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == EXPIRED:
            return self._reply(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if found is None or not home.is_dir():
            return self._reply(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        folder = _at(home, found[2] if named else found[3] or "main")
        if folder is None:
            return self._reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if named is None and (folder / (found[4] or "")).is_dir():
            return self._reply(200, _listing(folder, found[1], trees=found[2] == "tree"), {})
        if named and named[1] in self.gated:
            return self._reply(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
        if named is None or not (file := folder / named[3]).is_file():
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": folder.name})
        return self._file(file, folder.name)

    def _file(self, file: Path, commit: str) -> bytes:
        # The hub names large files by their SHA-256.
        content = file.read_bytes()
        name = (hashlib.sha1 if file.suffix in SMALL_FILES else hashlib.sha256)(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._reply(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._reply(206, content[first : last + 1], headers)

    def _reply(self, status: int, content: bytes, headers: dict[str, str]) -> bytes:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        return content

    def log_message(self, format: str, *_: Any) -> None:
        """Say nothing: the tests' output is no server log."""


def _at(home: Path, revision: str) -> Path | None:
    """The folder of a commit, or of the commit that a branch or tag is."""
    ref = home / "refs" / revision
    folder = home / "snapshots" / (ref.read_text() if ref.is_file() else revision)
    return folder if folder.is_dir() else None


def _listing(folder: Path, name: str, *, trees: bool) -> bytes:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    paths = [str(file.relative_to(folder)) for file in files]
    if trees:
        sizes = (file.stat().st_size for file in files)
        rows = zip(paths, sizes, strict=True)
        return json.dumps(
            [{"type": "file", "path": path, "size": size, "oid": "0" * 40} for path, size in rows]
        ).encode()
    return json.dumps({"id": name, "sha": folder.name, "siblings": [{"rfilename": path} for path in paths]}).encode()


def prompts_folder(folder: Path, *, train: int = 24, other: int = 24) -> Path:
    """Write a `refusal_direction` folder of invented, harmless questions, no two alike; returns `folder`.

    `train` questions stand in each train split and `other` in every other file.
    """
    names = [f"splits/{label}_{split}" for label in ("harmful", "harmless") for split in ("train", "val", "test")]
    names += [f"processed/{name}" for name in ("harmbench_test", "jailbreakbench", "advbench")]
    for file, verb in zip(names, hub_models.VERBS, strict=True):
        ask = "What colour is a {} that can {}?" if "harmless" in file else "Explain how to {1} the {0}."
        things = hub_models.THINGS[: train if file.endswith("train") else other]
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        rows = [{"instruction": ask.format(thing, verb), "category": None} for thing in things]
        (folder / f"{file}.json").write_text(json.dumps(rows))
    return folder
