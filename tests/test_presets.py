"""Every preset with its own model class, tokenizer and SAE format, read from a hub cache by the real loaders."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from huggingface_hub import constants

from refusalscope.inputs import presets
from tests import hub, hub_models, processes, tiny

LARGE = {"gemma-2-2b", "qwen-3.5-27b"}
"""Presets whose SAEs take gigabytes and many seconds to read, whatever they hold."""
WIDE = {"gemma-2-9b"}
"""Whose model is as wide as the real one: of two such with SAEs of one format, the other is run every time."""
GEMMA_3 = [name for name in hub.PRESETS if name.startswith("gemma-3")]
QUESTIONS = ("Explain how to frobnicate the zorb.", "What colour is a quen?")


def ones(names: Iterable[str], *, slow: set[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names]


def loaded(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def chat(tokenizer: Any, question: str) -> Any:
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@pytest.mark.parametrize("name", hub_models.REPOSITORIES)
def test_models_load_by_name(name: str) -> None:
    hub.model(Path(constants.HF_HUB_CACHE), name)
    tokenizer, model = loaded(name)
    repository = hub_models.REPOSITORIES[name]
    shape = model.config.get_text_config()
    assert (shape.num_hidden_layers, shape.hidden_size) == (repository.layers, repository.width)
    ends = tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert tuple(ends) == hub_models.FAMILIES[repository.family].ends
    chats = [chat(tokenizer, question) for question in QUESTIONS]
    if tokenizer.bos_token_id is not None:
        assert all(one.input_ids[0].tolist().count(tokenizer.bos_token_id) == 1 for one in chats)
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    one, other = (model(**inputs).logits[0, -1] for inputs in chats)
    assert one.isfinite().all()
    assert (one - other).abs().max() > 0.5


@pytest.mark.parametrize("preset", ones(sorted(set(hub.PRESETS) - set(GEMMA_3)), slow=LARGE))
def test_saes_load_by_saelens(preset: str) -> None:
    from sae_lens import SAE

    served = hub.PRESETS[preset]
    hub.fill(Path(constants.HF_HUB_CACHE), served)
    sae: Any = SAE.from_pretrained(served.release, served.sae_id, dtype="float32")
    assert sae.cfg.metadata.hook_name == f"blocks.{served.layer}.hook_resid_post"
    tokenizer, model = loaded(served.model)
    residual = model(**chat(tokenizer, QUESTIONS[0]), output_hidden_states=True).hidden_states[served.layer + 1]
    active = (sae.encode(residual) > 0).float().mean()
    assert 0 < active < 0.6


def test_gemma_scope_2_reads_its_shapes_from_the_hub() -> None:
    """SAELens asks for them even offline: the server answers. Our reader, which does not ask, finds the same."""
    cache = Path(constants.HF_HUB_CACHE)
    served = [hub.PRESETS[name] for name in GEMMA_3]
    for one in served:
        hub.fill(cache, one)
    program = (
        "import json, sys\nfrom sae_lens import SAE\nfrom refusalscope.inputs.releases import gemma_scope_2\n"
        "def read(one):\n"
        "    theirs = SAE.from_pretrained(*one, dtype='float32')\n"
        "    ours = SAE.from_pretrained(*one, dtype='float32', converter=gemma_scope_2).state_dict()\n"
        "    same = {name: part.equal(ours[name]) for name, part in theirs.state_dict().items()}\n"
        "    cfg = theirs.cfg\n"
        "    return [cfg.d_in, cfg.d_sae, cfg.metadata.hook_name, len(same) == 5 and all(same.values())]\n"
        "print(json.dumps([read(one) for one in json.loads(sys.argv[1])]))\n"
    )
    with hub.served(cache) as address:
        ended = python("-c", program, json.dumps([[one.release, one.sae_id] for one in served]), HF_ENDPOINT=address)
    expected = [[32, hub.SMALL, f"blocks.{one.layer}.hook_resid_post", True] for one in served]
    assert json.loads(ended.stdout) == expected


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with prompts where a run looks for them."""
    folder = tmp_path_factory.mktemp("place")
    hub.prompts_folder(folder / "data" / "refusal_direction", train=16, other=8)
    return folder


