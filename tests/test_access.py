"""What keeps a model or its SAEs from being read is one line that says what is wrong, where, and what to do.

The real loaders and, once each, the command line against a hub of our own, a cache of its own, and damaged files.
"""

import gc
import json
import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

from refusalscope.evals import checkpoints
from refusalscope.inputs import damaged, presets, releases, sources
from refusalscope.inputs.chat import ChatModel
from tests import hub, processes, tiny

MODEL = "google/gemma-3-270m-it"
PAGE = f"https://huggingface.co/{MODEL}"
COMMIT = presets.presets()["gemma-3-270m"]["revision"]
OTHER = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "make a token at https://huggingface.co/settings/tokens and set HF_TOKEN to it, or run `hf auth login`"


def at(address: str | None, cache: Path) -> dict[str, Any]:
    """What huggingface_hub read when it was imported, for a hub at `address` (None: offline) and an own cache."""
    hub_at = address or "http://127.0.0.1:9"
    return {
        "ENDPOINT": hub_at,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub_at + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": address is None,
        "HF_HUB_CACHE": str(cache),
    }


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub has: one model."""
    folder = tmp_path_factory.mktemp("shelf")
    hub.model(folder, MODEL)
    return folder


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Sets where the hub is; returns the folder of an empty cache."""

    def asked(address: str | None, token: str | None = None) -> Path:
        for name, value in at(address, tmp_path / "cache").items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", constants.ENDPOINT)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setenv("HF_TOKEN", token or "")
        return tmp_path / "cache"

    return asked