@pytest.mark.parametrize("preset", ones(hub.PRESETS, slow=LARGE | WIDE))
def test_features_of_a_preset(preset: str, place: Path) -> None:
    served = hub.PRESETS[preset]
    hub.fill(Path(constants.HF_HUB_CACHE), served)
    assert_features(place, preset, served.layer, [preset])


def test_features_of_a_model_and_a_release(place: Path) -> None:
    served = hub.PRESETS["qwen-2.5-7b"]
    hub.fill(Path(constants.HF_HUB_CACHE), served)
    pattern = served.sae_id.replace(str(served.layer), "{layer}")
    words = [served.model, "--sae-release", served.release, "--sae-id", pattern]
    assert_features(place, served.model.split("/")[1], served.layer, words)


@pytest.mark.parametrize("kind", ["folders", "repository"])
def test_features_of_a_model_and_saelens_folders(kind: str, place: Path) -> None:
    cache, model = Path(constants.HF_HUB_CACHE), "google/gemma-3-270m-it"
    hub.model(cache, model)
    folder = place / "saes" if kind == "folders" else hub.snapshot(cache, "someone/invented-saes") / "trained"
    tiny.save_saes(folder, layers=2, size=hub.SMALL)
    pattern = f"{folder}/layer_{{layer}}" if kind == "folders" else "someone/invented-saes:trained/layer_{layer}"
    assert_features(place, kind, 1, [model, "--saes", pattern, "--name", kind])


@pytest.mark.slow
def test_what_a_run_downloads_is_enough_offline(place: Path, tmp_path: Path) -> None:
    preset = "gemma-3-270m"
    served, cache = hub.PRESETS[preset], Path(constants.HF_HUB_CACHE)
    hub.fill(cache, served)
    # As on the hub, where a second layer's SAE lies beside it and is not wanted.
    hub.sae(cache, served.release, "layer_5_width_16k_l0_small", width=32)
    words = ["-m", "refusalscope", *asked(served.layer, [preset]), "--runs", str(tmp_path / "runs"), "--name"]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home")}
    with hub.served(cache) as address:
        python(*words, "online", folder=place, HF_HUB_OFFLINE="0", HF_ENDPOINT=address, **home)
    saes = {file.parent.name for file in (tmp_path / "home").rglob("params.safetensors")}
    assert saes == {f"layer_{served.layer}_width_16k_l0_small"}
    python(*words, "offline", folder=place, HF_HUB_OFFLINE="1", **home)
    tables = [(tmp_path / "runs" / name / "features" / "table.json").read_bytes() for name in ("online", "offline")]
    assert tables[0] == tables[1]


def assert_features(place: Path, name: str, layer: int, words: list[str]) -> None:
    """A run of `features` on one layer ends well and leaves feature sets of that layer alone."""
    ended = processes.run(asked(layer, words), place / f"said-{name}", partial(os.chdir, place))
    assert ended.code == 0, ended.err
    about = json.loads((place / "runs" / name / "environment.json").read_text())
    preset = presets.presets().get(words[0], {})
    assert about["model"]["requested"] == preset.get("revision")
    assert preset.get("revision") in (None, about["model"]["commit"])
    assert preset.get("sae_revision") in (None, about["saes"]["commit"])
    assert about["trust_remote_code"] is False
    index = json.loads((place / "runs" / name / "features" / "index.json").read_text())
    assert index["layers"] == [layer]
    sets = {
        chosen: json.loads((place / "runs" / name / "features" / f"{chosen}.json").read_text())["features"]
        for chosen in index["sets"]
    }
    assert {feature["layer"] for features in sets.values() for feature in features} == {layer}
    assert sets["cosine"]
    # Of 80k random features, those along the direction are hardly ever among a token's 50 largest.
    assert sets["cosine+attribution"] or name == "qwen-3.5-27b"


def asked(layer: int, words: list[str]) -> list[str]:
    """The command line that finds features on one layer, the direction's own, with as few prompts as will do."""
    fixed = ["--limit", "8", "--layers", str(layer), "--best-layer", str(layer), "--refusal-token", "I"]
    return ["features", *words, *fixed, "--keep-unrefused", "--batch-size", "16", "--device", "cpu"]


def python(*words: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, in `folder`; its end must be good."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(processes.ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