def nowhere() -> str:
    """An address where no one listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


def line(call: Callable[[], object]) -> str:
    """The one line with which a call refuses."""
    with pytest.raises(ValueError, match=r"\w") as raised:
        call()
    said = str(raised.value)
    assert "\n" not in said
    return said


GATED = {
    None: f"{MODEL} is gated and no token was found: accept its terms at {PAGE}, then {TOKEN}",
    "hf_mine": (
        f"{MODEL} is gated and your token has no access to it: accept its terms at {PAGE} with the token's account; a "
        "fine-grained token also needs the right to read public gated repositories"
    ),
    hub.EXPIRED: f"the Hugging Face hub does not accept your token, which may have expired: {TOKEN}",
}


@pytest.mark.parametrize("token", GATED, ids=["no token", "token without access", "expired token"])
def test_a_gated_model(token: str | None, shelf: Path, ask: Callable[..., Path]) -> None:
    with hub.served(shelf, gated=[MODEL]) as address:
        ask(address, token)
        said = line(lambda: presets.checkpoint("gemma-3-270m"))
    assert said == GATED[token]


@pytest.mark.parametrize(
    ("token", "advice"),
    [(None, f"no token was found, {TOKEN}"), ("hf_mine", "set HF_TOKEN to a token that may read it")],
)
def test_an_unknown_model(token: str | None, advice: str, shelf: Path, ask: Callable[..., Path]) -> None:
    with hub.served(shelf) as address:
        ask(address, token)
        said = line(lambda: presets.checkpoint("someone/else"))
    assert said == (
        "there is no Hugging Face repository someone/else, or it is private: check the name at "
        f"https://huggingface.co/someone/else; if it is private, {advice}; nor is there a folder someone/else with a "
        "config.json"
    )


def test_no_network_and_none_wanted(ask: Callable[..., Path]) -> None:
    cache = ask(None)
    offline = "HF_HUB_OFFLINE is set: run the same command once without it"
    assert (
        line(lambda: presets.checkpoint("gemma-3-270m")) == f"{MODEL} is not in the local cache ({cache}) and {offline}"
    )
    ask(nowhere())
    said = line(lambda: presets.checkpoint(MODEL))
    assert said.startswith(
        f"{MODEL} is not in the local cache ({cache}) and the Hugging Face hub cannot be reached ([Errno 111] "
        "Connection refused): run the same command once with a network"
    )


def test_a_revision_that_is_not_there(shelf: Path, ask: Callable[..., Path]) -> None:
    for revision in ("v3", OTHER):
        with hub.served(shelf) as address:
            ask(address)
            said = line(lambda: presets.checkpoint(MODEL, revision))  # noqa: B023
        assert said == (
            f"{MODEL} has no revision '{revision}': name one of {PAGE}/commits/main with --revision; nor is there a "
            f"folder {MODEL} with a config.json"
        )


def test_another_commit_is_in_the_cache(ask: Callable[..., Path]) -> None:
    cache = ask(None)
    hub.snapshot(cache, MODEL, OTHER)
    hub.snapshot(cache, "google/gemma-scope-9b-pt-res", OTHER)
    said = line(lambda: presets.checkpoint("gemma-3-270m"))
    assert said.startswith(
        f"revision {COMMIT} of {MODEL} is not in the local cache ({cache}) and HF_HUB_OFFLINE is set"
    )
    assert said.endswith(f", or name a cached commit with --revision: {OTHER} (main)")
    pin = presets.presets()["gemma-2-9b"]["sae_revision"]
    said = line(lambda: releases.from_release("gemma-scope-9b-pt-res", "layer_{layer}/width_16k/{l0}", revision=pin))
    assert said.startswith("--sae-id")
    said = line(
        lambda: releases.from_release("gemma-scope-9b-pt-res", "layer_{layer}/width_16k/average_l0_{l0}", revision=pin)
    )
    assert said.endswith(
        f", or name a cached commit by --sae-release gemma-scope-9b-pt-res, which takes the newest: {OTHER} (main)"
    )


def test_a_branch_is_its_commit_and_all_is_read_there(shelf: Path, ask: Callable[..., Path], tmp_path: Path) -> None:
    own = tmp_path / "shelf"
    shutil.copytree(shelf, own)
    home = own / f"models--{MODEL.replace('/', '--')}"
    shutil.copytree(home / "snapshots" / COMMIT, home / "snapshots" / OTHER)
    (home / "refs" / "next").write_text(OTHER)
    chat = home / "snapshots" / OTHER / "chat_template.jinja"
    chat.write_text(chat.read_text().replace("{{", "{# next #}{{", 1))
    with hub.served(own) as address:
        ask(address)
        found = presets.checkpoint("gemma-3-270m", "next")
        assert (found.revision, found.weights) == (OTHER, OTHER)
        assert presets.checkpoint("gemma-3-270m").revision == COMMIT
        model = load(MODEL, OTHER)
    assert "{# next #}" in model.tokenizer.chat_template
    cached = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*.safetensors")}
    assert cached == {"model.safetensors"}
    assert not list((tmp_path / "cache").rglob(f"snapshots/{COMMIT}/*.safetensors"))


def test_a_folder_has_no_revisions() -> None:
    said = line(lambda: presets.resolve("testbed", revision="main"))
    assert said == "--revision main: testbed is a folder, which has no revisions: leave it out"


def load(source: str | Path, revision: str | None = None, **others: Any) -> ChatModel:
    return ChatModel.load(source, name="it", identity="it", revision=revision, device="cpu", **others)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a model in two shards and its tokenizer."""
    folder = tmp_path / "checkpoint"
    tiny.language_model("llama").save_pretrained(folder, max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def cut(file: Path, share: float = 0.5) -> int:
    """Keep the beginning of a file alone; returns how many bytes that is."""
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    return file.stat().st_size


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-*"])
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_file_of_a_folder_that_is_not_whole(name: str, share: float, checkpoint: Path) -> None:
    file = next(checkpoint.glob(name))
    size = cut(file, share)
    said = line(lambda: load(checkpoint))
    assert said.startswith(f"cannot load it as a causal language model: {file} is damaged ({size:,} bytes; ")
    assert said.endswith("): copy or download it again")


def test_a_shard_that_is_missing(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("model-00002-*"))
    shard.unlink()
    said = line(lambda: load(checkpoint))
    assert f"{shard.name} is missing from {checkpoint}, whose index of weights names it: copy or download it" in said


def test_a_shard_that_is_missing_from_the_cache(checkpoint: Path, ask: Callable[..., Path]) -> None:
    cache = ask(None)
    shutil.copytree(checkpoint, hub.snapshot(cache, "someone/shards", OTHER), dirs_exist_ok=True)
    shard = next(cache.rglob("model-00002-*"))
    shard.unlink()
    said = line(lambda: load("someone/shards", OTHER))
    assert f"{shard.name} of someone/shards at {OTHER} is not in the local cache ({cache}) and HF_HUB_OFFLINE" in said


def test_weights_that_were_never_downloaded(shelf: Path, ask: Callable[..., Path]) -> None:
    cache = ask(None)
    shutil.copytree(shelf, cache)
    next(cache.rglob("model.safetensors")).unlink()
    what = f"a file of {MODEL} at {COMMIT} is not in the local cache ({cache}) and "
    assert f"{what}HF_HUB_OFFLINE is set: run" in line(lambda: load(MODEL, COMMIT))
    with hub.served(shelf, gated=[MODEL]) as address:
        ask(address)
        assert GATED[None] in line(lambda: load(MODEL, COMMIT))


def test_a_truncated_download_is_named_deleted_and_downloaded_again(shelf: Path, ask: Callable[..., Path]) -> None:
    with hub.served(shelf) as address:
        cache = ask(address)
        load(MODEL, COMMIT)
        file = next(cache.rglob("snapshots/*/model.safetensors"))
        whole = file.stat().st_size
        size = cut(file)
        said = line(lambda: load(MODEL, COMMIT))
        assert said == (
            f"cannot load it as a causal language model: {file} is damaged ({size:,} bytes; its header says "
            f"{whole:,}): delete it and {file.resolve()}, then run the same command again with a network"
        )
        blob = file.resolve()
        file.unlink()
        blob.unlink()
        load(MODEL, COMMIT)
    assert file.stat().st_size == whole


def test_a_file_without_a_layout_is_held_to_the_hubs_checksum(tmp_path: Path, ask: Callable[..., Path]) -> None:
    shelf = tmp_path / "shelf"
    (hub.snapshot(shelf, "someone/words") / "spiece.model").write_bytes(bytes(range(256)))
    with hub.served(shelf) as address:
        ask(address)
        folder = sources.snapshot("someone/words", "*.model")
    assert damaged.described(folder) is None
    (folder / "spiece.model").write_bytes(bytes(256))
    said = str(damaged.described(folder))
    assert "spiece.model is damaged (256 bytes; its SHA-256 is not that of the hub's file)" in said


SAES = ["gemma-2-9b", "llama-3.1-8b", "llama-3.1-8b-andyrdt", "gemma-3-1b", "qwen-3.5-27b"]
"""Presets, one for each layout of SAE files."""


# What numpy opens and finds cut short, it leaves open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("preset", SAES)
def test_an_sae_that_is_truncated_or_lacking(preset: str, ask: Callable[..., Path]) -> None:
    served, cache = hub.PRESETS[preset], ask(None)
    hub.sae(cache, served.release, served.sae_id, width=32)
    source = releases.from_release(
        served.release, served.sae_id.replace(str(served.layer), "{layer}", 1), revision=pin(preset)
    )
    file = max((file for file in cache.rglob("snapshots/**/*") if file.is_file()), key=lambda file: file.stat().st_size)
    size = cut(file)
    what = f"cannot load an SAE from {served.sae_id} of {served.release}: "
    said = line(lambda: source.loaders[served.layer]("cpu"))
    assert said.startswith(f"{what}{file} is damaged ({size:,} bytes; ")
    assert said.endswith("): delete it, then run the same command again with a network")
    file.unlink()
    said = line(lambda: source.loaders[served.layer]("cpu"))
    lacking = f"a file of {source.repository} at {source.commit}"
    assert said.startswith(f"{what}{lacking} is not in the local cache ({cache})")
    gc.collect()


def pin(preset: str) -> str | None:
    return presets.presets()[preset].get("sae_revision")


def test_saes_are_read_at_the_commit_that_was_asked_for(ask: Callable[..., Path]) -> None:
    """Although SAELens by itself reads the newest, whatever the layout; and its own readers go on doing so."""
    from sae_lens import SAE

    served, cache = hub.PRESETS["llama-3.1-8b"], ask(None)
    hub.sae(cache, served.release, served.sae_id, width=32)
    home = cache / "models--fnlp--Llama3_1-8B-Base-LXR-8x"
    pinned = pin("llama-3.1-8b")
    (home / "snapshots" / str(pinned)).rename(home / "snapshots" / OTHER)
    (home / "refs" / "main").write_text(OTHER)
    hub.sae(cache, served.release, served.sae_id, width=16)
    (home / "refs" / "main").write_text(OTHER)
    widths = {
        revision: releases.from_release(served.release, None, revision=revision).loaders[15]("cpu").cfg.d_in
        for revision in (pinned, OTHER, None)
    }
    assert widths == {pinned: 16, OTHER: 32, None: 32}
    theirs: Any = SAE.from_pretrained(served.release, served.sae_id)
    assert theirs.cfg.d_in == 32


def test_an_sae_folder_that_is_not_whole(tmp_path: Path) -> None:
    folder = tiny.save_saes(tmp_path, layers=1)[0]
    for name in ("sae_weights.safetensors", "cfg.json"):
        size = cut(folder / name)
        said = line(lambda: releases.open_folder(folder, "cpu"))
        assert said.startswith(f"cannot load an SAE from {folder}: {folder / name} is damaged ({size:,} bytes; ")


@pytest.fixture
def foreign(checkpoint: Path) -> Path:
    """A checkpoint whose model is code that lies beside it; running that code leaves a file."""
    about = json.loads((checkpoint / "config.json").read_text())
    about |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(about))
    (checkpoint / "own.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"pathlib.Path({str(checkpoint / 'ran')!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return checkpoint


def test_code_of_a_checkpoint_runs_only_if_one_says_so(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    said = line(lambda: load(foreign))
    assert said == (
        "cannot load it as a causal language model: it brings code of its own, which would run with all your rights: "
        f"read {foreign}, then add --trust-remote-code"
    )
    judge = line(lambda: checkpoints.Reader.load(checkpoints.find(str(foreign))))
    assert "which would run with all your rights" in judge
    assert judge.endswith("then choose another judge, since a judge's code is never run")
    assert not (foreign / "ran").exists()
    model = load(foreign, trust_remote_code=True)
    assert (foreign / "ran").exists()
    assert type(model.model).__name__ == "Model"


def test_judges_and_data_sets_say_the_same(shelf: Path, ask: Callable[..., Path]) -> None:
    with hub.served(shelf, gated=[MODEL]) as address:
        ask(address)
        assert line(lambda: checkpoints.find(MODEL)) == GATED[None]
        said = line(lambda: checkpoints.find(MODEL, "v3"))
        assert said == f"{MODEL} has no revision 'v3': name one of {PAGE}/commits/main with --judge-revision"
    cache = ask(None)
    hub.dataset(cache, "someone/prompts", OTHER, {"prompts.csv": "prompt\nWhat is a quen?\n"})
    said = line(lambda: sources.locate("someone/prompts@v3", option="--pairs", tags=()))
    assert said.startswith("--pairs: no file someone/prompts@v3 is here, and revision v3 of someone/prompts is not in")
    assert said.endswith(f", or name a cached commit as someone/prompts@COMMIT: {OTHER} (main)")


CASES: dict[str, tuple[list[str], str]] = {
    "gated": (["gemma-3-270m"], GATED[None] or ""),
    "no such repository": (["someone/else"], f"no token was found, {TOKEN}"),
    "no such revision": (["gemma-3-270m", "--revision", "v3"], f"{MODEL} has no revision 'v3': name one of {PAGE}"),
}


def asked(words: list[str], place: Path) -> list[str]:
    """The command line that finds features of a model, with SAEs made for it."""
    tiny.save_saes(place / "saes", layers=2, size=48)
    return ["features", *words, "--saes", f"{place}/saes/layer_{{layer}}", "--device", "cpu", "--limit", "8"]


def refused(words: list[str], place: Path, address: str | None, cache: Path) -> str:
    """What the command line says last; it must end with exit code 2 and leave nothing behind."""
    ended = processes.run(asked(words, place), place / "said", partial(point, address, cache, place))
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert not (place / "runs").exists()
    return ended.err.strip().splitlines()[-1]


def point(address: str | None, cache: Path, place: Path) -> None:
    """In the process that runs the command line."""
    for name, value in at(address, cache).items():
        setattr(constants, name, value)
    hf_api.api.endpoint = constants.ENDPOINT
    os.environ.pop("HF_TOKEN", None)
    os.chdir(place)


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_and_the_hub(case: str, shelf: Path, tmp_path: Path) -> None:
    words, said = CASES[case]
    with hub.served(shelf, gated=[MODEL] if case == "gated" else []) as address:
        assert said in refused(words, tmp_path, address, tmp_path / "cache")


@pytest.mark.parametrize("reached", [True, False], ids=["offline", "no network"])
def test_the_command_line_without_a_network(reached: bool, tmp_path: Path) -> None:
    said = "HF_HUB_OFFLINE is set" if reached else "the Hugging Face hub cannot be reached ([Errno 111]"
    assert said in refused([MODEL], tmp_path, None if reached else nowhere(), tmp_path / "cache")


@pytest.fixture
def ready(shelf: Path, tmp_path: Path) -> Path:
    """A cache with a model, and prompts where a run looks for them."""
    cache = tmp_path / "cache"
    shutil.copytree(shelf, cache)
    hub.prompts_folder(tmp_path / "data" / "refusal_direction")
    return cache


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_the_command_line_and_a_truncated_file(name: str, ready: Path, tmp_path: Path) -> None:
    file = next(ready.rglob(name))
    size = cut(file)
    assert f"{file} is damaged ({size:,} bytes; " in refused(["gemma-3-270m"], tmp_path, None, ready)


def test_the_command_line_and_code_that_a_checkpoint_brings(foreign: Path, ready: Path, tmp_path: Path) -> None:
    said = refused([str(foreign)], tmp_path, None, ready)
    assert said.endswith(f"read {foreign}, then add --trust-remote-code")
    words = [*asked([str(foreign)], tmp_path), "--trust-remote-code", "--name", "own", "--best-layer", "1"]
    words += ["--layers", "1", "--refusal-token", "I", "--keep-unrefused"]
    ended = processes.run(words, tmp_path / "said", partial(point, None, ready, tmp_path))
    assert ended.code == 0, ended.err
    run = tmp_path / "runs" / "own"
    assert "trust_remote_code = true" in (run / "options.toml").read_text()
    about = json.loads((run / "environment.json").read_text())
    assert about["trust_remote_code"] is True
    assert about["model"] == {"source": str(foreign), "requested": None, "commit": None}


def test_the_command_line_and_a_full_disk(shelf: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with hub.served(shelf) as address:
        words = asked(["gemma-3-270m"], tmp_path)
        ended = processes.run(words, tmp_path / "said", partial(full, address, cache, tmp_path))
    if ended.code == 77:
        pytest.skip("this system lets us make no disk of our own")
    assert ended.code == 2, ended.err
    assert ended.err.strip().splitlines()[-1] == (
        f"error: the disk is full: {MODEL} does not fit into {cache}: free some space, or set HF_HOME to a folder on a "
        "larger disk"
    )


def full(address: str, cache: Path, place: Path) -> None:
    point(address, cache, place)
    processes.full_disk(cache)
